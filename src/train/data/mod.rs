//! From text to tokens to batches.
//!
//! - [`Examples`] are chats, prompts with completions, or texts, from files in the formats that people have: JSON lines
//!   and plain text. [`ExampleEncoder`] makes them from other data.
//! - [`Batches`] fits examples into sequences and hands out the batches of a run, in an order that depends on seed and
//!   step alone. Its [`DataStats`] tell what the data comes to before anything runs.
//! - [`Dataset`] takes its batches from anywhere in one long text, as is usual for small models trained from scratch.
//!   [`CharTokenizer`] suffices for those.
//! - [`Batch`] is what a step is fed.
//!
//! ```no_run
//! # #[cfg(feature = "tokenizers")]
//! # fn main() -> throughline::Result<()> {
//! use throughline::Gpu;
//! use throughline::model::Model;
//! use throughline::tokenize::ModelTokenizer;
//! use throughline::train::data::{Batches, Examples};
//! use throughline::train::{TrainConfig, Trainer};
//!
//! let model = Model::open("model.gguf".as_ref())?;
//! let tokenizer = ModelTokenizer::of(model.weights())?;
//! let [train, val] = Examples::read("chats.jsonl".as_ref(), &tokenizer)?.split(0.1, 0)?;
//! let config = TrainConfig { seq_len: Some(256), packing: true, ..TrainConfig::new(model.config().clone(), 4) };
//! let (mut train, val) = (Batches::new(train, &config)?, Batches::new(val, &config)?.evaluation(16)?);
//! println!("{}", train.stats());
//!
//! let gpu = Gpu::headless_blocking()?;
//! let mut trainer = Trainer::new_blocking(&gpu, config)?;
//! model.load_blocking(&gpu, trainer.params())?;
//! for step in 0..train.steps(3.0) {
//!     trainer.step(&train.step(step)?)?;
//! }
//! println!("{}", trainer.evaluate_blocking(&val)?);
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "tokenizers"))]
//! # fn main() {}
//! ```

mod batch;
mod batches;
#[cfg(feature = "tokenizers")]
mod encode;
mod examples;
#[cfg(feature = "tokenizers")]
mod read;
mod text;

pub(crate) use batch::counted;
pub use batch::{Batch, IGNORE_INDEX};
pub use batches::{Batches, DataStats};
#[cfg(feature = "tokenizers")]
pub use encode::ExampleEncoder;
pub use examples::{Example, Examples};
pub use text::{CharTokenizer, Dataset};
