//! Model files: safetensors and GGUF, read as they are needed and written piece by piece.
//!
//! Use this module for the raw tensors of a file. For a whole model, with its configuration and its parameters under
//! our names, use [`Model`](crate::model::Model) instead.
//!
//! [`Weights::open`] takes a `.safetensors` file, a folder in the layout of model hubs (`config.json` and one or
//! several safetensors files), or a `.gguf` file. It keeps only the header in memory. It lists tensors with name, shape
//! (row-major, whatever the file's order) and storage type, and reads the bytes of those that you ask for: upload them
//! as they are, or [decode](quant) them.
//!
//! [`save_safetensors`] and [`save_gguf`] write tensors that are in memory, and a [`GgufWriter`] those that are not.
//!
//! Files may come from anywhere: whatever they hold, the result is an error that names file and field, or tensors whose
//! bytes lie within the file, in time and memory proportional to the header. NaN among the weights is not an error;
//! look for it with [`StoredTensor::check_finite`].
//!
//! ```
//! use throughline::format::{Stored, Weights};
//!
//! # mod doctest { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/doctest.rs")); }
//! # let folder = doctest::qwen3();
//! let weights = Weights::open(&folder.path().join("model.safetensors"))?;
//! for tensor in weights.iter().take(2) {
//!     println!("{}: {}{}", tensor.name(), tensor.stored(), tensor.shape());
//! }
//! let norm = weights.get("model.norm.weight")?.stored_as(&[Stored::F32])?.of_shape([16])?;
//! norm.check_finite()?;
//! assert_eq!(norm.bytes()?.len(), 16 * 4);
//!
//! let wrong = weights.get("model.norm.weight")?.of_shape([17]).unwrap_err().to_string();
//! assert!(wrong.contains("`model.norm.weight`") && wrong.contains("[17]") && wrong.contains("[16]"));
//! # Ok::<(), throughline::Error>(())
//! ```

mod file;
mod finite;
mod gguf;
mod gguf_writer;
mod header;
mod json;
mod metadata;
mod packed;
pub mod quant;
mod safetensors;
mod settings;
mod weights;

pub use gguf::gguf_header;
pub use gguf_writer::{GgufTensor, GgufWriter, save_gguf};
pub use header::{Header, TensorInfo};
pub(crate) use json::float;
#[cfg(feature = "tokenizers")]
pub(crate) use json::parse as parse_json;
pub use metadata::{MetaArray, MetaValue, Metadata};
pub use packed::Packed;
pub(crate) use packed::UNIT;
pub use quant::Stored;
#[cfg(feature = "tokenizers")]
pub(crate) use safetensors::{Entries, read_file};
pub(crate) use safetensors::{MAX_CONFIG_BYTES, read_json, safetensors_start};
pub use safetensors::{SaveTensor, safetensors_header, safetensors_index, save_safetensors};
pub(crate) use settings::Settings;
pub use weights::{StoredTensor, Weights, is_gguf};
