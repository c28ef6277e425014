//! Low-rank adapters of linear layers.

use serde::{Deserialize, Serialize};

use super::names::{layer_of, table_of_part};
use crate::error::{Error, Result, joined, quoted};
use crate::ops::{POSITIVE, is_positive};

/// Ranks beyond this are no adapters.
pub(crate) const MAX_RANK: usize = 1 << 14;

/// What the two matrices of an adapter are called, after the name of their layer.
pub(crate) const LORA_A: &str = "lora_a";
pub(crate) const LORA_B: &str = "lora_b";

/// The layers that q, k and v of one block are together, in models that stack them.
pub(crate) const QKV: &str = "qkv";

/// Low-rank adapters (LoRA, Hu et al. 2021, <https://arxiv.org/abs/2106.09685>): each adapted linear layer computes
/// `x w + scale * (x a) b`, of which only `a` `[d_in, rank]` and `b` `[rank, d_out]` are trained.
///
/// Use it to fine-tune a model that takes too much memory to train whole. The weights stay as they are, quantised too,
/// and have neither gradients nor moments; the adapter is a small file of its own. At first `b` is zero, so the model
/// begins as it was.
///
/// ```
/// use throughline::nn::Lora;
/// let lora = Lora { dropout: 0.05, ..Lora::new(8, 16.0) };
/// assert_eq!(lora.scale(), 2.0);
/// let attention_only = Lora { targets: vec!["attn.q".into(), "attn.v".into()], ..lora };
/// attention_only.validate()?;
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Width of the detour: 4 to 64 in most uses. Larger adapters can learn more, and take more memory.
    pub rank: usize,
    /// Numerator of the [scale](Self::scale). Often the rank or twice of it.
    pub alpha: f32,
    /// Whether the scale is `alpha / sqrt(rank)` rather than `alpha / rank`, which keeps the sizes of updates alike
    /// across ranks (rsLoRA, Kalajdzievski 2023, <https://arxiv.org/abs/2312.03732>).
    #[serde(default)]
    pub rank_stabilized: bool,
    /// Probability of dropping an element of the adapters' inputs in training.
    #[serde(default)]
    pub dropout: f32,
    /// The linear layers to adapt, by the end of their names: `q` or `attn.q` is that of every block, `h.3.attn.q` one.
    /// Empty for all in blocks. [`Model::lora`](crate::model::Model::lora) translates the names of other software.
    #[serde(default)]
    pub targets: Vec<String>,
    /// Modules of the model to train whole besides, by the end of their names: `embed`, `norm_f`, `attn_norm`. They
    /// are f32 then.
    #[serde(default)]
    pub trained: Vec<String>,
    /// Whether q, k and v of a block share one `a`, called `qkv.lora_a`: the adapters of files whose model stacks the
    /// three in one layer, such as GPT-2's. [`Model::lora`](crate::model::Model::lora) sets it.
    #[serde(default)]
    pub shared_qkv: bool,
}

impl Lora {
    /// Adapters of all linear layers in blocks, with a scale of `alpha / rank`.
    pub fn new(rank: usize, alpha: f32) -> Self {
        Lora { rank, alpha, rank_stabilized: false, dropout: 0.0, targets: vec![], trained: vec![], shared_qkv: false }
    }

    /// The factor of what the adapters add.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        self.alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// Checks all settings. The error names the first field with an impossible value.
    pub fn validate(&self) -> Result<()> {
        Error::unless((1..=MAX_RANK).contains(&self.rank), "lora.rank", "from 1 to 2^14", self.rank)?;
        Error::unless(is_positive(self.alpha), "lora.alpha", POSITIVE, self.alpha)?;
        Error::unless((0.0..1.0).contains(&self.dropout), "lora.dropout", "from 0 to below 1", self.dropout)?;
        for (field, names) in [("lora.targets", &self.targets), ("lora.trained", &self.trained)] {
            Error::unless(!names.iter().any(String::is_empty), field, "names of modules", "an empty one")?;
        }
        Ok(())
    }

    /// Whether the layer of this full name is adapted.
    pub(crate) fn adapts(&self, layer: &str) -> bool {
        match self.targets[..] {
            [] => layer_of(layer).is_some(),
            _ => self.targets.iter().any(|target| is_called(layer, target)),
        }
    }

    /// The name of the layer whose `a` this one uses.
    pub(crate) fn owner_of_a(&self, layer: &str) -> String {
        match layer.rsplit_once('.') {
            Some((block, "q" | "k" | "v")) if self.shared_qkv => format!("{block}.{QKV}"),
            None if self.shared_qkv && ["q", "k", "v"].contains(&layer) => QKV.into(),
            _ => layer.into(),
        }
    }

    /// Whether the parameter of this full name is trained: one of an adapter, or of a module that is trained whole.
    pub fn trains(&self, param: &str) -> bool {
        let (whole, _) = table_of_part(param);
        let Some((module, last)) = whole.rsplit_once('.') else { return false };
        last == LORA_A || last == LORA_B || self.trained.iter().any(|name| is_called(module, name))
    }

    /// Returns an error if a name of the settings is none of the model's, by the names of its parameters.
    pub(crate) fn check_names<'a>(&self, params: impl Iterator<Item = &'a str> + Clone) -> Result<()> {
        let modules = params.filter_map(|param| table_of_part(param).0.rsplit_once('.'));
        let adapted = modules.clone().filter(|(_, last)| *last == LORA_B).map(|(module, _)| module);
        let whole = modules.filter(|(_, last)| *last != LORA_A && *last != LORA_B).map(|(module, _)| module);
        let missing = |names: &[String], there: &mut dyn Iterator<Item = &'a str>| {
            let there: Vec<&str> = there.collect();
            names.iter().find(|name| !there.iter().any(|module| is_called(module, name))).cloned()
        };
        if let Some(name) = missing(&self.targets, &mut adapted.clone()) {
            let layers = last_names(whole.filter(|module| layer_of(module).is_some()));
            let message = format!("no linear layer is called {}. The blocks have {layers}", quoted(&name));
            return Err(Error::config("lora.targets", message));
        }
        if let Some(name) = missing(&self.trained, &mut whole.clone()) {
            let message = format!("no module is called {}. The model has {}", quoted(&name), last_names(whole));
            return Err(Error::config("lora.trained", message));
        }
        match adapted.clone().next() {
            Some(_) => Ok(()),
            None => Err(Error::config("lora.targets", "the model has no linear layers in blocks to adapt")),
        }
    }
}

/// Whether a module is meant by this name: its own, or the end of it.
pub(crate) fn is_called(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|before| before.is_empty() || before.ends_with('.'))
}

/// The last names of modules, each once.
fn last_names<'a>(modules: impl Iterator<Item = &'a str>) -> String {
    let mut names: Vec<String> = vec![];
    for module in modules {
        let name = quoted(module.rsplit('.').next().unwrap_or(module));
        if !names.contains(&name) {
            names.push(name);
        }
    }
    joined(names, ", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_matched_by_their_ends() {
        let lora = Lora { targets: vec!["q".into(), "mlp.up".into(), "h.3.attn.o".into()], ..Lora::new(4, 4.0) };
        let adapted = ["h.0.attn.q", "h.11.mlp.up", "h.3.attn.o", "q"];
        assert!(adapted.iter().all(|layer| lora.adapts(layer)));
        let others = ["h.0.attn.k", "h.0.up", "h.2.attn.o", "h.13.attn.o", "h.0.attn.q.q_", "head", "h.0.attn.xq"];
        assert!(!others.iter().any(|layer| lora.adapts(layer)));
        let all = Lora::new(4, 4.0);
        assert!(all.adapts("h.7.mlp.down") && !all.adapts("head"));
    }

    #[test]
    fn trained_are_adapters_and_what_is_named() {
        let lora = Lora { trained: vec!["embed".into(), "attn_norm".into()], ..Lora::new(4, 4.0) };
        let trained = ["h.0.attn.q.lora_a", "h.0.mlp.up.lora_b", "embed.weight@64", "h.1.attn_norm.bias"];
        assert!(trained.iter().all(|param| lora.trains(param)));
        assert!(!["h.0.attn.q.weight", "norm_f.weight", "head.weight", "b"].iter().any(|param| lora.trains(param)));
    }

    #[test]
    fn impossible_settings_are_named() {
        let good = Lora::new(4, 4.0);
        let wrong = [
            (Lora { rank: 0, ..good.clone() }, "lora.rank"),
            (Lora { rank: usize::MAX, ..good.clone() }, "lora.rank"),
            (Lora { alpha: f32::NAN, ..good.clone() }, "lora.alpha"),
            (Lora { alpha: 0.0, ..good.clone() }, "lora.alpha"),
            (Lora { dropout: 1.0, ..good.clone() }, "lora.dropout"),
            (Lora { targets: vec![String::new()], ..good.clone() }, "lora.targets"),
            (Lora { trained: vec![String::new()], ..good.clone() }, "lora.trained"),
        ];
        for (lora, field) in wrong {
            let error = lora.validate().unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}`")), "{error}");
        }
        good.validate().unwrap();
    }
}
