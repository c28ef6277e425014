// Writes a tensor's pixels into an app's texture, and reads them from one: rows from the top, channels last, one pixel
// an invocation. This is no op's kernel: src/device/texture.rs records it between steps.

// knobs
alias Target = texture_storage_2d<rgba8unorm, write>;
const CHANNELS: u32 = 3u; // of the tensor. Written, 1 is grey; without a fourth, alpha is 1

// Where in the texture the tensor's pixels are.
struct Part {
    origin: vec2<u32>,
    size: vec2<u32>,
}

@group(0) @binding(0) var<uniform> part: Part;
@group(0) @binding(1) var<storage, read> pixels: array<f32>; // [height, width, CHANNELS]
@group(0) @binding(2) var picture: Target;
@group(0) @binding(3) var<storage, read_write> loaded: array<f32>; // [height, width, CHANNELS]
@group(0) @binding(4) var source: texture_2d<f32>;

@compute @workgroup_size(8, 8)
fn store(@builtin(global_invocation_id) at: vec3<u32>) {
    if (any(at.xy >= part.size)) {
        return;
    }
    let i = (at.y * part.size.x + at.x) * CHANNELS;
    var color = vec4<f32>(vec3<f32>(pixels[i]), 1.0);
    if (CHANNELS >= 3u) {
        color.y = pixels[i + 1u];
        color.z = pixels[i + 2u];
    }
    if (CHANNELS == 4u) {
        color.w = pixels[i + 3u];
    }
    textureStore(picture, part.origin + at.xy, color);
}

@compute @workgroup_size(8, 8)
fn load(@builtin(global_invocation_id) at: vec3<u32>) {
    if (any(at.xy >= part.size)) {
        return;
    }
    let i = (at.y * part.size.x + at.x) * CHANNELS;
    let color = textureLoad(source, part.origin + at.xy, 0);
    loaded[i] = color.x;
    if (CHANNELS >= 2u) {
        loaded[i + 1u] = color.y;
    }
    if (CHANNELS >= 3u) {
        loaded[i + 2u] = color.z;
    }
    if (CHANNELS == 4u) {
        loaded[i + 3u] = color.w;
    }
}
