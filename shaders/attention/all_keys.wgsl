// Attention in which a query sees all keys up to its own, or all there are; after shared.wgsl.

@group(0) @binding(6) var<storage, read> start: array<u32>; // [batch], forward if CACHED
@group(0) @binding(5) var<storage, read> lse: array<f32>; // [batch, heads, tq], backward
@group(0) @binding(6) var<storage, read> delta: array<f32>; // [batch, heads, tq], backward

// Keys before that of the first query, in kernels that may have a cache.
fn ahead(batch: u32) -> u32 {
    if (CACHED) {
        return min(start[batch], p.tk);
    }
    return p.tk - p.tq;
}

// The first key that a query row sees.
fn first_key(batch: u32, row: u32) -> u32 {
    return 0u;
}

// The first key that any of `n` query rows from `row0` on sees.
fn first_key_of(batch: u32, row0: u32, n: u32) -> u32 {
    return 0u;
}

// From this query row on, none sees a key up to `key`.
fn queries_until(batch: u32, key: u32) -> u32 {
    return p.tq;
}

fn lse_at(stat: u32) -> f32 {
    return lse[stat];
}

fn delta_at(stat: u32) -> f32 {
    return delta[stat];
}
