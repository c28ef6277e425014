//! What a folder of sentence-transformers says about a model besides its transformer.
//!
//! Source: <https://github.com/huggingface/sentence-transformers>, which wrote these files in several versions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::json::{metadata, optional_metadata, read_object};
use super::layers::Layer;
use super::pooling::{self, Pooling};
use crate::error::{Error, Result, quoted};
use crate::format::{MAX_CONFIG_BYTES, MetaValue, Metadata, read_json};

/// The modules of a model, in order, and the settings that go with them.
#[derive(Debug)]
pub(super) struct Modules {
    /// The folder of the transformer and its tokenizer.
    pub transformer: PathBuf,
    pub pooling: PoolingModule,
    /// The modules after the pooling.
    pub layers: Vec<Layer>,
    pub settings: Settings,
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
pub(super) struct Settings {
    /// The longest sentence in tokens.
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
            settings: Settings::default(),
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
            let settings = Settings::of_folder(dir, dir)?;
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
        let settings = Settings::of_folder(dir, &transformer)?;
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
        let path = dir.join("config.json");
        let config = metadata(&path, &read_object(&path)?)?;
        let modes = pooling::of_config(&path, &config)?;
        let include_prompt = config.optional("include_prompt", Metadata::bool)?.unwrap_or(true);
        if !include_prompt && modes.contains(&Pooling::First) {
            // Some versions take the first token after the prompt, others that before it.
            let message = "include_prompt: expected true, since `cls` takes the token before the prompt";
            return Err(Error::format(path, message));
        }
        let d_model = match config.optional("embedding_dimension", Metadata::usize)? {
            Some(d_model) => Some(d_model),
            None => config.optional("word_embedding_dimension", Metadata::usize)?,
        };
        Ok(PoolingModule { path, modes, d_model, include_prompt })
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

/// Settings of these, and the values that they may have: another one would change the vectors.
const ONLY: [(&str, &str); 4] = [
    ("transformer_task", "feature-extraction"),
    ("module_output_name", "token_embeddings"),
    ("modality_config.text.method", "forward"),
    ("modality_config.text.method_output_name", "last_hidden_state"),
];

/// Arguments for the tokenizer and the configuration that change nothing here.
const HARMLESS: [&str; 5] = ["trust_remote_code", "revision", "use_fast", "padding_side", "local_files_only"];

impl Settings {
    fn of_folder(root: &Path, transformer: &Path) -> Result<Settings> {
        let path = TRANSFORMER_CONFIGS.iter().map(|name| transformer.join(name)).find(|path| path.exists());
        let path = path.unwrap_or_else(|| transformer.join(TRANSFORMER_CONFIGS[0]));
        let config = optional_metadata(&path)?;
        check_transformer(&path, &config)?;
        let tokenizer_path = transformer.join("tokenizer_config.json");
        let tokenizer = optional_metadata(&tokenizer_path)?;
        // As in sentence-transformers, what is closer to the sentence model takes precedence.
        let mut max_tokens = None;
        for (path, config, key) in [
            (&path, &config, "processor_kwargs.model_max_length"),
            (&path, &config, "tokenizer_args.model_max_length"),
            (&path, &config, "max_seq_length"),
            (&tokenizer_path, &tokenizer, "model_max_length"),
        ] {
            if max_tokens.is_none() && config.contains(key) {
                max_tokens = Some(limit(path, config, key)?);
            }
        }
        let lower_case = config.optional("do_lower_case", Metadata::bool)?.unwrap_or(false);

        let path = root.join("config_sentence_transformers.json");
        let config = optional_metadata(&path)?;
        if let Some(other) = config.optional("model_type", Metadata::str)?.filter(|&ty| ty != "SentenceTransformer") {
            let message = format!("model_type: expected SentenceTransformer, got {}", quoted(other));
            return Err(Error::format(path, message));
        }
        let truncate_dim = config.optional("truncate_dim", Metadata::usize)?;
        if truncate_dim == Some(0) {
            return Err(Error::format(path, "truncate_dim: expected at least 1, got 0"));
        }
        let (prompts, default_prompt) = prompts(&path, &config)?;
        let text = TextSettings { lower_case, prompts, default_prompt };
        Ok(Settings { max_tokens: max_tokens.flatten(), truncate_dim, text })
    }
}

/// Returns an error for settings of a Transformer module that would change its vectors in a way not done here.
fn check_transformer(path: &Path, config: &Metadata) -> Result<()> {
    for (key, expected) in ONLY {
        if let Some(got) = config.optional(key, Metadata::str)?.filter(|&got| got != expected) {
            return Err(Error::format(path, format!("{key}: expected `{expected}`, got {}", quoted(got))));
        }
    }
    for (key, value) in config.iter() {
        let Some((group, setting)) = key.split_once('.') else { continue };
        let known = match group {
            "processor_kwargs" | "tokenizer_args" => setting == "model_max_length" || HARMLESS.contains(&setting),
            "config_kwargs" | "config_args" => HARMLESS.contains(&setting),
            "processing_kwargs" | "query_expansion" => false,
            _ => true,
        };
        if !known {
            let message = format!("{}: is not supported, got {}", quoted(key), value.summary());
            return Err(Error::format(path, message));
        }
    }
    Ok(())
}

/// Numbers from here on mean "no limit": `transformers` writes 1e30.
const NO_LIMIT: f32 = 1e9;

/// A number of tokens; `None` for no limit.
fn limit(path: &Path, config: &Metadata, key: &str) -> Result<Option<usize>> {
    match config.f32(key)? {
        n if n >= NO_LIMIT => Ok(None),
        n if n >= 1.0 => Ok(Some(n as usize)),
        n => Err(Error::format(path, format!("{key}: expected at least 1, got {n}"))),
    }
}

/// The prompts by name, and the default one's name.
fn prompts(path: &Path, config: &Metadata) -> Result<(BTreeMap<String, String>, Option<String>)> {
    if let Some(other) = config.get("prompts") {
        return Err(Error::format(path, format!("prompts: expected an object, got {}", other.summary())));
    }
    // These two names are always there.
    let mut prompts = BTreeMap::from(["query", "document"].map(|name| (name.to_string(), String::new())));
    for (key, value) in config.iter() {
        let Some(name) = key.strip_prefix("prompts.") else { continue };
        let MetaValue::String(prompt) = value else {
            let message = format!("{}: expected a text, got {}", quoted(key), value.summary());
            return Err(Error::format(path, message));
        };
        prompts.insert(name.into(), prompt.clone());
    }
    let default = config.optional("default_prompt_name", Metadata::str)?;
    if let Some(name) = default.filter(|name| !prompts.contains_key(*name)) {
        let message = format!("default_prompt_name: expected the name of a prompt, got {}", quoted(name));
        return Err(Error::format(path, message));
    }
    Ok((prompts, default.map(String::from)))
}
