// The frame: the picture on the left, and what the network has learnt of it on the right. Nothing is copied:
// `learnt` is the buffer that the last layer of the network writes.

struct Sizes {
    picture: vec2<u32>,
    frame: vec2<u32>,
}

@group(0) @binding(0) var<uniform> sizes: Sizes;
@group(0) @binding(1) var<storage, read> wanted: array<f32>;
@group(0) @binding(2) var<storage, read> learnt: array<f32>;

// One triangle that covers the frame.
@vertex
fn corner(@builtin(vertex_index) i: u32) -> @builtin(position) vec4<f32> {
    return vec4<f32>(f32(i & 1u) * 4.0 - 1.0, f32(i >> 1u) * 4.0 - 1.0, 0.0, 1.0);
}

@fragment
fn color(@builtin(position) at: vec4<f32>) -> @location(0) vec4<f32> {
    let shown = vec2<u32>(2u * sizes.picture.x, sizes.picture.y);
    let p = min(vec2<u32>(at.xy) * shown / sizes.frame, shown - 1u);
    let i = 3u * (p.y * sizes.picture.x + p.x % sizes.picture.x);
    if p.x < sizes.picture.x {
        return vec4<f32>(wanted[i], wanted[i + 1u], wanted[i + 2u], 1.0);
    }
    return vec4<f32>(learnt[i], learnt[i + 1u], learnt[i + 2u], 1.0);
}
