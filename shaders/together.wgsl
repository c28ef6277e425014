// Kernels that do not depend on each other, in one dispatch: each workgroup does the work of one of theirs.
//
// src/kernel/together.rs replaces each line `//: ..` by what the parts declare, their names with a number behind them.

// knobs
const GROUP: u32 = 64u; // invocations of a workgroup
const PARTS: u32 = 1u;

struct Params {
    // Of each part its workgroups in x, y and z, and how many workgroups come before; then of no part.
    grids: array<vec4<u32>, PARTS + 1u>,
    //: fields
}

@group(0) @binding(0) var<uniform> launch: Params;
//: bindings
//: parts

// Where workgroup `group` of the dispatch is in the grid of a part.
fn place_in(grid: vec4<u32>, group: u32) -> vec3<u32> {
    let at = group - grid.w;
    return vec3<u32>(at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y);
}

@compute @workgroup_size(GROUP)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= launch.grids[PARTS].w) {
        return;
    }
    //: calls
}
