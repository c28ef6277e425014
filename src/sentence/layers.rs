//! The modules after the pooling. They work on one small vector per sentence, so they run on the host, in f64.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result, joined, quoted};
use crate::format::{Settings, Weights};

/// One of these modules, and the folder that it is from.
#[derive(Debug)]
pub(super) struct Layer {
    pub path: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// `activation(W x + b)`, plus `x` or a projection of it if there is a residual connection.
    Dense {
        weight: Matrix,
        bias: Option<Vec<f32>>,
        activation: Activation,
        residual: Residual,
    },
    LayerNorm {
        weight: Vec<f32>,
        bias: Vec<f32>,
    },
    /// To length 1.
    Normalize,
}

#[derive(Debug)]
enum Residual {
    None,
    Identity,
    Projected(Matrix),
}

/// `[d_out, d_in]`, row by row, as PyTorch stores it.
#[derive(Debug)]
struct Matrix {
    values: Vec<f32>,
    d_in: usize,
}

impl Matrix {
    fn times(&self, x: &[f64]) -> Vec<f64> {
        let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
        self.values.chunks_exact(self.d_in).map(dot).collect()
    }

    fn d_out(&self) -> usize {
        self.values.len() / self.d_in
    }
}

type Activation = fn(f64) -> f64;

/// Names of PyTorch's modules, with their default settings.
const ACTIVATIONS: [(&str, Activation); 8] = [
    ("Identity", |x| x),
    ("Tanh", f64::tanh),
    ("ReLU", |x| x.max(0.0)),
    ("GELU", |x| 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))),
    ("SiLU", |x| x / (1.0 + (-x).exp())),
    ("Sigmoid", |x| 1.0 / (1.0 + (-x).exp())),
    ("LeakyReLU", |x| if x < 0.0 { 0.01 * x } else { x }),
    ("ELU", |x| if x < 0.0 { x.exp_m1() } else { x }),
];

/// Epsilon of PyTorch's `LayerNorm`, which the module does not set.
const LAYER_NORM_EPS: f64 = 1e-5;

/// Smallest length that PyTorch's `normalize` divides by, so that a zero vector stays one.
const NORMALIZE_EPS: f64 = 1e-12;

/// Largest width that a configuration may ask for.
const MAX_FEATURES: usize = 1 << 24;

impl Layer {
    pub fn normalize(path: &Path) -> Layer {
        Layer { path: path.into(), kind: Kind::Normalize }
    }

    /// Reads a Dense module's folder.
    pub fn dense(dir: &Path) -> Result<Layer> {
        let config = Settings::read(&dir.join("config.json"))?;
        let [d_in, d_out] = [features(&config, "in_features")?, features(&config, "out_features")?];
        config.only_str("module_input_name", "sentence_embedding")?;
        config.only_str("module_output_name", "sentence_embedding")?;
        let weights = weights_of(dir)?;
        let matrix = |name| Ok::<Matrix, Error>(Matrix { values: values(&weights, name, &[d_out, d_in])?, d_in });
        let bias = match config.bool("bias")?.unwrap_or(true) {
            true => Some(values(&weights, "linear.bias", &[d_out])?),
            false if weights.contains("linear.bias") => {
                let message = format!("expected true, since {} has `linear.bias`", weights.path());
                return Err(config.bad("bias", message));
            }
            false => None,
        };
        let residual = match config.bool("use_residual")?.unwrap_or(false) {
            false => Residual::None,
            true if d_in == d_out => Residual::Identity,
            true => Residual::Projected(matrix("residual.weight")?),
        };
        let activation = activation(&config)?;
        let kind = Kind::Dense { weight: matrix("linear.weight")?, bias, activation, residual };
        Ok(Layer { path: dir.into(), kind })
    }

    /// Reads a LayerNorm module's folder.
    pub fn layer_norm(dir: &Path) -> Result<Layer> {
        let d = features(&Settings::read(&dir.join("config.json"))?, "dimension")?;
        let weights = weights_of(dir)?;
        let [weight, bias] = [values(&weights, "norm.weight", &[d])?, values(&weights, "norm.bias", &[d])?];
        Ok(Layer { path: dir.into(), kind: Kind::LayerNorm { weight, bias } })
    }

    /// Whether it is a Normalize module.
    pub fn normalizes(&self) -> bool {
        matches!(self.kind, Kind::Normalize)
    }

    /// The width of its result for vectors of width `d_in`, or an error if it is for others.
    pub fn width(&self, d_in: usize) -> Result<usize> {
        let (expected, d_out) = match &self.kind {
            Kind::Dense { weight, .. } => (weight.d_in, weight.d_out()),
            Kind::LayerNorm { weight, .. } => (weight.len(), weight.len()),
            Kind::Normalize => (d_in, d_in),
        };
        match expected == d_in {
            true => Ok(d_out),
            false => {
                let message = format!("takes vectors of {expected} numbers, but those before it have {d_in}");
                Err(Error::format(&self.path, message))
            }
        }
    }

    pub fn apply(&self, x: Vec<f64>) -> Vec<f64> {
        match &self.kind {
            Kind::Dense { weight, bias, activation, residual } => {
                let mut y = weight.times(&x);
                if let Some(bias) = bias {
                    y.iter_mut().zip(bias).for_each(|(y, b)| *y += f64::from(*b));
                }
                y.iter_mut().for_each(|y| *y = activation(*y));
                let added = match residual {
                    Residual::None => return y,
                    Residual::Identity => x,
                    Residual::Projected(matrix) => matrix.times(&x),
                };
                y.iter().zip(added).map(|(y, x)| y + x).collect()
            }
            Kind::LayerNorm { weight, bias } => {
                let n = x.len() as f64;
                let mean = x.iter().sum::<f64>() / n;
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
                let rstd = 1.0 / (variance + LAYER_NORM_EPS).sqrt();
                let scaled = x.iter().zip(weight).zip(bias);
                scaled.map(|((x, w), b)| (x - mean) * rstd * f64::from(*w) + f64::from(*b)).collect()
            }
            Kind::Normalize => {
                let length = x.iter().map(|x| x * x).sum::<f64>().sqrt().max(NORMALIZE_EPS);
                x.iter().map(|x| x / length).collect()
            }
        }
    }
}

fn features(config: &Settings, key: &str) -> Result<usize> {
    match config.usize(key)?.ok_or_else(|| config.missing(key))? {
        n if (1..=MAX_FEATURES).contains(&n) => Ok(n),
        n => Err(config.bad(key, format!("expected from 1 to {MAX_FEATURES}, got {n}"))),
    }
}

/// PyTorch's name of the activation, such as `torch.nn.modules.activation.Tanh`, which is also the default. `null` is
/// none.
fn activation(config: &Settings) -> Result<Activation> {
    const KEY: &str = "activation_function";
    let name = config.str(KEY)?;
    let class = match name {
        None if config.is_null(KEY) => Some("Identity"),
        None => Some("Tanh"),
        Some(name) => name.strip_prefix("torch.nn.").and_then(|rest| rest.rsplit('.').next()),
    };
    let found = ACTIVATIONS.iter().find(|(known, _)| Some(*known) == class);
    found.map(|&(_, activation)| activation).ok_or_else(|| {
        let known = joined(ACTIVATIONS.map(|(name, _)| name), ", ");
        config.bad(KEY, format!("expected one of torch.nn's {known}, got {}", quoted(name.unwrap_or_default())))
    })
}

/// The weights of a module's folder.
fn weights_of(dir: &Path) -> Result<Weights> {
    let path = dir.join("model.safetensors");
    let pickle = dir.join("pytorch_model.bin");
    if !path.exists() && pickle.exists() {
        let message = "is a Python pickle, which is not read, and there is no `model.safetensors` beside it. Write one \
                       with sentence-transformers: `SentenceTransformer(FOLDER).save(FOLDER)`";
        return Err(Error::format(pickle, message));
    }
    Weights::open(&path)
}

fn values(weights: &Weights, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let tensor = weights.get(name)?.of_shape(shape.to_vec())?;
    tensor.check_finite()?;
    tensor.values()
}
