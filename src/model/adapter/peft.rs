//! The files of Hugging Face's `peft`: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use regex_lite::Regex;
use serde_json::{Map, Value as Json, json};

use super::Adapter;
use super::modules::{Linear, Modules, Pair, Written, last};
use crate::error::{Result, quoted};
use crate::format::{Settings, Stored, StoredTensor, Weights};
use crate::model::layout::transpose;
use crate::model::loaded::Model;
use crate::model::save::{Folder, Saved, layout};
use crate::nn::MAX_RANK;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// What all names of tensors begin with.
const PREFIX: &str = "base_model.model.";

/// Settings that change what is computed, and that this crate does not have.
const UNKNOWN: [&str; 7] = [
    "alora_invocation_tokens",
    "layer_replication",
    "qalora",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "megatron_config",
];

/// The ranks and scales of an `adapter_config.json`.
struct Scales {
    settings: Settings,
    rank: usize,
    alpha: f32,
    rank_stabilized: bool,
    ranks: Vec<(Regex, usize)>,
    alphas: Vec<(Regex, f32)>,
}

/// Reads a folder, or the safetensors file of one.
pub(super) fn read(path: &Path, model: &Model) -> Result<Adapter> {
    let (folder, weights) = match path.is_dir() {
        true => (path, path.join(WEIGHTS)),
        false => (path.parent().unwrap_or(Path::new(".")), path.to_path_buf()),
    };
    from_parts(Settings::read(&folder.join(CONFIG))?, &Weights::open(&weights)?, model)
}

/// Reads both files.
fn from_parts(settings: Settings, weights: &Weights, model: &Model) -> Result<Adapter> {
    let scales = Scales::read(settings)?;
    let modules = Modules::hugging_face(model.config())?;
    let mut adapter = Adapter::empty(weights.path(), model.config(), modules.stack_qkv());
    if let Some((name, ty)) = weights.unread().first() {
        return Err(adapter.bad(format!("tensor {}: cannot read elements of type {ty}", quoted(name))));
    }
    let mut pairs: BTreeMap<String, Pair<'_>> = BTreeMap::new();
    let mut whole = vec![];
    for tensor in weights.iter() {
        let tensor = tensor.stored_as(&[Stored::F32, Stored::F16, Stored::BF16])?;
        let name = tensor.name();
        let inner = name.strip_prefix(PREFIX);
        let inner = inner.ok_or_else(|| adapter.bad(format!("tensor {}: expected `{PREFIX}...`", quoted(name))))?;
        match matrix_of(inner) {
            Some((module, i)) => pairs.entry(module.into()).or_default()[i] = Some(tensor),
            None if inner.contains(".lora_") => {
                return Err(adapter.bad(format!("tensor {}: only LoRA of linear layers can be read", quoted(name))));
            }
            None => whole.push((inner.to_string(), tensor)),
        }
    }
    for (module, pair) in &pairs {
        let same = |linear: &&Linear| linear.theirs == *module || bare(&linear.theirs) == module;
        let Some(linear) = modules.linears.iter().find(same) else {
            let name = pair.iter().flatten().map(|tensor| quoted(tensor.name())).next().unwrap_or_default();
            return Err(adapter.bad(format!("tensor {name}: the model has no linear layer {}", quoted(module))));
        };
        linear.read(&mut adapter, &modules, pair, |rank| scales.scale(module, rank))?;
    }
    for saved in layout(model.config(), modules.names)? {
        let found = whole.iter().position(|(name, _)| *name == saved.name || *name == bare(&saved.name));
        if let Some(i) = found {
            read_whole(&mut adapter, model, &modules, &saved, &whole.swap_remove(i).1)?;
        }
    }
    match whole.first() {
        None => Ok(adapter),
        Some((name, tensor)) => {
            let tensor = quoted(tensor.name());
            Err(adapter.bad(format!("tensor {tensor}: the model has no parameter {}", quoted(name))))
        }
    }
}

/// The module of a low-rank matrix, and which of the two it is.
fn matrix_of(name: &str) -> Option<(&str, usize)> {
    let name = name.strip_suffix(".weight")?;
    let name = name.strip_suffix(".default").unwrap_or(name);
    let (module, matrix) = name.rsplit_once('.')?;
    Some((module, ["lora_A", "lora_B"].iter().position(|known| *known == matrix)?))
}

/// A name in files of a model without its head.
fn bare(name: &str) -> &str {
    ["model.", "transformer."].iter().find_map(|prefix| name.strip_prefix(prefix)).unwrap_or(name)
}

/// Reads a tensor of a module that was trained whole.
fn read_whole(
    adapter: &mut Adapter,
    model: &Model,
    modules: &Modules,
    saved: &Saved,
    tensor: &StoredTensor<'_>,
) -> Result<()> {
    let tensor = tensor.of_shape(&saved.dims[..])?;
    tensor.check_finite()?;
    let mut values = tensor.values()?;
    if saved.transposed {
        values = transpose(&values, saved.dims[1]);
    }
    let width: usize = saved.params.iter().map(|(_, shape)| shape.cols()).sum();
    let mut first = 0;
    for (name, shape) in &saved.params {
        let rows = values.chunks_exact(width).flat_map(|row| &row[first..first + shape.cols()]);
        let values = modules.columns_of_ours(name, rows.copied().collect());
        adapter.add_whole(model, name, values)?;
        first += shape.cols();
    }
    Ok(())
}

impl Scales {
    fn read(settings: Settings) -> Result<Scales> {
        match settings.str("peft_type")? {
            None => return Err(settings.missing("peft_type")),
            Some(_) => settings.only_str("peft_type", "LORA")?,
        }
        settings.only_str("bias", "none")?;
        for key in ["use_dora", "lora_bias", "use_qalora"] {
            settings.only_bool(key, false)?;
        }
        for key in UNKNOWN {
            let nothing = |value: &Json| match value {
                Json::Array(list) => list.is_empty(),
                Json::Object(object) => object.is_empty(),
                value => *value == Json::Bool(false),
            };
            if let Some(value) = settings.get(key).filter(|value| !nothing(value)) {
                return Err(settings.unexpected(key, "nothing, since this crate does not have that", value));
            }
        }
        let rank = settings.usize("r")?.ok_or_else(|| settings.missing("r"))?;
        let alpha = settings.f32("lora_alpha")?.ok_or_else(|| settings.missing("lora_alpha"))?;
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(settings.bad("r", format!("expected from 1 to {MAX_RANK}, got {rank}")));
        }
        if !alpha.is_finite() || alpha == 0.0 {
            return Err(settings.bad("lora_alpha", format!("expected a number other than 0, got {alpha}")));
        }
        Ok(Scales {
            rank_stabilized: settings.bool("use_rslora")?.unwrap_or(false),
            ranks: patterns(&settings, "rank_pattern", |inner, key| inner.usize(key))?,
            alphas: patterns(&settings, "alpha_pattern", |inner, key| inner.f32(key))?,
            settings,
            rank,
            alpha,
        })
    }

    /// The factor of a module's adapter, which has this rank.
    fn scale(&self, module: &str, rank: usize) -> Result<f32> {
        let expected = of_pattern(&self.ranks, module).unwrap_or(self.rank);
        if rank != expected {
            let key = if self.rank == expected { "r" } else { "rank_pattern" };
            let message = format!("{expected} for {}, but its matrices have rank {rank}", quoted(module));
            return Err(self.settings.bad(key, message));
        }
        let alpha = of_pattern(&self.alphas, module).unwrap_or(self.alpha);
        let rank = rank as f32;
        Ok(alpha / if self.rank_stabilized { rank.sqrt() } else { rank })
    }
}

/// The keys of `rank_pattern` or `alpha_pattern`, regular expressions for the ends of names, and their values.
fn patterns<T>(
    settings: &Settings,
    field: &str,
    read: impl Fn(&Settings, &str) -> Result<Option<T>>,
) -> Result<Vec<(Regex, T)>> {
    let Some(inner) = settings.object(field)? else { return Ok(vec![]) };
    let mut found = vec![];
    for (key, _) in inner.iter() {
        // As in `peft`: from the start of a name, or of one of its parts.
        let regex = Regex::new(&format!(r"^(?:(.*\.)?({key})$)")).map_err(|e| inner.bad(key, e))?;
        if let Some(value) = read(&inner, key)? {
            found.push((regex, value));
        }
    }
    Ok(found)
}

fn of_pattern<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(regex, _)| regex.is_match(module)).map(|(_, value)| *value)
}

impl Adapter {
    /// Writes a folder that Hugging Face's `peft` loads, and [`open`](Self::open) too. `base` is what it says of the
    /// model: a name on Hugging Face's hub, or a path.
    ///
    /// Tensors are f32. Both files are put in place atomically, once both are on the disk.
    ///
    /// # Errors
    ///
    /// If no architecture of Hugging Face has the parts of the model, if q, k and v are one layer in its files but not
    /// in the [settings](crate::nn::Lora::shared_qkv), or if a file cannot be written.
    pub fn save_peft(&self, dir: &Path, base: &str) -> Result<()> {
        let modules = Modules::hugging_face(&self.config)?;
        let (mut tensors, mut adapted) = (vec![], vec![]);
        for linear in &modules.linears {
            let Some(Written { rank, scale, a, b, d_out }) = linear.write(self, &modules)? else { continue };
            let name = |matrix: &str| format!("{PREFIX}{}.{matrix}.weight", linear.theirs);
            tensors.push((name("lora_A"), vec![rank, linear.d_in], a));
            tensors.push((name("lora_B"), vec![d_out, rank], b));
            adapted.push((&linear.theirs[..], rank, scale));
        }
        let mut whole = BTreeSet::new();
        for saved in layout(&self.config, modules.names)? {
            let values: Vec<_> = saved.params.iter().filter_map(|(name, _)| self.whole.get(name)).cloned().collect();
            if values.is_empty() {
                continue;
            }
            if values.len() < saved.params.len() {
                return Err(self.bad(format!("{} is trained in part", quoted(&saved.name))));
            }
            let module = saved.name.rsplit_once('.').map_or(&saved.name[..], |(module, _)| module);
            whole.insert(module.to_string());
            let values = saved.assemble(&self.config, values);
            tensors.push((format!("{PREFIX}{}", saved.name), saved.dims, values));
        }
        let mut folder = Folder::new(dir);
        let described = tensors.iter().map(|(name, dims, _)| (name.clone(), dims.clone()));
        let mut weights = folder.start(WEIGHTS, described)?;
        tensors.iter().try_for_each(|(.., values)| weights.write(bytemuck::cast_slice(values)))?;
        folder.files.push(weights);
        folder.add_json(CONFIG, &config_json(base, &modules, &adapted, &whole))?;
        folder.commit()
    }
}

/// The configuration of these adapted modules, with rank and scale of each.
fn config_json(base: &str, modules: &Modules, adapted: &[(&str, usize, f32)], whole: &BTreeSet<String>) -> Json {
    let (rank, scale) = adapted.first().map_or((8, 1.0), |(_, rank, scale)| (*rank, *scale));
    let is_adapted = |name: &str| adapted.iter().any(|(module, ..)| *module == name);
    let mut targets = BTreeSet::new();
    let (mut ranks, mut alphas) = (Map::new(), Map::new());
    for (module, own, factor) in adapted {
        // A last name stands for all that have it.
        let others = modules.linears.iter().filter(|linear| last(&linear.theirs) == last(module));
        let everywhere = others.into_iter().all(|linear| is_adapted(&linear.theirs));
        targets.insert(if everywhere { last(module) } else { module });
        if *own != rank {
            ranks.insert(module.replace('.', r"\."), json!(own));
        }
        let alpha = factor * *own as f32;
        if alpha != scale * rank as f32 {
            alphas.insert(module.replace('.', r"\."), json!(alpha));
        }
    }
    json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": true,
        "r": rank,
        "lora_alpha": scale * rank as f32,
        "lora_dropout": 0.0,
        "use_rslora": false,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": modules.names.input_major,
        "target_modules": targets,
        "modules_to_save": if whole.is_empty() { Json::Null } else { json!(whole) },
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    })
}
