//! The layout of matrices in files and in our parameters.

use crate::error::{Error, Result};
use crate::nn::{Positions, TransformerConfig};
use crate::tensor::Shape;

/// Whether a two-dimensional parameter belongs to a linear layer rather than being a table of rows.
pub(super) fn is_linear(name: &str) -> bool {
    !["embed.weight", "head.weight", "position.weight", "token_type.weight"].contains(&name)
}

/// Whether a parameter is a matrix in GGUF files: what quantisers encode, unlike norms, biases and positions.
pub(super) fn is_matrix(name: &str, rank: usize) -> bool {
    rank == 2 && !["position.weight", "token_type.weight"].contains(&name)
}

/// Whether a parameter may be split into parts of whole rows.
pub(super) fn is_table_of_tokens(name: &str) -> bool {
    ["embed.weight", "head.weight"].contains(&name)
}

/// The transpose of a matrix with `cols` columns.
pub(super) fn transpose(x: &[f32], cols: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    transpose_into(x, cols, &mut out, x.len() / cols, 0);
    out
}

/// Writes some rows of a matrix with `cols` columns and `rows` rows, from row `first` on, into its transpose. In tiles
/// that stay in the cache.
pub(super) fn transpose_into(x: &[f32], cols: usize, out: &mut [f32], rows: usize, first: usize) {
    const TILE: usize = 32;
    let here = x.len() / cols;
    for r0 in (0..here).step_by(TILE) {
        for c0 in (0..cols).step_by(TILE) {
            for c in c0..(c0 + TILE).min(cols) {
                for r in r0..(r0 + TILE).min(here) {
                    out[c * rows + first + r] = x[r * cols + c];
                }
            }
        }
    }
}

/// The matrices `a` and `b` side by side, given the number of columns of each.
pub(super) fn beside(a: &[f32], a_cols: usize, b: &[f32], b_cols: usize) -> Vec<f32> {
    a.chunks_exact(a_cols).zip(b.chunks_exact(b_cols)).flat_map(|(a, b)| a.iter().chain(b)).copied().collect()
}

/// Whether a parameter makes queries or keys, or normalises them: what RoPE rotates.
pub(super) fn is_query_or_key(name: &str) -> bool {
    ["attn.q.", "attn.k.", "attn.q_norm.", "attn.k_norm."].iter().any(|part| name.contains(part))
}

/// Whether a model rotates neighbours.
pub(super) fn is_interleaved(config: &TransformerConfig) -> bool {
    matches!(config.positions, Positions::Rope { interleaved: true, .. })
}

/// Whether a parameter belongs to what a model that rotates neighbours rotates.
pub(super) fn is_rotated(config: &TransformerConfig, name: &str) -> bool {
    is_interleaved(config) && is_query_or_key(name)
}

/// Converts a parameter of a model that rotates neighbours to RoPE by halves of a head.
pub(super) fn halves(config: &TransformerConfig, name: &str, values: Vec<f32>) -> Vec<f32> {
    if is_rotated(config, name) { to_halves(config.head_dim(), &values) } else { values }
}

/// From RoPE by neighbours to that by halves of a head: columns `2 j` and `2 j + 1` of each head of `dh` columns become
/// `j` and `j + dh / 2`.
pub(super) fn to_halves(dh: usize, values: &[f32]) -> Vec<f32> {
    (0..values.len()).map(|i| values[neighbour(i, dh)]).collect()
}

/// The inverse of [`to_halves`].
pub(super) fn to_neighbours(dh: usize, values: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    values.iter().enumerate().for_each(|(i, value)| out[neighbour(i, dh)] = *value);
    out
}

/// Where column `i` of a model that rotates halves is in one that rotates neighbours.
fn neighbour(i: usize, dh: usize) -> usize {
    match i % dh {
        j if j < dh / 2 => i - j + 2 * j,
        j => i - j + 2 * (j - dh / 2) + 1,
    }
}

pub(super) fn check_values(name: &str, shape: &Shape, values: &[f32]) -> Result<()> {
    if values.len() != shape.len() {
        return Err(Error::data(name, format!("{} values for {shape}", shape.len()), values.len()));
    }
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::data(name, "finite values", format!("{} as element {at}", values[at]))),
    }
}
