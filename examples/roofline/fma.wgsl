// Does as many fused multiply-adds as the adapter can: independent chains in registers, no memory access in
// the loop. Each expression has four links, since software adapters blend every value that a loop carries with
// their execution mask: with a single link the loop would measure the blending.

// knobs
alias T = f32;
const GROUP: u32 = 64u;
const CHAINS: u32 = 8u; // of vec4
const UNROLL: u32 = 4u; // groups of four links of each chain in a turn of the loop

struct Params {
    invocations: u32,
    turns: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

fn link(v: vec4<T>, a: T, b: T) -> vec4<T> {
    return fma(v, vec4<T>(a), vec4<T>(b));
}

@compute @workgroup_size(GROUP)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= p.invocations) {
        return;
    }
    let a = T(x[0].x);
    let b = T(x[1].x);
    var acc: array<vec4<T>, CHAINS>;
    for (var c = 0u; c < CHAINS; c++) {
        acc[c] = vec4<T>(x[c % 2u] + vec4<f32>(f32(id.x % 64u + c)));
    }
    let turns = p.turns;
    for (var t = 0u; t < turns; t++) {
        for (var u = 0u; u < UNROLL; u++) {
            for (var c = 0u; c < CHAINS; c++) {
                acc[c] = link(link(link(link(acc[c], a, b), a, b), a, b), a, b);
            }
        }
    }
    var sum = vec4<f32>();
    for (var c = 0u; c < CHAINS; c++) {
        sum += vec4<f32>(acc[c]);
    }
    y[id.x] = sum;
}
