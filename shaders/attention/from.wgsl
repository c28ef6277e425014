// Attention in which a query sees the keys from a first one on, that of its text, up to its own; after shared.wgsl.
// There are as many queries as keys. Functions are those of all_keys.wgsl.

// The first key of each query: as they come, or for backward from row_dots.wgsl, with the last query of each key after
// them.
@group(0) @binding(6) var<storage, read> firsts: array<u32>; // [1, batch, tq], backward: [2, batch, tq]
@group(0) @binding(5) var<storage, read> stats: array<vec2<f32>>; // [batch, heads, tq], backward: lse and delta

fn ahead(batch: u32) -> u32 {
    return 0u;
}

// The input may hold anything, but a query sees its own key.
fn first_key(batch: u32, row: u32) -> u32 {
    let own = min(row, p.tq - 1u);
    return min(firsts[batch * p.tq + own], own);
}

fn first_key_of(batch: u32, row0: u32, n: u32) -> u32 {
    var first = row0;
    for (var row = row0; row < min(row0 + n, p.tq); row++) {
        first = min(first, first_key(batch, row));
    }
    return first;
}

fn queries_until(batch: u32, key: u32) -> u32 {
    return firsts[p.tokens + batch * p.tq + min(key, p.tk - 1u)] + 1u;
}

fn lse_at(stat: u32) -> f32 {
    return stats[stat].x;
}

fn delta_at(stat: u32) -> f32 {
    return stats[stat].y;
}
