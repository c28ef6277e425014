// What the gradient of attention needs of its output, on software adapters; after shared.wgsl. On GPUs
// tiled.wgsl makes it.

@group(0) @binding(1) var<storage, read> o_rows: array<E>; // [batch, tq, heads, head_dim]
@group(0) @binding(2) var<storage, read> do_rows: array<E>; // [batch, tq, heads, head_dim]
@group(0) @binding(3) var<storage, read_write> delta_out: array<f32>; // [batch, heads, tq]

// delta = sum(do * o) of each row and head: what the softmax's gradient subtracts.
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
    // i counts (batch, head, time).
    let at = Place(i / p.tq / p.heads, i / p.tq % p.heads, i % p.tq, p.tk - 1u);
    let base = q_at(at, at.row0);
    var sum = E();
    for (var u = base; u < base + DIM; u++) { // not from 0, or Mesa would unroll it
        sum += o_rows[u] * do_rows[u];
    }
    delta_out[i] = total(sum);
}
