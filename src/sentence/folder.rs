//! What a folder of sentence-transformers says about a model besides its transformer.
//!
//! Source: <https://github.com/huggingface/sentence-transformers>, which wrote these files in several versions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value as Json;

use super::layers::Layer;
use super::pooling::{self, Pooling};
use crate::error::{Error, Result, quoted};
use crate::format::{MAX_CONFIG_BYTES, Settings, read_json};

/// The modules of a model, in order, and the settings that go with them.
#[derive(Debug)]
pub(super) struct Modules {
    /// The folder of the transformer and its tokenizer.
    pub transformer: PathBuf,
    pub pooling: PoolingModule,
    /// The modules after the pooling.
    pub layers: Vec<Layer>,
    pub settings: ModelSettings,
}

/// A Pooling module. The results of several poolings are concatenated.
#[derive(Debug)]
pub(super) struct PoolingModule {
    pub path: PathBuf,
    pub modes: Vec<Pooling>,
    /// Width of token vectors, if the module says so.
    d_model: Option<usize>,
    /// Whether the tokens of the prompt count.
    pub include_prompt: bool,
}

/// What the folder says about texts and vectors.
#[derive(Debug, Default)]
pub(super) struct ModelSettings {
    /// The longest sentence in tokens; `usize::MAX` for no limit.
    pub max_tokens: Option<usize>,
    /// How many numbers of each vector to keep.
    pub truncate_dim: Option<usize>,
    #[cfg_attr(not(feature = "tokenizers"), allow(dead_code))]
    pub text: TextSettings,
}

/// What happens to a text before it is tokenized.
#[derive(Debug, Default)]
#[cfg_attr(not(feature = "tokenizers"), allow(dead_code))]
pub(super) struct TextSettings {
    pub lower_case: bool,
    /// Texts to put before others, by name.
    pub prompts: BTreeMap<String, String>,
    pub default_prompt: Option<String>,
}

/// An entry of `modules.json`.
#[derive(Deserialize)]
struct Entry {
    path: String,
    r#type: String,
}

impl Modules {
    /// A pooling, and vectors of length 1.
    pub fn of_pooling(pooling: Pooling) -> Modules {
        Modules {
            transformer: PathBuf::new(),
            pooling: PoolingModule::of_mode(pooling),
            layers: vec![Layer::normalize(Path::new(""))],
            settings: ModelSettings::default(),
        }
    }

    /// Reads `modules.json` and what it lists. Without it, the pooling is that of `1_Pooling`, or the mean if there is
    /// no such folder either.
    pub fn of_folder(dir: &Path) -> Result<Modules> {
        let list = dir.join("modules.json");
        let usual = dir.join("1_Pooling");
        if !list.exists() {
            let pooling = match usual.join("config.json").exists() {
                true => PoolingModule::of_folder(&usual)?,
                false => PoolingModule::of_mode(Pooling::Mean),
            };
            let settings = ModelSettings::of_folder(dir, dir)?;
            return Ok(Modules { transformer: dir.into(), pooling, layers: vec![], settings });
        }
        let entries: Vec<Entry> = read_json(&list, MAX_CONFIG_BYTES)?;
        let refused = |i: usize, expected: &str, got: &str| {
            Err(Error::format(&list, format!("module {i}: expected {expected}, got {}", quoted(got))))
        };
        let (mut transformer, mut pooling, mut layers) = (None, None, vec![]);
        for (i, Entry { path, r#type }) in entries.iter().enumerate() {
            if path.contains(['/', '\\', ':']) || path == ".." {
                return refused(i, "the name of a folder within this one as its path", path);
            }
            // `sentence_transformers.models.Dense`, or a longer path to the same class.
            let class = r#type.strip_prefix("sentence_transformers.").and_then(|rest| rest.rsplit('.').next());
            let module = if path.is_empty() { dir.to_path_buf() } else { dir.join(path) };
            match (class, &transformer, &pooling) {
                (Some("Transformer" | "BERT"), None, None) => transformer = Some(module),
                (_, None, _) => return refused(i, "a Transformer as the first module", r#type),
                (Some("Pooling"), Some(_), None) => pooling = Some(PoolingModule::of_folder(&module)?),
                (_, _, None) => return refused(i, "a Pooling after the Transformer", r#type),
                (Some("Dense"), ..) => layers.push(Layer::dense(&module)?),
                (Some("LayerNorm"), ..) => layers.push(Layer::layer_norm(&module)?),
                (Some("Normalize"), ..) => layers.push(Layer::normalize(&module)),
                (Some("Dropout"), ..) => {} // for training only
                _ => return refused(i, "Dense, LayerNorm, Normalize or Dropout after the Pooling", r#type),
            }
        }
        let (Some(transformer), Some(pooling)) = (transformer, pooling) else {
            let message = format!("expected a Transformer and a Pooling, got {} modules", entries.len());
            return Err(Error::format(list, message));
        };
        let settings = ModelSettings::of_folder(dir, &transformer)?;
        Ok(Modules { transformer, pooling, layers, settings })
    }

    /// The width of the sentence vectors of a transformer of width `d_model`, or an error that names the module that
    /// does not fit those before it.
    pub fn dim(&self, d_model: usize) -> Result<usize> {
        if let Some(got) = self.pooling.d_model.filter(|&got| got != d_model) {
            let message = format!("the width of token vectors: expected {d_model}, as the transformer's, got {got}");
            return Err(Error::format(&self.pooling.path, message));
        }
        let pooled = self.pooling.modes.len() * d_model;
        let dim = self.layers.iter().try_fold(pooled, |dim, layer| layer.width(dim))?;
        Ok(self.settings.truncate_dim.map_or(dim, |n| n.min(dim)))
    }
}

impl Pooling {
    /// The pooling that a model's folder asks for, or the mean if it asks for none: for
    /// [`SentenceEncoder::new`](super::SentenceEncoder::new).
    ///
    /// # Errors
    ///
    /// If the folder asks for more than one pooling, or for modules after it that `new` does not apply, such as Dense.
    /// [`SentenceEncoder::open`](super::SentenceEncoder::open) does.
    pub fn of_folder(dir: &Path) -> Result<Pooling> {
        let modules = Modules::of_folder(dir)?;
        let more = |path: &Path, what: &str| Err(Error::format(path, format!("{what}: use `SentenceEncoder::open`")));
        if let Some(layer) = modules.layers.iter().find(|layer| !layer.normalizes()) {
            return more(&layer.path, "the model is more than its pooling");
        }
        if modules.settings.truncate_dim.is_some() {
            return more(dir, "the model truncates its vectors");
        }
        match (modules.pooling.modes.as_slice(), modules.pooling.include_prompt) {
            (&[pooling], true) => Ok(pooling),
            _ => more(&modules.pooling.path, "expected a single pooling, with the prompt"),
        }
    }
}

impl PoolingModule {
    fn of_mode(pooling: Pooling) -> PoolingModule {
        PoolingModule { path: PathBuf::new(), modes: vec![pooling], d_model: None, include_prompt: true }
    }

    fn of_folder(dir: &Path) -> Result<PoolingModule> {
        let config = Settings::read(&dir.join("config.json"))?;
        let modes = pooling::of_config(&config)?;
        let include_prompt = config.bool("include_prompt")?.unwrap_or(true);
        if !include_prompt && modes.contains(&Pooling::First) {
            // Some versions take the first token after the prompt, others that before it.
            let message = "expected true, since `cls` takes the token before the prompt";
            return Err(config.bad("include_prompt", message));
        }
        let d_model = match config.usize("embedding_dimension")? {
            Some(d_model) => Some(d_model),
            None => config.usize("word_embedding_dimension")?,
        };
        Ok(PoolingModule { path: config.path().into(), modes, d_model, include_prompt })
    }
}

/// Names of the file with a Transformer module's settings. The first that exists counts.
const TRANSFORMER_CONFIGS: [&str; 7] = [
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];

/// Arguments for the tokenizer and the configuration that change nothing here.
const HARMLESS: [&str; 5] = ["trust_remote_code", "revision", "use_fast", "padding_side", "local_files_only"];

/// Arguments for the tokenizer, under the key of newer and of older versions.
const TOKENIZER_ARGS: [&str; 2] = ["processor_kwargs", "tokenizer_args"];

impl ModelSettings {
    fn of_folder(root: &Path, transformer: &Path) -> Result<ModelSettings> {
        let path = TRANSFORMER_CONFIGS.iter().map(|name| transformer.join(name)).find(|path| path.exists());
        let config = Settings::read_if_any(&path.unwrap_or_else(|| transformer.join(TRANSFORMER_CONFIGS[0])))?;
        check_transformer(&config)?;
        // As in sentence-transformers, what is closer to the sentence model takes precedence.
        let mut limits = vec![];
        for group in TOKENIZER_ARGS {
            if let Some(group) = config.object(group)? {
                limits.push(group.limit("model_max_length")?);
            }
        }
        limits.push(config.limit("max_seq_length")?);
        limits.push(Settings::read_if_any(&transformer.join("tokenizer_config.json"))?.limit("model_max_length")?);
        let max_tokens = limits.into_iter().flatten().next();
        let lower_case = config.bool("do_lower_case")?.unwrap_or(false);

        let config = Settings::read_if_any(&root.join("config_sentence_transformers.json"))?;
        config.only_str("model_type", "SentenceTransformer")?;
        let truncate_dim = config.usize("truncate_dim")?;
        if truncate_dim == Some(0) {
            return Err(config.bad("truncate_dim", "expected at least 1, got 0"));
        }
        let (prompts, default_prompt) = prompts(&config)?;
        let text = TextSettings { lower_case, prompts, default_prompt };
        Ok(ModelSettings { max_tokens, truncate_dim, text })
    }
}

/// Returns an error for settings of a Transformer module that would change its vectors in a way not done here.
fn check_transformer(config: &Settings) -> Result<()> {
    config.only_str("transformer_task", "feature-extraction")?;
    config.only_str("module_output_name", "token_embeddings")?;
    if let Some(modalities) = config.object("modality_config")?
        && let Some(text) = modalities.object("text")?
    {
        text.only_str("method", "forward")?;
        text.only_str("method_output_name", "last_hidden_state")?;
    }
    for name in
        ["processor_kwargs", "tokenizer_args", "config_kwargs", "config_args", "processing_kwargs", "query_expansion"]
    {
        let Some(group) = config.object(name)? else { continue };
        let known = |key: &str| match name {
            "processing_kwargs" | "query_expansion" => false,
            _ => HARMLESS.contains(&key) || TOKENIZER_ARGS.contains(&name) && key == "model_max_length",
        };
        if let Some((key, value)) = group.iter().find(|(key, value)| !known(key) && !says_nothing(value)) {
            return Err(group.bad(key, format!("is not supported, got {}", quoted(&value.to_string()))));
        }
    }
    Ok(())
}

/// Whether there are only empty objects in it, which some versions write for each kind of input.
fn says_nothing(value: &Json) -> bool {
    value.is_null() || value.as_object().is_some_and(|object| object.values().all(says_nothing))
}

/// The prompts by name, and the default one's name.
fn prompts(config: &Settings) -> Result<(BTreeMap<String, String>, Option<String>)> {
    // These two names are always there.
    let mut prompts = BTreeMap::from(["query", "document"].map(|name| (name.to_string(), String::new())));
    if let Some(named) = config.object("prompts")? {
        for (name, _) in named.iter() {
            prompts.extend(named.str(name)?.map(|prompt| (name.to_string(), prompt.to_string())));
        }
    }
    let default = config.str("default_prompt_name")?;
    if let Some(name) = default.filter(|name| !prompts.contains_key(*name)) {
        let message = format!("expected the name of a prompt, got {}", quoted(name));
        return Err(config.bad("default_prompt_name", message));
    }
    Ok((prompts, default.map(String::from)))
}
