// Loads of products, in quads: four consecutive elements along whichever axis is contiguous in memory.
// Text with the uniform `p`, which has their `k`, comes after this.

// knobs
const A_TRANSPOSED: bool = false; // a is [k, m] in memory, not [m, k]
const B_TRANSPOSED: bool = false; // b is [n, k] in memory, not [k, n]
const A_ALIGNED: bool = true; // a's contiguous axis is a multiple of 4
const B_ALIGNED: bool = true; // b's is
const K_TAIL: bool = true; // k is no multiple of the k that the kernel takes at a time

// Shapes are in elements; a quad may hold the end of one row and the start of the next.
@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>; // [batch, m, k], or [batch, k, m] if A_TRANSPOSED
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>; // [batch, k, n], or [batch, n, k] if B_TRANSPOSED

// Elements `by` to `by + 3` of two quads, for `by` below 4.
fn shifted(low: vec4<f32>, high: vec4<f32>, by: u32) -> vec4<f32> {
    let odd = (by & 1u) != 0u;
    let l = select(low, vec4<f32>(low.yzw, high.x), odd);
    let h = select(high.xy, high.yz, odd);
    return select(l, vec4<f32>(l.zw, h), (by & 2u) != 0u);
}

// Elements i to i + 3 of a. `last` is the index of its last element: no quad past it is read. What is
// read in place of such a quad is masked, or goes into sums that are not stored.
fn a_quad(i: u32, last: u32) -> vec4<f32> {
    let at = select(i, min(i, last), K_TAIL);
    if (A_ALIGNED) {
        return a[at / 4u];
    }
    return shifted(a[at / 4u], a[min(at / 4u + 1u, last / 4u)], at % 4u);
}

fn b_quad(i: u32, last: u32) -> vec4<f32> {
    let at = select(i, min(i, last), K_TAIL);
    if (B_ALIGNED) {
        return b[at / 4u];
    }
    return shifted(b[at / 4u], b[min(at / 4u + 1u, last / 4u)], at % 4u);
}

// Zeros past the end of k, for a quad that lies at `k` as a whole, or runs along k from there.
fn mask(v: vec4<f32>, k: u32, along: bool) -> vec4<f32> {
    if (!K_TAIL) {
        return v;
    }
    return select(
        vec4<f32>(),
        v,
        vec4<u32>(k) + select(vec4<u32>(), vec4<u32>(0u, 1u, 2u, 3u), along) < vec4<u32>(p.k),
    );
}
