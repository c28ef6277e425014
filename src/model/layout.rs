//! How matrices lie in files and in our parameters.

use crate::nn::{Positions, TransformerConfig};

/// Whether a parameter of two dimensions is a linear layer's, rather than a table of rows.
pub(super) fn is_linear(name: &str) -> bool {
    !["embed.weight", "head.weight", "position.weight", "token_type.weight"].contains(&name)
}

/// Whether a parameter may be in parts of whole rows.
pub(super) fn is_table_of_tokens(name: &str) -> bool {
    ["embed.weight", "head.weight"].contains(&name)
}

/// The transpose of a matrix with rows of `cols`, in tiles that stay in the cache.
pub(super) fn transpose(x: &[f32], cols: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let rows = x.len() / cols;
    let mut out = vec![0.0; x.len()];
    for r0 in (0..rows).step_by(TILE) {
        for c0 in (0..cols).step_by(TILE) {
            for c in c0..(c0 + TILE).min(cols) {
                for r in r0..(r0 + TILE).min(rows) {
                    out[c * rows + r] = x[r * cols + c];
                }
            }
        }
    }
    out
}

/// The matrices `a` and `b` side by side, which have rows of `a_cols` and `b_cols`.
pub(super) fn beside(a: &[f32], a_cols: usize, b: &[f32], b_cols: usize) -> Vec<f32> {
    a.chunks_exact(a_cols).zip(b.chunks_exact(b_cols)).flat_map(|(a, b)| a.iter().chain(b)).copied().collect()
}

/// Values of a parameter for RoPE by halves of a head, if the model's rotates neighbours: columns `2 j` and
/// `2 j + 1` of each head of q and k become `j` and `j + dh / 2`.
pub(super) fn halves(config: &TransformerConfig, name: &str, values: Vec<f32>) -> Vec<f32> {
    let rotated = ["attn.q.", "attn.k.", "attn.q_norm.", "attn.k_norm."].iter().any(|part| name.contains(part));
    let Positions::Rope { interleaved: true, .. } = config.positions else { return values };
    if !rotated {
        return values;
    }
    let dh = config.head_dim();
    let source = |i: usize| match i % dh {
        j if j < dh / 2 => i - j + 2 * j,
        j => i - j + 2 * (j - dh / 2) + 1,
    };
    (0..values.len()).map(|i| values[source(i)]).collect()
}
