// y[i] = a[i] + b[i % len(b)]; b repeats over leading dimensions.

// knobs
alias E = vec4<f32>; // f32 where b's length is no multiple of 4 and b repeats

struct Params {
    len: u32, // of y, in units of E
    period: u32, // of b, in units of E
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<E>;
@group(0) @binding(2) var<storage, read> b: array<E>;
@group(0) @binding(3) var<storage, read_write> y: array<E>;

@compute @workgroup_size(64)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * 64u + lid;
    if (i >= p.len) {
        return;
    }
    y[i] = a[i] + b[i % p.period];
}
