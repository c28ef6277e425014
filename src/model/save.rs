//! Saving a model as a folder that PyTorch loads.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Value as Json, json};

use super::companions::{Companions, is_same};
use super::layout::{beside, halves, is_linear, is_rotated, transpose};
use super::loaded::{Model, parameters};
use super::names::Names;
use super::to_hugging_face;
use crate::device::{Gpu, PIECE, Tensor, pieces, read_part};
use crate::error::{Error, Result};
use crate::files::NewFile;
use crate::format::safetensors_start;
use crate::nn::{TransformerConfig, rows_of_part, table_of_part};
use crate::optim::Arena;
use crate::tensor::Shape;

/// Saves a model in Hugging Face's layout, as `config.json` and `model.safetensors` in f32. PyTorch's `transformers`
/// and [`Model::open`](super::Model::open) both load the folder.
///
/// Use it to publish or evaluate what was trained here. `params` are names and values as in a trainer's arena. To save
/// without all values in host memory, see [`save_arena`] and [`save_with`]; for a model that was loaded,
/// [`Model::save`], which keeps its tokenizer.
///
/// Files are put in place atomically, and only once all of them are on the disk. If two threads save to one folder,
/// each file is whole, and one of theirs.
///
/// # Errors
///
/// If no architecture of Hugging Face has all parts of the model (see the table of [`crate::model`]), or if a file
/// cannot be written.
///
/// ```
/// use throughline::model;
/// use throughline::model::Model;
/// use throughline::nn::TransformerConfig;
/// use throughline::optim::ArenaLayout;
///
/// let config = TransformerConfig::gpt2(65, 32, 2, 48, 4);
/// let layout = ArenaLayout::of_model(&config, u64::MAX)?;
/// let params = layout.tensors.into_iter().map(|(name, shape)| (name, vec![0.5; shape.len()]));
/// let dir = std::env::temp_dir().join(format!("doc-model-{}", std::process::id()));
/// model::save(&dir, &config, &params.collect::<Vec<_>>())?;
/// assert_eq!(Model::open(&dir)?.config(), &config);
/// # std::fs::remove_dir_all(dir).unwrap();
/// # Ok::<(), throughline::Error>(())
/// ```
pub fn save(dir: &Path, config: &TransformerConfig, params: &[(String, Vec<f32>)]) -> Result<()> {
    save_with(dir, config, |name| {
        let parts = params.iter().filter(|(part, _)| table_of_part(part).0 == name);
        Ok(parts.flat_map(|(_, values)| values).copied().collect())
    })
}

/// [`save`], asking for the values of one parameter after another: for those of a
/// [`Checkpoint`](crate::train::checkpoint::Checkpoint::values), say. Only one at a time is in host memory.
pub fn save_with(dir: &Path, config: &TransformerConfig, values: impl FnMut(&str) -> Result<Vec<f32>>) -> Result<()> {
    let (json, names) = to_hugging_face::write(config)?;
    let mut folder = Folder::new(dir);
    folder.add_values(config, &layout(config, names)?, values)?;
    folder.add_json("config.json", &json)?;
    folder.commit()
}

/// [`save`] for parameters on the device, such as those of a [`Trainer`](crate::train::Trainer). They go to the file
/// piece by piece.
///
/// Resolves once the device has been polled, several times for a large model. Until then, submit nothing that changes
/// the parameters. Outside of frames, use [`save_arena_blocking`].
pub async fn save_arena(dir: &Path, config: &TransformerConfig, gpu: &Gpu, params: &Arena) -> Result<()> {
    let (json, names) = to_hugging_face::write(config)?;
    let tensors = layout(config, names)?;
    let mut folder = Folder::new(dir);
    folder.add_weights(config, &tensors, gpu, params).await?;
    folder.add_json("config.json", &json)?;
    folder.commit()
}

/// [`save_arena`], waiting for the GPU.
pub fn save_arena_blocking(dir: &Path, config: &TransformerConfig, gpu: &Gpu, params: &Arena) -> Result<()> {
    gpu.run_blocking(save_arena(dir, config, gpu, params))
}

impl Model {
    /// Saves this model with other parameters, those of a trainer that it was loaded into: the last step of
    /// fine-tuning.
    ///
    /// The folder has all that the original has besides its weights: of a folder, the whole configuration, the files of
    /// its tokenizer, chat templates and settings for generating; of a GGUF file, the same made from its metadata. So
    /// the result ends its turns and chats as the original does, here and in `transformers`. It may be the original's
    /// own folder. Weights are f32, in `model.safetensors`.
    ///
    /// Parameters go to the file piece by piece. Resolves once the device has been polled, several times for a large
    /// model; until then, submit nothing that changes them. Outside of frames, use
    /// [`save_blocking`](Self::save_blocking).
    ///
    /// # Errors
    ///
    /// If the arena has other tensors than the model; if `dir` has a tokenizer or a template that the model would lack,
    /// left by another one; or if a file cannot be written. The tokenizer of a GGUF file needs the feature
    /// `tokenizers`: without it, [`save_arena`] saves all but that.
    ///
    /// ```
    /// use throughline::model::Model;
    /// use throughline::train::{TrainConfig, TrainOptions, Trainer};
    /// use throughline::Gpu;
    ///
    /// # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
    /// # let (folder, out) = (doctest::qwen3(), tempfile::tempdir().unwrap());
    /// let model = Model::open(folder.path())?;
    /// let gpu = Gpu::headless_blocking()?;
    /// let config = TrainConfig { seq_len: Some(8), ..TrainConfig::new(model.config().clone(), 1) };
    /// let options = TrainOptions { init: false, ..TrainOptions::default() };
    /// let trainer = Trainer::with_options_blocking(&gpu, config, &options)?;
    /// model.load_blocking(&gpu, trainer.params())?;
    /// // Some steps later:
    /// model.save_blocking(out.path(), &gpu, trainer.params())?;
    /// assert_eq!(Model::open(out.path())?.config(), model.config());
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub async fn save(&self, dir: &Path, gpu: &Gpu, params: &Arena) -> Result<()> {
        let (mut folder, tensors, rest) = self.start_folder(dir)?;
        folder.add_weights(self.config(), &tensors, gpu, params).await?;
        rest.finish(folder)
    }

    /// [`save`](Self::save) with some values of your own, asked for one parameter after another by our names. For `None`
    /// the model's own are written. Only one parameter at a time is in host memory.
    ///
    /// Use it to write a model with an [adapter](super::Adapter::merged) in it. Errors are those of `save`, and those of
    /// `values`.
    ///
    /// ```no_run
    /// # fn main() -> throughline::Result<()> {
    /// use throughline::model::{Adapter, Model};
    /// let model = Model::open("SmolLM2-135M-Instruct.Q4_1.gguf".as_ref())?;
    /// let adapter = Adapter::open("pirate".as_ref(), &model)?;
    /// model.save_merged("pirate-merged".as_ref(), |name| adapter.merged(&model, name))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn save_merged(&self, dir: &Path, mut values: impl FnMut(&str) -> Result<Option<Vec<f32>>>) -> Result<()> {
        let (mut folder, tensors, rest) = self.start_folder(dir)?;
        let all = |name: &str| values(name)?.map_or_else(|| self.values(name), Ok);
        folder.add_values(self.config(), &tensors, all)?;
        rest.finish(folder)
    }

    /// The folder that the model is saved to, its tensors, and what follows them.
    fn start_folder(&self, dir: &Path) -> Result<(Folder, Vec<Saved>, Rest)> {
        let config = self.config();
        let (json, names) = match self.weights().config() {
            Some(json) => (in_f32(json, config), self.names),
            None => to_hugging_face::write(config)?,
        };
        let companions = Companions::of(self)?;
        companions.check_strangers(self, dir)?;
        let json = companions.with_ends(json);
        Ok((Folder::new(dir), layout(config, names)?, Rest { json, companions }))
    }

    /// [`save`](Self::save), waiting for the GPU.
    pub fn save_blocking(&self, dir: &Path, gpu: &Gpu, params: &Arena) -> Result<()> {
        gpu.run_blocking(self.save(dir, gpu, params))
    }
}

/// A tensor of a file, and the parameters in it.
pub(super) struct Saved {
    pub name: String,
    pub dims: Vec<usize>,
    /// One, or the three thirds from left to right.
    pub params: Vec<(String, Shape)>,
    pub transposed: bool,
}

impl Saved {
    /// Its elements, from those of its parameters.
    pub fn assemble(&self, config: &TransformerConfig, values: Vec<Vec<f32>>) -> Vec<f32> {
        let params = self.params.iter().zip(values);
        let params = params.map(|((name, shape), values)| (shape.cols(), halves(config, name, values)));
        let (cols, whole) = params
            .reduce(|(a_cols, a), (b_cols, b)| (a_cols + b_cols, beside(&a, a_cols, &b, b_cols)))
            .unwrap_or((1, vec![]));
        if self.transposed { transpose(&whole, cols) } else { whole }
    }

    /// Whether it has the elements of its only parameter as they are.
    fn is_plain(&self, config: &TransformerConfig) -> bool {
        let rotated = self.params.iter().any(|(name, _)| is_rotated(config, name));
        self.params.len() == 1 && !self.transposed && !rotated
    }
}

/// The tensors of a model's file, by the usual names.
pub(super) fn layout(config: &TransformerConfig, names: &Names) -> Result<Vec<Saved>> {
    let mut tensors: Vec<Saved> = vec![];
    for (name, shape) in parameters(config)? {
        let place = names.place(&name, false);
        let place = place.ok_or_else(|| Error::data(&name, "a parameter that such files have", "another one"))?;
        let transposed = shape.rank() == 2 && is_linear(&name) && !names.input_major;
        match tensors.iter_mut().find(|tensor| tensor.name == place.tensor) {
            // The second and third thirds go next to what is already there: q, k and v come in this order.
            Some(tensor) => {
                let last = tensor.dims.len() - 1;
                tensor.dims[last] += shape.cols();
                tensor.params.push((name, shape));
            }
            None => {
                let dims = if transposed { vec![shape.cols(), shape.rows()] } else { shape.dims().to_vec() };
                tensors.push(Saved { name: place.tensor, dims, params: vec![(name, shape)], transposed });
            }
        }
    }
    Ok(tensors)
}

/// What a model's folder has besides its weights.
struct Rest {
    json: Json,
    companions: Companions,
}

impl Rest {
    fn finish(self, mut folder: Folder) -> Result<()> {
        folder.add_json("config.json", &self.json)?;
        folder.add_companions(&self.companions)?;
        folder.commit()
    }
}

/// A model's folder in the making.
pub(super) struct Folder {
    dir: PathBuf,
    pub files: Vec<NewFile>,
}

impl Folder {
    pub fn new(dir: &Path) -> Self {
        Folder { dir: dir.into(), files: vec![] }
    }

    fn add(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut file = NewFile::create(&self.dir.join(name))?;
        file.write(bytes)?;
        self.files.push(file);
        Ok(())
    }

    pub fn add_json(&mut self, name: &str, json: &Json) -> Result<()> {
        self.add(name, format!("{json:#}\n").as_bytes())
    }

    /// The file of these tensors, up to their data: the first one of the folder, which is made for it.
    fn start_weights(&self, tensors: &[Saved]) -> Result<NewFile> {
        self.start("model.safetensors", tensors.iter().map(|tensor| (tensor.name.clone(), tensor.dims.clone())))
    }

    /// A safetensors file of f32 tensors of these names and dimensions, up to their data. The folder is made for it.
    pub fn start(&self, name: &str, tensors: impl Iterator<Item = (String, Vec<usize>)>) -> Result<NewFile> {
        fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir))?;
        let path = self.dir.join(name);
        let described = tensors.map(|(name, dims)| (name, Dtype::F32, dims));
        let metadata = HashMap::from([("format".into(), "pt".into())]);
        let start = safetensors_start(described, metadata).map_err(|e| Error::format(&path, e))?;
        let mut file = NewFile::create(&path)?;
        file.write(&start)?;
        Ok(file)
    }

    /// Adds the weights, asking for the values of one parameter after another.
    fn add_values(
        &mut self,
        config: &TransformerConfig,
        tensors: &[Saved],
        mut values: impl FnMut(&str) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let mut weights = self.start_weights(tensors)?;
        for tensor in tensors {
            let values = tensor.params.iter().map(|(name, shape)| {
                let values = values(name)?;
                match values.len() == shape.len() {
                    true => Ok(values),
                    false => Err(Error::data(name, format!("{} values for {shape}", shape.len()), values.len())),
                }
            });
            weights.write(bytemuck::cast_slice(&tensor.assemble(config, values.collect::<Result<_>>()?)))?;
        }
        self.files.push(weights);
        Ok(())
    }

    async fn add_weights(
        &mut self,
        config: &TransformerConfig,
        tensors: &[Saved],
        gpu: &Gpu,
        params: &Arena,
    ) -> Result<()> {
        let found = tensors.iter().flat_map(|tensor| &tensor.params).map(|(name, shape)| find(params, name, shape));
        let mut found = found.collect::<Result<Vec<_>>>()?.into_iter();
        let mut weights = self.start_weights(tensors)?;
        for tensor in tensors {
            let plain = tensor.is_plain(config);
            let mut values = vec![];
            for parts in found.by_ref().take(tensor.params.len()) {
                let mut all = vec![];
                for part in parts {
                    for piece in pieces(0..part.ty().len(), PIECE) {
                        let piece = read_part(gpu, part, piece).await?;
                        match plain {
                            true => weights.write(bytemuck::cast_slice(&piece))?,
                            false => all.extend(piece),
                        }
                    }
                }
                values.push(all);
            }
            if !plain {
                weights.write(bytemuck::cast_slice(&tensor.assemble(config, values)))?;
            }
        }
        self.files.push(weights);
        Ok(())
    }

    fn add_companions(&mut self, companions: &Companions) -> Result<()> {
        match companions {
            Companions::Made(files) => files.iter().try_for_each(|(name, json)| self.add_json(name, json)),
            Companions::Files { folder, .. } if is_same(folder, &self.dir) => Ok(()),
            Companions::Files { folder, names } => {
                for name in names {
                    let (from, to) = (folder.join(name), self.dir.join(name));
                    let parent = to.parent().unwrap_or(&self.dir);
                    fs::create_dir_all(parent).map_err(Error::io(parent))?;
                    let mut file = NewFile::create(&to)?;
                    file.write_all_of(&from, &mut File::open(&from).map_err(Error::io(&from))?)?;
                    self.files.push(file);
                }
                Ok(())
            }
        }
    }

    /// Puts all files in their places, once the disk has them.
    pub fn commit(mut self) -> Result<()> {
        self.files.iter_mut().try_for_each(NewFile::sync)?;
        self.files.into_iter().try_for_each(NewFile::commit)
    }
}

/// The tensors of a parameter in an arena: itself, or the parts of a table from its first row on.
fn find<'a>(params: &'a Arena, name: &str, shape: &Shape) -> Result<Vec<&'a Tensor>> {
    let (mut parts, mut row) = (vec![], 0);
    for ((part, ty), tensor) in params.layout.tensors.iter().zip(&params.tensors) {
        if table_of_part(part).0 != name {
            continue;
        }
        let rows = rows_of_part(part, ty, shape).filter(|rows| rows.start == row);
        row = rows.ok_or_else(|| Error::data(part, format!("{shape}, or rows of it from {row} on"), ty))?.end;
        parts.push(tensor);
    }
    match row == shape.rows() {
        true => Ok(parts),
        false => Err(Error::data(name, format!("{} rows in the arena", shape.rows()), row)),
    }
}

/// A configuration as it was, but for what it says of the type of the weights, and of a head that some leave to the
/// reader to find.
fn in_f32(json: &Json, config: &TransformerConfig) -> Json {
    let mut json = json.clone();
    if let Some(fields) = json.as_object_mut() {
        fields.remove("quantization_config");
        if !config.bidirectional {
            fields.insert("tie_word_embeddings".into(), config.tied_head.into());
        }
        let key = if fields.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        fields.insert(key.into(), json!("float32"));
        if key == "dtype" {
            fields.remove("torch_dtype");
        }
    }
    json
}
