// Scaled dot-product attention without the T x T matrix (Dao et al. 2022): keys pass by a few at a
// time, with a running maximum and sum.
//
// This text comes first in every kernel of attention. Those that meet keys then have all_keys.wgsl, or from.wgsl
// where a query sees no key before the first of its text. After that comes one family of entry points:
//
// - own_rows.wgsl, then lanes.wgsl, for software adapters: an invocation owns whole rows;
// - dots.wgsl, own_rows.wgsl, then wide.wgsl, the same where rows are too wide for registers;
// - dots.wgsl, tiles.wgsl, teams.wgsl, make_deltas.wgsl or read_deltas.wgsl, then tiled.wgsl, for GPUs: a tile of rows
//   meets a tile of the other side;
// - dots.wgsl, tiles.wgsl, quads.wgsl or elements.wgsl, then cooperative.wgsl, the same on cooperative matrices;
// - dots.wgsl, teams.wgsl, then split.wgsl, for GPUs and few queries: a workgroup has the rows that share a
//   key head, and a slice of their keys; then combine.wgsl, where there are several slices;
// - dots.wgsl, teams.wgsl, then decode.wgsl, for few queries on software adapters without subgroups: a whole
//   workgroup works on one query row;
// - row_dots.wgsl: what backward needs of o, on software adapters and before from.wgsl and cooperative.wgsl.
//
// Heads lie side by side in the last dimension: element (batch, time, head, i) is at
// ((batch * times + time) * heads + head) * head_dim + i. Shapes below are in elements; where E is
// vec4<f32>, an index counts groups of four along the last dimension.

// knobs
const CAUSAL: bool = true; // query t sees keys up to t + tk - tq
const CACHED: bool = false; // forward: query t of sequence b sees keys up to t + start[b] instead
alias E = vec4<f32>; // f32 where the width of a head is no multiple of 4
const WIDTH: u32 = 4u; // elements in an E
const DIM: u32 = 8u; // width of a head, in units of E

struct Params {
    heads: u32,
    kv_heads: u32,
    tq: u32,
    tk: u32,
    scale: f32,
    blocks: u32, // workgroups for one head
    groups: u32, // workgroups; row_dots: rows
    since: u32, // wide.wgsl: the first row of the other side that this dispatch meets
    until: u32, // and the first that it leaves to the next one
    tokens: u32, // batch * tq
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> q: array<E>; // [batch, tq, heads, head_dim]
@group(0) @binding(2) var<storage, read> k: array<E>; // [batch, tk, kv_heads, head_dim]
@group(0) @binding(3) var<storage, read> v: array<E>; // [batch, tk, kv_heads, head_dim]

// forward
@group(0) @binding(4) var<storage, read_write> o: array<E>; // [batch, tq, heads, head_dim]; split.wgsl: see `part_at`
@group(0) @binding(5) var<storage, read_write> lse_out: array<f32>; // [batch, heads, tq]; split.wgsl: see `part_at`

// backward_q and backward_kv
@group(0) @binding(4) var<storage, read> do_: array<E>; // [batch, tq, heads, head_dim]
@group(0) @binding(7) var<storage, read_write> dq: array<E>; // [batch, tq, heads, head_dim]
@group(0) @binding(7) var<storage, read_write> dk: array<E>; // [batch, tk, kv_heads, head_dim]
@group(0) @binding(8) var<storage, read_write> dv: array<E>; // [batch, tk, kv_heads, head_dim]

// The score of a masked key: finite, so that no infinities meet.
const MASKED: f32 = -3e38;

// Sum over the elements of an E.
fn total(v: E) -> f32 {
    // For a scalar the constructor repeats it four times, which the weights undo.
    return dot(vec4<f32>(v), vec4<f32>(f32(WIDTH) * 0.25));
}

// Which head and which rows a workgroup works on.
struct Place {
    batch: u32,
    head: u32,
    row0: u32, // first row of this invocation, or of the workgroup's tile
    // The last key to read: indices past it read this key again. Its weight is 0 there, but rows of
    // a cache that have not been written may hold NaN.
    last: u32,
}

fn q_at(at: Place, row: u32) -> u32 {
    return ((at.batch * p.tq + min(row, p.tq - 1u)) * p.heads + at.head) * DIM;
}

fn kv_at(at: Place, kv_head: u32, key: u32) -> u32 {
    return ((at.batch * p.tk + min(key, at.last)) * p.kv_heads + kv_head) * DIM;
}

fn stat_at(at: Place, row: u32) -> u32 {
    return (at.batch * p.heads + at.head) * p.tq + min(row, p.tq - 1u);
}

// Keys that a query row sees, of which `ahead` come before that of the first query.
fn visible(row: u32, ahead: u32) -> u32 {
    if (CACHED) {
        return min(min(row, p.tq - 1u) + ahead + 1u, p.tk);
    }
    if (CAUSAL) {
        return min(row, p.tq - 1u) + ahead + 1u;
    }
    return p.tk;
}
