// What the gradient of attention needs of its output, on software adapters and before
// cooperative.wgsl; after shared.wgsl. Before tiled.wgsl make_deltas.wgsl makes it. What from.wgsl reads is made here for
// all.

// knob
const ROUNDED: bool = false; // do as cooperative.wgsl multiplies it, rounded to f16: where a query sees one key, the
// gradient of its score is zero, which takes the same do in both of the terms that cancel

@group(0) @binding(1) var<storage, read> o_rows: array<E>; // [batch, tq, heads, head_dim]
@group(0) @binding(2) var<storage, read> do_rows: array<E>; // [batch, tq, heads, head_dim]
@group(0) @binding(3) var<storage, read_write> delta_out: array<f32>; // [batch, heads, tq]

// row_stats
@group(0) @binding(3) var<storage, read> lse: array<f32>; // [batch, heads, tq]
@group(0) @binding(4) var<storage, read> first: array<u32>; // [batch, tq]
@group(0) @binding(5) var<storage, read_write> stats_out: array<vec2<f32>>; // [batch, heads, tq]
@group(0) @binding(6) var<storage, read_write> firsts_out: array<u32>; // [2, batch, tq]

// Row number `i`, counted by (batch, head, time).
fn row_place(i: u32) -> Place {
    return Place(i / p.tq / p.heads, i / p.tq % p.heads, i % p.tq, p.tk - 1u);
}

// delta = sum(do * o) of a row and head: what the softmax's gradient subtracts.
fn row_dot(at: Place) -> f32 {
    let base = q_at(at, at.row0);
    var sum = E();
    for (var u = base; u < base + DIM; u++) { // not from 0, or Mesa would unroll it
        var cotangent = do_rows[u];
        if (ROUNDED) {
            cotangent = quantizeToF16(cotangent);
        }
        sum += o_rows[u] * cotangent;
    }
    return total(sum);
}

@compute @workgroup_size(64)
fn row_dots(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i >= p.groups) {
        return;
    }
    delta_out[i] = row_dot(row_place(i));
}

// lse and delta of each row side by side, and once for all heads the first key that each query sees, and the last query
// that sees each key.
@compute @workgroup_size(64)
fn row_stats(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i >= p.groups) {
        return;
    }
    let at = row_place(i);
    stats_out[i] = vec2<f32>(lse[i], row_dot(at));
    if (at.head > 0u) {
        return;
    }
    let base = at.batch * p.tq;
    firsts_out[base + at.row0] = min(first[base + at.row0], at.row0);
    // Downwards: on drivers that end long loops early, backward meets more queries than it must, but no fewer.
    var last = p.tq - 1u;
    while (last > at.row0 && first[base + last] > at.row0) {
        last--;
    }
    firsts_out[p.tokens + base + at.row0] = last;
}
