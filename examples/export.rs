//! Exports a model trained with the `train` example to a folder that PyTorch can load, with logits to check it against.
//!
//! ```sh
//! cargo run --release --example export -- --model DIR --out FOLDER
//! python tests/pytorch/check_export.py FOLDER
//! ```

#[path = "shared/training.rs"]
mod training;

use std::path::PathBuf;

use clap::Parser;
use throughline::decode::Decoder;
use throughline::model::{self, Model};
use throughline::train::checkpoint::Checkpoint;
use throughline::{Gpu, format};

#[derive(Parser)]
#[command(about = "Export a model trained with the `train` example as config.json and model.safetensors")]
struct Flags {
    /// Checkpoint file, or the folder that holds it
    #[arg(long)]
    model: PathBuf,
    /// Folder to write to
    #[arg(long)]
    out: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let flags = Flags::parse();
    let checkpoint = Checkpoint::load(&training::checkpoint_path(&flags.model))?;
    model::save_with(&flags.out, &checkpoint.state.config.model, |name| checkpoint.values(name))?;

    let model = Model::open(&flags.out)?;
    let (context, vocab) = (model.config().context, model.config().vocab_size);
    let mut decoder = Decoder::new_blocking(&Gpu::headless_blocking()?, &model, context)?;
    let ids: Vec<u32> = (0..context).map(|i| (i * 7 % vocab) as u32).collect();
    let logits = decoder.feed_all_blocking(&ids)?;
    let path = flags.out.join("expected.safetensors");
    // Ids are small enough for f32 to hold them exactly.
    let ids: Vec<f32> = ids.iter().map(|&id| id as f32).collect();
    let stored = format::Stored::F32;
    let tensors = [
        format::SaveTensor { name: "ids", shape: &[1, context], values: &ids, stored },
        format::SaveTensor { name: "logits", shape: &[1, context, vocab], values: &logits, stored },
    ];
    format::save_safetensors(&path, &tensors, &Default::default())?;
    println!("{}: {} tensors, and the logits of {context} tokens", flags.out.display(), model.weights().len());
    Ok(())
}
