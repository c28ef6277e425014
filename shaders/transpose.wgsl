// y[o, b, m, a, n] = x[o, a, m, b, n]: swaps two axes of lengths A and B, with whatever lies before,
// between and behind them. One unit an invocation, written in order; reads are strided.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // how many an invocation makes, INVOCATIONS apart
alias E = vec4<u32>; // unit that moves; u32 where what lies behind the axes is no multiple of 4

struct Params {
    len: u32, // units
    a: u32,
    mid: u32,
    b: u32,
    inner: u32, // units behind the axes
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<E>;
@group(0) @binding(2) var<storage, read_write> y: array<E>;

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    for (var i = first; i < end; i += INVOCATIONS) {
        var rest = i / p.inner;
        let n = i % p.inner;
        let a = rest % p.a;
        rest /= p.a;
        let m = rest % p.mid;
        rest /= p.mid;
        let b = rest % p.b;
        let o = rest / p.b;
        y[i] = x[(((o * p.a + a) * p.mid + m) * p.b + b) * p.inner + n];
    }
}
