// What tiled_backward_q makes for itself, and for tiled_backward_kv; before tiled.wgsl, with all_keys.wgsl.

@group(0) @binding(6) var<storage, read_write> delta_out: array<f32>; // [batch, heads, tq]
@group(0) @binding(8) var<storage, read> o_in: array<E>; // [batch, tq, heads, head_dim]

// delta = sum(do * o) of four rows. One of the workgroups that share them stores it.
fn deltas(at: Place, rows: vec4<u32>, lane: u32, stores: bool) -> vec4<f32> {
    var sums: vec4<f32>;
    for (var r = 0u; r < 4u; r++) { // unroll
        let base = q_at(at, rows[r]);
        var products: E;
        for (var unit = lane % LANES; unit < DIM; unit += LANES) {
            products += do_[base + unit] * o_in[base + unit];
        }
        sums[r] = total(products);
    }
    sums = combined(sums, lane, true);
    for (var r = 0u; r < 4u; r++) { // unroll
        if (lane % LANES == 0u && stores && rows[r] < p.tq) {
            delta_out[stat_at(at, rows[r])] = sums[r];
        }
    }
    return sums;
}
