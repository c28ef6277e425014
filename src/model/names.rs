//! Parameter names in files, and the orientation of their matrices.

/// A module of ours and its name in one kind of file; `{}` stands for the layer.
#[derive(Clone, Copy, Debug)]
struct Module {
    ours: &'static str,
    theirs: &'static str,
    /// If the file stacks three of our modules in one tensor: which of the three this is.
    third: Option<usize>,
}

const fn module(ours: &'static str, theirs: &'static str) -> Module {
    Module { ours, theirs, third: None }
}

const fn third(ours: &'static str, theirs: &'static str, i: usize) -> Module {
    Module { ours, theirs, third: Some(i) }
}

/// The names in one kind of file.
#[derive(Debug)]
pub(super) struct Names {
    modules: &'static [Module],
    /// The names that `modules` lacks.
    rest: Option<&'static Names>,
    /// Prefix of most names, except in files that hold the model without its head.
    prefix: &'static str,
    /// Whether linear weights are `[d_in, d_out]`, as ours, rather than `[d_out, d_in]`.
    pub input_major: bool,
}

/// The place of a parameter in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Name of the tensor.
    pub tensor: String,
    /// Which third of the tensor, along the outputs.
    pub third: Option<usize>,
}

/// How a file spells the names of its kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Spelling {
    /// What comes before all of them: `module.` for a model that was saved in its wrapper.
    before: String,
    /// Whether it holds the model without its head, and names without their prefix.
    bare: bool,
}

impl Spelling {
    /// The spelling of a file with these tensors, by what it calls the table of tokens.
    pub fn of<'a>(names: &Names, tensors: impl Iterator<Item = &'a str> + Clone) -> Spelling {
        const TABLE: &str = "embed.weight";
        let place = |bare: bool| Some((bare, names.place(TABLE, bare)?.tensor));
        let spellings: Vec<(bool, String)> = [place(false), place(true)].into_iter().flatten().collect();
        let found = |tensor: &str| tensors.clone().any(|name| name == tensor);
        if let Some((bare, _)) = spellings.iter().find(|(_, tensor)| found(tensor)) {
            return Spelling { before: String::new(), bare: *bare };
        }
        for (bare, tensor) in spellings.iter().filter(|_| !names.prefix.is_empty()) {
            let wrapped = |name: &'a str| name.strip_suffix(tensor.as_str()).filter(|before| before.ends_with('.'));
            let mut wrappers = tensors.clone().filter_map(wrapped);
            if let (Some(before), None) = (wrappers.next(), wrappers.next()) {
                return Spelling { before: before.into(), bare: *bare };
            }
        }
        Spelling::default()
    }

    /// The place of our parameter `name`, which is `Names::place` for this spelling; `has` tells which tensors there
    /// are. If there is none that it can be, the usual name.
    pub fn place(&self, names: &Names, name: &str, has: impl Fn(&str) -> bool) -> Option<Place> {
        let usual = names.place(name, self.bare)?;
        let wrapped = format!("{}{}", self.before, usual.tensor);
        // A head may be outside the wrapper. And the norms of BERT's first files have gamma and beta.
        let candidates = [wrapped.clone(), usual.tensor];
        let old = |tensor: &String| match tensor.rsplit_once('.')? {
            (module, "weight") if name.contains("norm") => Some(format!("{module}.gamma")),
            (module, "bias") if name.contains("norm") => Some(format!("{module}.beta")),
            _ => None,
        };
        let all = candidates.iter().cloned().chain(candidates.iter().filter_map(old));
        let tensor = all.into_iter().find(|tensor| has(tensor)).unwrap_or(wrapped);
        Some(Place { tensor, third: usual.third })
    }
}

impl Names {
    /// The place of our parameter `name`. `None` if these files have no such parameter.
    pub fn place(&self, name: &str, bare: bool) -> Option<Place> {
        let (stem, suffix) = name.rsplit_once('.')?;
        let (stem, layer) = match stem.strip_prefix("h.").and_then(|rest| rest.split_once('.')) {
            Some((layer, rest)) => (format!("h.{{}}.{rest}"), layer),
            None => (stem.to_string(), ""),
        };
        let Some(module) = self.modules.iter().find(|m| m.ours == stem) else {
            return self.rest?.place(name, bare);
        };
        let theirs = module.theirs.replace("{}", layer);
        let theirs = if bare { theirs.strip_prefix(self.prefix).unwrap_or(&theirs) } else { &theirs };
        Some(Place { tensor: format!("{theirs}.{suffix}"), third: module.third })
    }
}

/// Llama, Mistral, Qwen2, Qwen3 and others of the family, from Hugging Face.
pub(super) const HF_LLAMA: Names = Names {
    modules: &[
        module("embed", "model.embed_tokens"),
        module("norm_f", "model.norm"),
        module("head", "lm_head"),
        module("h.{}.attn_norm", "model.layers.{}.input_layernorm"),
        module("h.{}.attn.q", "model.layers.{}.self_attn.q_proj"),
        module("h.{}.attn.k", "model.layers.{}.self_attn.k_proj"),
        module("h.{}.attn.v", "model.layers.{}.self_attn.v_proj"),
        module("h.{}.attn.o", "model.layers.{}.self_attn.o_proj"),
        module("h.{}.attn.q_norm", "model.layers.{}.self_attn.q_norm"),
        module("h.{}.attn.k_norm", "model.layers.{}.self_attn.k_norm"),
        module("h.{}.mlp_norm", "model.layers.{}.post_attention_layernorm"),
        module("h.{}.mlp.gate", "model.layers.{}.mlp.gate_proj"),
        module("h.{}.mlp.up", "model.layers.{}.mlp.up_proj"),
        module("h.{}.mlp.down", "model.layers.{}.mlp.down_proj"),
    ],
    rest: None,
    prefix: "model.",
    input_major: false,
};

/// GPT-2 from Hugging Face. Its matrices have our layout, and q, k and v are stacked in one.
pub(super) const HF_GPT2: Names = Names {
    modules: &[
        module("embed", "transformer.wte"),
        module("position", "transformer.wpe"),
        module("norm_f", "transformer.ln_f"),
        module("head", "lm_head"),
        module("h.{}.attn_norm", "transformer.h.{}.ln_1"),
        third("h.{}.attn.q", "transformer.h.{}.attn.c_attn", 0),
        third("h.{}.attn.k", "transformer.h.{}.attn.c_attn", 1),
        third("h.{}.attn.v", "transformer.h.{}.attn.c_attn", 2),
        module("h.{}.attn.o", "transformer.h.{}.attn.c_proj"),
        module("h.{}.mlp_norm", "transformer.h.{}.ln_2"),
        module("h.{}.mlp.up", "transformer.h.{}.mlp.c_fc"),
        module("h.{}.mlp.down", "transformer.h.{}.mlp.c_proj"),
    ],
    rest: None,
    prefix: "transformer.",
    input_major: true,
};

/// BERT and its relatives, from Hugging Face.
pub(super) const HF_BERT: Names = Names {
    modules: &[
        module("embed", "bert.embeddings.word_embeddings"),
        module("position", "bert.embeddings.position_embeddings"),
        module("token_type", "bert.embeddings.token_type_embeddings"),
        module("embed_norm", "bert.embeddings.LayerNorm"),
        module("h.{}.attn.q", "bert.encoder.layer.{}.attention.self.query"),
        module("h.{}.attn.k", "bert.encoder.layer.{}.attention.self.key"),
        module("h.{}.attn.v", "bert.encoder.layer.{}.attention.self.value"),
        module("h.{}.attn.o", "bert.encoder.layer.{}.attention.output.dense"),
        module("h.{}.attn_norm", "bert.encoder.layer.{}.attention.output.LayerNorm"),
        module("h.{}.mlp.up", "bert.encoder.layer.{}.intermediate.dense"),
        module("h.{}.mlp.down", "bert.encoder.layer.{}.output.dense"),
        module("h.{}.mlp_norm", "bert.encoder.layer.{}.output.LayerNorm"),
    ],
    rest: None,
    prefix: "bert.",
    input_major: false,
};

/// GGUF files of language models.
pub(super) const GGUF: Names = Names {
    modules: &[
        module("embed", "token_embd"),
        module("position", "position_embd"),
        module("norm_f", "output_norm"),
        module("head", "output"),
        module("h.{}.attn_norm", "blk.{}.attn_norm"),
        module("h.{}.attn.q", "blk.{}.attn_q"),
        module("h.{}.attn.k", "blk.{}.attn_k"),
        module("h.{}.attn.v", "blk.{}.attn_v"),
        module("h.{}.attn.o", "blk.{}.attn_output"),
        module("h.{}.attn.q_norm", "blk.{}.attn_q_norm"),
        module("h.{}.attn.k_norm", "blk.{}.attn_k_norm"),
        module("h.{}.mlp_norm", "blk.{}.ffn_norm"),
        module("h.{}.mlp.gate", "blk.{}.ffn_gate"),
        module("h.{}.mlp.up", "blk.{}.ffn_up"),
        module("h.{}.mlp.down", "blk.{}.ffn_down"),
    ],
    rest: None,
    prefix: "",
    input_major: false,
};

/// GGUF files of GPT-2.
pub(super) const GGUF_GPT2: Names = Names {
    modules: &[
        third("h.{}.attn.q", "blk.{}.attn_qkv", 0),
        third("h.{}.attn.k", "blk.{}.attn_qkv", 1),
        third("h.{}.attn.v", "blk.{}.attn_qkv", 2),
    ],
    rest: Some(&GGUF),
    prefix: "",
    input_major: false,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let at = |tensor: &str, third| Some(Place { tensor: tensor.into(), third });
        assert_eq!(HF_LLAMA.place("h.11.attn.q.bias", false), at("model.layers.11.self_attn.q_proj.bias", None));
        assert_eq!(HF_LLAMA.place("norm_f.weight", true), at("norm.weight", None));
        assert_eq!(HF_LLAMA.place("head.weight", true), at("lm_head.weight", None));
        assert_eq!(HF_LLAMA.place("position.weight", false), None);
        assert_eq!(HF_GPT2.place("h.0.attn.v.weight", true), at("h.0.attn.c_attn.weight", Some(2)));
        assert_eq!(GGUF.place("h.3.mlp.down.weight", false), at("blk.3.ffn_down.weight", None));
    }

    #[test]
    fn spellings() {
        let check = |names: &Names, tensors: &[&str], ours: &str, theirs: &str| {
            let spelling = Spelling::of(names, tensors.iter().copied());
            let place = spelling.place(names, ours, |tensor| tensors.contains(&tensor)).unwrap();
            assert_eq!(place.tensor, theirs, "{tensors:?}");
        };
        let norm = "bert.embeddings.LayerNorm";
        for (weight, expected) in [("weight", "weight"), ("gamma", "gamma"), ("other", "weight")] {
            let tensors = ["bert.embeddings.word_embeddings.weight", &format!("{norm}.{weight}")];
            check(&HF_BERT, &tensors, "embed_norm.weight", &format!("{norm}.{expected}"));
        }
        check(&HF_GPT2, &["wte.weight"], "h.0.attn.q.bias", "h.0.attn.c_attn.bias");
        check(&HF_GPT2, &["module.transformer.wte.weight"], "norm_f.bias", "module.transformer.ln_f.bias");
        let tensors = ["model.backbone.embed_tokens.weight", "lm_head.weight"];
        check(&HF_LLAMA, &tensors, "norm_f.weight", "model.backbone.norm.weight");
        check(&HF_LLAMA, &tensors, "head.weight", "lm_head.weight");
        // Two models in one file.
        check(&HF_LLAMA, &["a.embed_tokens.weight", "b.embed_tokens.weight"], "norm_f.weight", "model.norm.weight");
        check(&GGUF, &["x.token_embd.weight"], "norm_f.weight", "output_norm.weight");
    }
}
