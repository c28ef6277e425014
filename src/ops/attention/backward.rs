//! The gradient.

use super::heads::{Attention, Dims, Keys, dot, from_first};
use super::launch::shared_kernel;
use super::texts::ROW_DOTS;
use super::tiles::{Cut, Tile};
use crate::array::Array;
use crate::error::Result;
use crate::graph::{Op, Vjp};
use crate::kernel::{Bind, Launch, Program};
use crate::ops::checks::{expect_f32, expect_shape};
use crate::tensor::TensorType;

/// `(q, k, v, o, lse, do) -> (dq, dk, dv)`: the gradient of [`Attention`], and with `first` as one more input that of
/// [`AttentionFrom`](super::AttentionFrom).
#[derive(Clone, Copy, Debug)]
pub struct AttentionBackward(Attention, Keys);

/// Adds the backward pass, with the first keys if they are input 3.
pub(super) fn add_backward(op: Attention, cx: &mut Vjp<'_>) -> Result<()> {
    let mut inputs = cx.inputs[..3].to_vec();
    inputs.extend([cx.outputs[0], cx.outputs[1], cx.dy0()?]);
    inputs.extend(cx.inputs.get(3));
    let keys = if inputs.len() > 6 { Keys::From } else { Keys::All };
    let grads = cx.graph.op(&cx.name, AttentionBackward(op, keys), &inputs)?;
    (0..3).for_each(|i| cx.set(i, grads[i]));
    Ok(())
}

impl AttentionBackward {
    /// Adds the dispatch for what both halves of the backward pass read of each row, if the first half does not make it
    /// itself. Returns what to bind for it in the second half, and that with the output and what may follow in the
    /// first.
    fn stats(&self, program: &mut Program, cx: &Launch<'_>, d: &Dims, tile: Tile) -> ([Bind; 2], Vec<Bind>) {
        let rows = d.batch * self.0.heads * d.tq;
        let (words, grid) = (self.0.words(d, 1, rows, 0..0), cx.profile.grid(rows.div_ceil(64)));
        let rounded = matches!(tile.cut, Cut::Matrices(m) if m.kind.is_f16());
        let kernel = |entry| shared_kernel::<Self>(ROW_DOTS, entry, d.dh).knob("ROUNDED", rounded);
        if tile.from {
            let stats = program.scratch(TensorType::f32([rows, 2]));
            let firsts = program.scratch(TensorType::u32([2, d.batch, d.tq]));
            let made = [Bind::Scratch(stats), Bind::Scratch(firsts)];
            let binds = [&[Bind::In(3), Bind::In(5), Bind::In(4), Bind::In(6)][..], &made].concat();
            program.dispatch(kernel("row_stats"), &binds, &words, grid);
            let stats = [Bind::ScratchIn(stats), Bind::ScratchIn(firsts)];
            return (stats, vec![stats[0], stats[1], Bind::Out(0)]);
        }
        let delta = program.scratch(TensorType::f32([rows]));
        let stats = [Bind::In(4), Bind::ScratchIn(delta)];
        if let Cut::Tiled { .. } = tile.cut {
            return (stats, vec![Bind::In(4), Bind::Scratch(delta), Bind::Out(0), Bind::In(3)]);
        }
        program.dispatch(kernel("row_dots"), &[Bind::In(3), Bind::In(5), Bind::Scratch(delta)], &words, grid);
        (stats, vec![stats[0], stats[1], Bind::Out(0)])
    }
}

impl Op for AttentionBackward {
    fn name(&self) -> &'static str {
        "attention_backward"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>, String> {
        let forward = match (self.1, inputs) {
            (Keys::From, [q, k, v, _, _, _, first]) => self.0.outputs_from(&[q, k, v, first].map(TensorType::clone))?,
            (Keys::From, _) => return Err(format!("takes 7 inputs, got {}", inputs.len())),
            _ => {
                expect_f32(inputs, 6)?;
                self.0.outputs(&inputs[..3])?
            }
        };
        expect_f32(&inputs[..6], 6)?;
        for (what, ty, like) in [("y", &inputs[3], &forward[0]), ("lse", &inputs[4], &forward[1])] {
            expect_shape(what, ty, like.shape.dims())?;
        }
        expect_shape("dy", &inputs[5], inputs[0].shape.dims())?;
        Ok(inputs[..3].to_vec())
    }

    fn vjp(&self, cx: &mut Vjp<'_>) -> Result<()> {
        Err(cx.no_gradient("second derivatives of attention are not implemented"))
    }

    fn variants(&self, cx: &Launch<'_>) -> Vec<String> {
        self.0.dims(cx.inputs).map(|d| Tile::names(&Tile::backward(cx, &d, self.1))).unwrap_or_default()
    }

    fn launch(&self, cx: &Launch<'_>) -> Result<Program, String> {
        let (op, d) = (&self.0, self.0.dims(cx.inputs)?);
        let mut program = Program::default();
        let tile = Tile::pick(&Tile::backward(cx, &d, self.1), cx.variant)?;
        let ins = [Bind::In(0), Bind::In(1), Bind::In(2), Bind::In(5)];
        let (stats, mut binds) = self.stats(&mut program, cx, &d, tile);
        binds.splice(0..0, ins);
        let kernel = tile.kernel::<Self>("backward_q", d.dh);
        op.dispatch(&mut program, cx, (kernel, &binds), (d.tq, op.heads), (d.tk, 3), tile)?;
        let binds = [&ins[..], &stats, &[Bind::Out(1), Bind::Out(2)]].concat();
        let tile = tile.for_keys(cx, d.dh);
        let kernel = tile.kernel::<Self>("backward_kv", d.dh);
        op.dispatch(&mut program, cx, (kernel, &binds), (d.tk, op.kv_heads), (d.tq, 2 * d.sharing), tile)?;
        Ok(program)
    }

    fn reference(&self, inputs: &[&Array], outputs: &[TensorType]) -> Vec<Array> {
        let op = &self.0;
        let types: Vec<TensorType> = inputs.iter().map(|a| TensorType::f32(a.shape.clone())).collect();
        let Ok(d) = op.dims(&types) else { return vec![] };
        let [q, k, v, o, lse, dy] = [0, 1, 2, 3, 4, 5].map(|i| &inputs[i].data);
        let scale = f64::from(op.scale(d.dh));
        let [mut dq, mut dk, mut dv] = [0, 1, 2].map(|i: usize| Array::zeros(outputs[i].shape.clone()));
        op.for_each_pair(
            &d,
            |d, b, t| match inputs.get(6) {
                Some(firsts) => from_first(&firsts.data, d, b, t),
                None => op.seen(d, t, d.tk.saturating_sub(d.tq)),
            },
            |b, t, h, key| {
                let [qr, kr] = op.ranges(&d, (b, t, h, key));
                let (q, k, v, dy) = (&q[qr.clone()], &k[kr.clone()], &v[kr.clone()], &dy[qr.clone()]);
                let prob = (scale * dot(q, k) - lse[(b * op.heads + h) * d.tq + t]).exp();
                let ds = scale * prob * (dot(dy, v) - dot(dy, &o[qr.clone()]));
                for i in 0..d.dh {
                    dq.data[qr.start + i] += ds * k[i];
                    dk.data[kr.start + i] += ds * q[i];
                    dv.data[kr.start + i] += prob * dy[i];
                }
            },
        );
        vec![dq, dk, dv]
    }

    fn flops(&self, inputs: &[TensorType], _: &[TensorType]) -> u64 {
        // Five products: scores, dp, dq, dk, dv.
        self.0.dims(inputs).map_or(0, |d| 10 * d.dh as u64 * self.0.pairs(&d))
    }
}
