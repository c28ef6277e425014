//! Arenas in safetensors files: written and read piece by piece, with names and shapes checked.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;

use super::arena::Arena;
use crate::device::{Executable, Gpu, PIECE, PIECE_BYTES, Tensor, Uploads, pieces, read_part};
use crate::error::{Error, Result, quoted};
use crate::files::NewFile;
use crate::format::{Stored, StoredTensor, Weights, safetensors_start};
use crate::graph::Source;
use crate::nn::{rows_of_part, table_of_part};
use crate::tensor::Shape;

/// What the names of an optimiser's tensors begin with, in files that have them.
pub(crate) const OPTIMIZER: &str = "optimizer.";

/// An arena, and what the names of its tensors begin with in a file.
pub(crate) type Named<'a> = (&'static str, &'a Arena);

/// A tensor of a file: one of an arena's, or a table that is in parts there. Files do not contain parts, which another
/// device may not need.
struct Table<'a> {
    name: String,
    dims: Vec<usize>,
    parts: Vec<&'a Tensor>,
}

impl<'a> Table<'a> {
    /// Its elements, in order: ranges of tensors.
    fn pieces(&self) -> impl Iterator<Item = (&'a Tensor, Range<usize>)> + use<'a, '_> {
        self.parts.iter().flat_map(|&part| pieces(0..part.ty().len(), PIECE).map(move |piece| (part, piece)))
    }
}

/// What is in arenas, under the names that it has in a file.
fn tables<'a>(arenas: &[Named<'a>]) -> Vec<Table<'a>> {
    let mut tables: Vec<Table<'a>> = vec![];
    for (prefix, arena) in arenas {
        for ((name, shape), tensor) in arena.layout.tensors.iter().zip(&arena.tensors) {
            let (table, first) = table_of_part(name);
            let name = format!("{prefix}{table}");
            // The parts of a table follow each other.
            match tables.last_mut().filter(|whole| first > 0 && whole.name == name) {
                Some(whole) => {
                    whole.dims[0] += shape.rows();
                    whole.parts.push(tensor);
                }
                None => tables.push(Table { name, dims: shape.dims().to_vec(), parts: vec![tensor] }),
            }
        }
    }
    tables
}

/// A file up to its data: names, shapes and metadata.
pub(crate) fn start_of(
    metadata: HashMap<String, String>,
    tensors: impl Iterator<Item = (String, Vec<usize>)>,
) -> Result<Vec<u8>, String> {
    safetensors_start(tensors.map(|(name, dims)| (name, Dtype::F32, dims)), metadata)
}

fn start(metadata: HashMap<String, String>, tables: &[Table<'_>]) -> Result<Vec<u8>, String> {
    start_of(metadata, tables.iter().map(|table| (table.name.clone(), table.dims.clone())))
}

/// Writes arenas to a file, as they are after everything submitted so far. Dropped half-way, it leaves the old file as
/// it was, as an error does.
pub(crate) async fn save(
    gpu: &Gpu,
    path: &Path,
    metadata: HashMap<String, String>,
    arenas: &[Named<'_>],
) -> Result<()> {
    let tables = tables(arenas);
    let start = start(metadata, &tables).map_err(|e| Error::format(path, e))?;
    let mut file = NewFile::create(path)?;
    file.write(&start)?;
    for (tensor, piece) in tables.iter().flat_map(Table::pieces) {
        file.write(bytemuck::cast_slice(&read_part(gpu, tensor, piece).await?))?;
    }
    file.commit()
}

/// The bytes of that file. `what` describes it in messages.
pub(crate) async fn to_bytes(
    gpu: &Gpu,
    what: &str,
    metadata: HashMap<String, String>,
    arenas: &[Named<'_>],
) -> Result<Vec<u8>> {
    let tables = tables(arenas);
    let mut file = start(metadata, &tables).map_err(|e| Error::data(what, "a state that can be saved", e))?;
    for (tensor, piece) in tables.iter().flat_map(Table::pieces) {
        file.extend_from_slice(bytemuck::cast_slice(&read_part(gpu, tensor, piece).await?));
    }
    Ok(file)
}

/// Fills arenas from a file. Tensors of an optimiser that no arena asks for are left out. All others must be in one of
/// the arenas; `whose` says what they would have to be part of.
///
/// # Errors
///
/// If a tensor is missing, has another shape, or is in no arena: then nothing has been written. If the file cannot be
/// read to its end, some of the tensors have been.
pub(crate) async fn restore(gpu: &Gpu, file: &Weights, arenas: &[Named<'_>], whose: &str) -> Result<()> {
    let found = arenas.iter().map(|(prefix, arena)| find(file, prefix, of_arena(arena)));
    let found = found.collect::<Result<Vec<_>>>()?;
    let known: Vec<String> = tables(arenas).into_iter().map(|table| table.name).collect();
    let mut names = file.iter().map(|tensor| tensor.name()).chain(file.unread().iter().map(|(name, _)| &name[..]));
    if let Some(name) = names.find(|name| !name.starts_with(OPTIMIZER) && !known.iter().any(|k| k == name)) {
        return Err(Error::format(file.path(), format!("tensor {} is not one of the {whose}", quoted(name))));
    }
    let mut uploads = Uploads::new(gpu);
    for ((_, arena), parts) in arenas.iter().zip(found) {
        write(&mut uploads, &arena.tensors, &parts).await?;
    }
    uploads.finish()
}

/// Fills an arena with the tensors of its names, whatever else there is in the file.
pub(crate) async fn restore_some(gpu: &Gpu, file: &Weights, arena: &Arena) -> Result<()> {
    let found = find(file, "", of_arena(arena))?;
    let mut uploads = Uploads::new(gpu);
    write(&mut uploads, &arena.tensors, &found).await?;
    uploads.finish()
}

/// Names and shapes of the tensors of an arena.
fn of_arena(arena: &Arena) -> impl Iterator<Item = (&str, &Shape)> {
    arena.layout.tensors.iter().map(|(name, shape)| (&name[..], shape))
}

/// The stored tensor of each of these, its shape checked, and the first byte in it.
fn find<'a, 'b>(
    file: &'a Weights,
    prefix: &str,
    tensors: impl Iterator<Item = (&'b str, &'b Shape)>,
) -> Result<Vec<(StoredTensor<'a>, usize)>> {
    let mut found = vec![];
    for (name, shape) in tensors {
        let stored = file.get(&format!("{prefix}{}", table_of_part(name).0))?.stored_as(&[Stored::F32])?;
        let rows = rows_of_part(name, shape, stored.shape()).ok_or_else(|| {
            let message = format!("tensor {} has shape {}, expected {shape}", quoted(stored.name()), stored.shape());
            Error::format(file.path(), message)
        })?;
        found.push((stored, 4 * rows.start * shape.cols()));
    }
    Ok(found)
}

/// Writes what [`find`] has found for these tensors.
async fn write(uploads: &mut Uploads, tensors: &[Tensor], found: &[(StoredTensor<'_>, usize)]) -> Result<()> {
    for (tensor, (stored, start)) in tensors.iter().zip(found) {
        for piece in pieces(0..4 * tensor.ty().len(), PIECE_BYTES) {
            let bytes = stored.part(start + piece.start..start + piece.end)?;
            uploads.write(tensor, piece.start, &bytes).await?;
        }
    }
    Ok(())
}

impl Arena {
    /// Saves all tensors, as they are after everything submitted so far, as a safetensors file: under their names, in
    /// f32, for [`load`](Self::load) or any other program. The file appears whole or not at all.
    ///
    /// Resolves once the device has been polled, several times for a large arena. Until then, submit nothing that
    /// changes it. Outside of frames, use [`save_blocking`](Self::save_blocking).
    pub async fn save(&self, gpu: &Gpu, path: impl AsRef<Path>) -> Result<()> {
        save(gpu, path.as_ref(), HashMap::new(), &[("", self)]).await
    }

    /// [`save`](Self::save), waiting for the GPU.
    pub fn save_blocking(&self, gpu: &Gpu, path: impl AsRef<Path>) -> Result<()> {
        gpu.run_blocking(self.save(gpu, path))
    }

    /// Loads all tensors from a safetensors file, by name. Resolves once the device has been polled, several times for
    /// a large arena; outside of frames, use [`load_blocking`](Self::load_blocking).
    ///
    /// # Errors
    ///
    /// If a tensor is missing, has another shape, is not stored in f32, or is not one of the arena's: then nothing has
    /// been written. The moments in a checkpoint may be there; they are left out.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use throughline::Gpu;
    /// use throughline::optim::{Arena, ArenaLayout};
    ///
    /// let gpu = Gpu::headless_blocking()?;
    /// let layout = |rows| ArenaLayout::new(vec![("w".into(), [rows, 8].into())], gpu.profile().max_tensor_bytes());
    /// let arena = Arena::zeros(&gpu, "weights", &Arc::new(layout(4)?))?;
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let path = dir.path().join("weights.safetensors");
    /// arena.save_blocking(&gpu, &path)?;
    /// arena.load_blocking(&gpu, &path)?;
    ///
    /// let other = Arena::zeros(&gpu, "weights", &Arc::new(layout(5)?))?;
    /// let error = other.load_blocking(&gpu, &path).unwrap_err().to_string();
    /// assert!(error.contains("tensor `w` has shape [4, 8], expected [5, 8]"), "{error}");
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub async fn load(&self, gpu: &Gpu, path: impl AsRef<Path>) -> Result<()> {
        restore(gpu, &Weights::open(path.as_ref())?, &[("", self)], "arena's").await
    }

    /// [`load`](Self::load), waiting for the GPU.
    pub fn load_blocking(&self, gpu: &Gpu, path: impl AsRef<Path>) -> Result<()> {
        gpu.run_blocking(self.load(gpu, path))
    }
}

impl Executable {
    /// Loads the parameters of the graph from a safetensors file, by name: to use in an application what a
    /// [`GraphTrainer`](crate::train::GraphTrainer) has saved, without a trainer. Resolves once the device has been
    /// polled, several times for a large model; outside of frames, use [`load_blocking`](Self::load_blocking).
    ///
    /// The file may hold more than this graph needs, such as the other half of an autoencoder.
    ///
    /// # Errors
    ///
    /// If a parameter is missing, has another shape, or is not stored in f32: then nothing has been written.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use throughline::nn::Builder;
    /// use throughline::{ExecOptions, Executable, Gpu, TensorType};
    /// # use throughline::train::{GraphTrainConfig, GraphTrainer};
    ///
    /// let gpu = Gpu::headless_blocking()?;
    /// let mut g = gpu.graph();
    /// let x = g.input("x", TensorType::f32([1, 2]))?;
    /// let y = Builder::new(&mut g).mlp("net", x, &[16, 1], |g, h| g.tanh("", h))?;
    /// let exec = Executable::new_blocking(&gpu, Arc::new(gpu.plan(&g, &[y])?), ExecOptions::default())?;
    /// # let mut g = gpu.graph();
    /// # let other = g.input("x", TensorType::f32([1, 2]))?;
    /// # let out = Builder::new(&mut g).mlp("net", other, &[16, 1], |g, h| g.tanh("", h))?;
    /// # let config = GraphTrainConfig { seed: 5, ..GraphTrainConfig::adamw(0.1) };
    /// # let loss = g.sum("loss", out)?;
    /// # let mut trainer = GraphTrainer::new_blocking(&gpu, g, loss, config)?;
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let path = dir.path().join("net.safetensors");
    /// # trainer.save_blocking(&path)?;
    /// exec.load_blocking(&path)?;
    /// exec.write(x, &[0.5f32, -0.5])?;
    /// exec.submit()?;
    /// println!("{:?}", exec.read_blocking::<f32>(y)?);
    /// # trainer.step(&[other.with(&[0.5f32, -0.5])])?;
    /// # assert_eq!(exec.read_blocking::<f32>(y)?[0], trainer.loss_blocking()?);
    /// # Ok::<(), throughline::Error>(())
    /// ```
    pub async fn load(&self, path: impl AsRef<Path>) -> Result<()> {
        let file = Weights::open(path.as_ref())?;
        let externals = self.plan().externals().iter();
        let params: Vec<_> = externals.filter(|external| matches!(external.source, Source::Param(_))).collect();
        let found = find(&file, "", params.iter().map(|param| (&param.name[..], &param.ty.shape)))?;
        let tensors: Vec<Tensor> = params.iter().map(|param| self.tensor(param.value)).collect::<Result<_>>()?;
        let mut uploads = Uploads::new(self.gpu());
        write(&mut uploads, &tensors, &found).await?;
        uploads.finish()
    }

    /// [`load`](Self::load), waiting for the GPU.
    pub fn load_blocking(&self, path: impl AsRef<Path>) -> Result<()> {
        self.gpu().run_blocking(self.load(path))
    }
}
