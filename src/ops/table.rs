//! The table of ops.

use super::cases::Row;
use super::{
    adamw, attention, cache, cast, concat, cross_entropy, dropout, embedding, fill, gather, gelu, l2_norm, loss_scale,
    map, matmul, matmul_by_id, muon, norm, packed, packed_i8, patches, pool, products, reduce, residual_add, rope,
    scale, schedule, sgd, slice, softmax, stats, sum, swiglu, together, top_k, transpose,
};

/// Every op that has a kernel. See [`Row`].
///
/// Iterate over it to test, benchmark or document all ops.
pub const TABLE: &[Row] = &[
    adamw::ROW,
    attention::ROW,
    cache::ROW,
    concat::ROW,
    cross_entropy::ROW,
    dropout::ROW,
    embedding::ROW,
    cast::ROW,
    fill::ROW,
    gather::ROW,
    gelu::ROW,
    l2_norm::ROW,
    loss_scale::ROW,
    map::ROW,
    matmul::ROW,
    matmul_by_id::ROW,
    muon::ROW,
    norm::LAYERNORM,
    norm::RMSNORM,
    packed::ROW,
    packed_i8::ROW,
    patches::ROW,
    pool::ROW,
    products::ROW,
    reduce::ROW,
    residual_add::ROW,
    rope::ROW,
    scale::ROW,
    schedule::ROW,
    sgd::ROW,
    slice::ROW,
    softmax::ROW,
    stats::ROW,
    sum::ROW,
    swiglu::ROW,
    together::ROW,
    top_k::ROW,
    transpose::ROW,
];
