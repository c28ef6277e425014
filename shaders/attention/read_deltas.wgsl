// What row_dots.wgsl has made for tiled_backward_q; before tiled.wgsl, with from.wgsl, which leaves it no binding to
// make that itself.

// delta = sum(do * o) of four rows.
fn deltas(at: Place, rows: vec4<u32>, lane: u32, stores: bool) -> vec4<f32> {
    return vec4<f32>(
        delta_at(stat_at(at, rows.x)),
        delta_at(stat_at(at, rows.y)),
        delta_at(stat_at(at, rows.z)),
        delta_at(stat_at(at, rows.w)),
    );
}
