// Writes a tensor's pixels into an app's texture: rows from the top, channels last, one pixel an
// invocation. This is no op's kernel: src/texture.rs records it after a step.

// knobs
alias Target = texture_storage_2d<rgba8unorm, write>;
const CHANNELS: u32 = 3u; // of the tensor: 1 is grey; with 1 or 3, alpha is 1

@group(0) @binding(0) var<storage, read> pixels: array<f32>; // [height, width, CHANNELS]
@group(0) @binding(1) var picture: Target;

@compute @workgroup_size(8, 8)
fn store(@builtin(global_invocation_id) at: vec3<u32>) {
    let size = textureDimensions(picture);
    if (any(at.xy >= size)) {
        return;
    }
    let i = (at.y * size.x + at.x) * CHANNELS;
    var color = vec4<f32>(vec3<f32>(pixels[i]), 1.0);
    if (CHANNELS >= 3u) {
        color.y = pixels[i + 1u];
        color.z = pixels[i + 2u];
    }
    if (CHANNELS == 4u) {
        color.w = pixels[i + 3u];
    }
    textureStore(picture, at.xy, color);
}
