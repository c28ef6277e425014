// y[o, b, m, a, n] = x[o, a, m, b, n]: swaps two axes, with whatever axes come before, between and after
// them.
//
// For each o and m, a and (b, n) span a plane, of which a workgroup takes a block. Its invocations stand
// side by side along (b, n), where x is contiguous, and take EACH steps down a. `forward` moves units
// one by one; `quads`, where nothing comes after the axes (n = 1), transposes blocks of 4 x 4 elements
// in registers.

// knobs
const WIDE: u32 = 8u; // invocations of a workgroup along (b, n)
const TALL: u32 = 8u; // along a
const EACH: u32 = 1u; // steps of a that an invocation takes, TALL apart
alias E = vec4<u32>; // unit that moves; u32 where what comes after the axes is no multiple of 4

struct Params {
    planes: u32, // over o and m
    a: u32, // length of the first axis; for `quads`, in quads
    mid: u32, // product of those between
    b: u32, // length of the second axis; for `quads`, in quads
    inner: u32, // units after the axes
    across: u32, // workgroups along (b, n)
    down: u32, // along a
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> x: array<E>; // [outer, a, mid, b, inner]
@group(0) @binding(2) var<storage, read_write> y: array<E>; // [outer, b, mid, a, inner]

// quads
@group(0) @binding(1) var<storage, read> x_quads: array<vec4<u32>>; // [outer, 4 * a, mid, b] of vec4
@group(0) @binding(2) var<storage, read_write> y_quads: array<vec4<u32>>; // [outer, 4 * b, mid, a] of vec4

// What an invocation moves: column `at` of plane [o, m], from row `first` to row `end`.
struct Block {
    o: u32,
    m: u32,
    at: u32,
    first: u32,
    end: u32,
}

fn block(group: u32, lid: u32) -> Block {
    let plane = group / (p.across * p.down);
    let down = group / p.across % p.down * (TALL * EACH);
    return Block(
        plane / p.mid,
        plane % p.mid,
        group % p.across * WIDE + lid % WIDE,
        down + lid / WIDE,
        // No rows for planes that do not exist.
        select(0u, min(down + TALL * EACH, p.a), plane < p.planes),
    );
}

@compute @workgroup_size(WIDE * TALL)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let s = block(wid.x + wid.y * nwg.x, lid);
    let width = p.b * p.inner;
    if (s.at >= width) {
        return;
    }
    let inner = p.inner; // loads in a loop are expensive, even of uniforms
    let stride = p.mid * width;
    let source = (s.o * p.a * p.mid + s.m) * width + s.at;
    let sink = ((s.o * p.b + s.at / inner) * p.mid + s.m) * p.a * inner + s.at % inner;
    for (var a = s.first; a < s.end; a += TALL) {
        y[sink + a * inner] = x[source + a * stride];
    }
}

@compute @workgroup_size(WIDE * TALL)
fn quads(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let s = block(wid.x + wid.y * nwg.x, lid);
    if (s.at >= p.b) {
        return;
    }
    // Quads from one row of x to the next, and of y.
    let stride = p.mid * p.b;
    let stride_y = p.mid * p.a;
    let source = (s.o * 4u * p.a * p.mid + s.m) * p.b + s.at;
    let sink = ((s.o * p.b + s.at) * 4u * p.mid + s.m) * p.a;
    for (var a = s.first; a < s.end; a += TALL) {
        let at = source + 4u * a * stride;
        let r0 = x_quads[at];
        let r1 = x_quads[at + stride];
        let r2 = x_quads[at + 2u * stride];
        let r3 = x_quads[at + 3u * stride];
        y_quads[sink + a] = vec4<u32>(r0.x, r1.x, r2.x, r3.x);
        y_quads[sink + a + stride_y] = vec4<u32>(r0.y, r1.y, r2.y, r3.y);
        y_quads[sink + a + 2u * stride_y] = vec4<u32>(r0.z, r1.z, r2.z, r3.z);
        y_quads[sink + a + 3u * stride_y] = vec4<u32>(r0.w, r1.w, r2.w, r3.w);
    }
}
