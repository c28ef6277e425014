// y = f(a, b, ..), element by element, where operands may repeat along dimensions.
//
// src/ops/map/kernel.rs replaces each line `//: ..` by what it writes for the functions and shapes at hand.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // how many an invocation makes, INVOCATIONS apart
alias E = vec4<f32>; // f32 where quads of an operand would not be quads of the output

struct Params {
    len: u32, // of the outputs, in units of E
    //: fields
}

@group(0) @binding(0) var<uniform> p: Params;
//: bindings
//: functions

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    //: start
    for (var i = first; i < end; i += INVOCATIONS) {
        //: body
    }
}
