// y[o, b, m, a, n] = x[o, a, m, b, n]: swaps two axes of lengths A and B, with whatever lies before,
// between and behind them.
//
// A workgroup takes a block of the plane that a and (b, n) span, which lie wherever o and m say. Its
// invocations stand side by side along (b, n), where x is contiguous, and go down EACH steps of a,
// where y is. `forward` moves units one by one; `quads`, for planes that lie whole at the end
// (n = 1), transposes blocks of 4 x 4 elements in registers.

// knobs
const WIDE: u32 = 8u; // invocations of a workgroup along (b, n)
const TALL: u32 = 8u; // along a
const EACH: u32 = 1u; // steps of a that an invocation takes, TALL apart
alias E = vec4<u32>; // unit that moves; u32 where what lies behind the axes is no multiple of 4

struct Params {
    planes: u32, // over o and m
    a: u32, // lengths, for `quads` of a and b in quads
    mid: u32,
    b: u32,
    inner: u32, // units behind the axes
    across: u32, // workgroups along (b, n)
    down: u32, // along a
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> x: array<E>;
@group(0) @binding(2) var<storage, read_write> y: array<E>;

// quads
@group(0) @binding(1) var<storage, read> xq: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> yq: array<vec4<u32>>;

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
        // None of a plane that is not there.
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
    let inner = p.inner; // loads in a loop are dear, of uniforms too
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
    // Quads between rows of x and of y.
    let stride = p.mid * p.b;
    let stride_y = p.mid * p.a;
    let source = (s.o * 4u * p.a * p.mid + s.m) * p.b + s.at;
    let sink = ((s.o * p.b + s.at) * 4u * p.mid + s.m) * p.a;
    for (var a = s.first; a < s.end; a += TALL) {
        let at = source + 4u * a * stride;
        let r0 = xq[at];
        let r1 = xq[at + stride];
        let r2 = xq[at + 2u * stride];
        let r3 = xq[at + 3u * stride];
        yq[sink + a] = vec4<u32>(r0.x, r1.x, r2.x, r3.x);
        yq[sink + a + stride_y] = vec4<u32>(r0.y, r1.y, r2.y, r3.y);
        yq[sink + a + 2u * stride_y] = vec4<u32>(r0.z, r1.z, r2.z, r3.z);
        yq[sink + a + 3u * stride_y] = vec4<u32>(r0.w, r1.w, r2.w, r3.w);
    }
}
