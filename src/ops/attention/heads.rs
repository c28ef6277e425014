//! The op, its sizes, and its reference.

use std::ops::Range;

use crate::array::Array;
use crate::error::Result;
use crate::ops::checks::expect_f32;
use crate::tensor::TensorType;

/// `(q, k, v) -> (o, lse)`: `q` and `o` `[batch, tq, heads * dh]`, `k` and `v` `[batch, tk, kv_heads * dh]`, `lse`
/// `[batch * heads * tq]`. If `causal`, query `t` sees keys up to `t + tk - tq`.
///
/// A head has at most 1024 elements. Pass it to [`Graph::attention`](crate::Graph::attention) or
/// [`Graph::attention_cached`](crate::Graph::attention_cached).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key and value heads. `heads` must be a multiple of it.
    pub kv_heads: usize,
    /// Whether a query sees no keys after its own position. False in encoders.
    pub causal: bool,
    /// Factor of the scores; `1 / sqrt(dh)` if `None`.
    pub scale: Option<f32>,
}

/// The most elements of a head that any case tests.
const WIDEST: usize = 1024;

/// Which keys a query may see, apart from those after it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Keys {
    All,
    /// Those of a cache, of which input 3 says how many were there before.
    Cached,
    /// Those from a first one on, which input 3 gives; backward, the last input.
    From,
}

/// Sizes of one attention.
#[derive(Clone, Copy)]
pub(super) struct Dims {
    pub batch: usize,
    pub tq: usize,
    pub tk: usize,
    pub dh: usize,
    pub kv_heads: usize,
    /// Query heads that share a key and value head.
    pub sharing: usize,
}

impl Attention {
    pub(super) fn dims(&self, inputs: &[TensorType]) -> Result<Dims, String> {
        let (h, kv) = (self.heads, self.kv_heads);
        if h == 0 || kv == 0 || h % kv != 0 {
            return Err(format!("heads ({h}) must be a multiple of kv_heads ({kv})"));
        }
        let &[batch, tq, width] = inputs[0].shape.dims() else {
            return Err(format!("q must be [batch, time, heads * dh], got {}", inputs[0].shape));
        };
        if width % h != 0 {
            return Err(format!("the width {width} of q is not a multiple of {h} heads"));
        }
        let dh = width / h;
        if dh > WIDEST {
            return Err(format!("heads of {dh} elements are wider than {WIDEST}, the most that the kernels take"));
        }
        let tk = inputs[1].shape.dims().get(1).copied().unwrap_or(0);
        for (name, ty) in [("k", &inputs[1]), ("v", &inputs[2])] {
            if ty.shape.dims() != [batch, tk, kv * dh] {
                return Err(format!("{name} must be [{batch}, time, {}], got {}", kv * dh, ty.shape));
            }
        }
        if self.causal && tq > tk {
            return Err(format!("causal attention of {tq} queries needs as many keys, got {tk}"));
        }
        Ok(Dims { batch, tq, tk, dh, kv_heads: kv, sharing: h / kv })
    }

    /// Types of the outputs.
    pub(super) fn outputs(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        expect_f32(inputs, 3)?;
        let d = self.dims(inputs)?;
        Ok(vec![inputs[0].clone(), TensorType::f32([d.batch * self.heads * d.tq])])
    }

    /// The same with first keys, input 3.
    pub(super) fn outputs_from(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let [q, k, _, first] = inputs else { return Err(format!("takes 4 inputs, got {}", inputs.len())) };
        let outputs = self.outputs(&inputs[..3])?;
        if !self.causal {
            return Err("attention from a first key on must be causal".into());
        }
        let (tokens, keys) = (&q.shape.dims()[..2], k.shape.dims()[1]);
        if tokens[1] != keys {
            return Err(format!(
                "attention from a first key on takes as many keys as queries, {}, got {keys}",
                tokens[1]
            ));
        }
        if *first != TensorType::u32(tokens) {
            return Err(format!("the first keys must be {}, one for each query, got {first}", TensorType::u32(tokens)));
        }
        Ok(outputs)
    }

    pub(super) fn scale(&self, dh: usize) -> f32 {
        self.scale.unwrap_or(1.0 / (dh as f32).sqrt())
    }

    /// `o` and `lse`, where query `t` of sequence `b` sees the keys `seen(sizes, b, t)`.
    pub(super) fn reference_forward(
        &self,
        inputs: &[&Array],
        outputs: &[TensorType],
        seen: impl Fn(&Dims, usize, usize) -> Range<usize>,
    ) -> Vec<Array> {
        let types: Vec<TensorType> = inputs[..3].iter().map(|a| TensorType::f32(a.shape.clone())).collect();
        // `infer` accepted these shapes.
        let Ok(d) = self.dims(&types) else { return vec![] };
        let (q, k, v) = (&inputs[0].data, &inputs[1].data, &inputs[2].data);
        let scale = f64::from(self.scale(d.dh));
        let mut o = Array::zeros(outputs[0].shape.clone());
        let mut lse = vec![f64::NEG_INFINITY; d.batch * self.heads * d.tq];
        let stat = |b: usize, h: usize, t: usize| (b * self.heads + h) * d.tq + t;
        // Two passes: the sums of exponentials, then the weighted values.
        self.for_each_pair(&d, &seen, |b, t, h, key| {
            let [qr, kr] = self.ranges(&d, (b, t, h, key));
            let s = scale * dot(&q[qr], &k[kr]);
            let l = &mut lse[stat(b, h, t)];
            *l = l.max(s) + (-(*l - s).abs()).exp().ln_1p();
        });
        self.for_each_pair(&d, &seen, |b, t, h, key| {
            let [qr, kr] = self.ranges(&d, (b, t, h, key));
            let prob = (scale * dot(&q[qr.clone()], &k[kr.clone()]) - lse[stat(b, h, t)]).exp();
            o.data[qr].iter_mut().zip(&v[kr]).for_each(|(o, v)| *o += prob * v);
        });
        vec![o, Array::new(outputs[1].shape.clone(), lse)]
    }

    /// The number of pairs of query and key that see each other, over all heads.
    pub(super) fn pairs(&self, d: &Dims) -> u64 {
        let (tq, tk) = (d.tq as u64, d.tk as u64);
        let pairs = if self.causal { tq * (tk - tq) + tq * (tq + 1) / 2 } else { tq * tk };
        pairs * (d.batch * self.heads) as u64
    }

    /// The keys that query `t` sees with `ahead` keys before that of the first query.
    pub(super) fn seen(&self, d: &Dims, t: usize, ahead: usize) -> Range<usize> {
        0..if self.causal { (t + ahead + 1).min(d.tk) } else { d.tk }
    }

    /// Calls `f(batch, query, head, key)` for all pairs that see each other, in order. Query `t` of sequence `b` sees
    /// the keys `seen(d, b, t)`.
    pub(super) fn for_each_pair(
        &self,
        d: &Dims,
        seen: impl Fn(&Dims, usize, usize) -> Range<usize>,
        mut f: impl FnMut(usize, usize, usize, usize),
    ) {
        for b in 0..d.batch {
            for h in 0..self.heads {
                for t in 0..d.tq {
                    seen(d, b, t).for_each(|key| f(b, t, h, key));
                }
            }
        }
    }

    /// The range of a head in a row of `q`, and in a row of `k`.
    pub(super) fn ranges(&self, d: &Dims, (b, t, h, key): (usize, usize, usize, usize)) -> [Range<usize>; 2] {
        let q = ((b * d.tq + t) * self.heads + h) * d.dh;
        let kv = ((b * d.tk + key) * self.kv_heads + h / (self.heads / self.kv_heads)) * d.dh;
        [q..q + d.dh, kv..kv + d.dh]
    }
}

/// In four sums, which the compiler turns into one vector.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<4>(), b.as_chunks::<4>());
    let mut sums = [0.0; 4];
    for (a, b) in a.iter().zip(b) {
        (0..4).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

/// The keys that query `t` of sequence `b` sees, from the first keys of all queries.
pub(super) fn from_first(firsts: &[f64], d: &Dims, b: usize, t: usize) -> Range<usize> {
    (firsts[b * d.tq + t] as usize).min(t)..t + 1
}
