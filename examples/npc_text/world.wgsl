// The game's own work in each frame: a crowd drawn towards the centre.

@group(0) @binding(0) var<storage, read_write> crowd: array<vec4<f32>>; // position and velocity

@compute @workgroup_size(64)
fn walk(@builtin(global_invocation_id) i: vec3<u32>) {
    var place = crowd[i.x].xy;
    var velocity = crowd[i.x].zw + vec2<f32>(f32(i.x % 64u), f32(i.x / 64u)) * 1e-4;
    for (var step = 0; step < 8; step++) {
        velocity -= 0.01 * place / (1.0 + dot(place, place));
        place += 0.1 * velocity;
    }
    crowd[i.x] = vec4<f32>(place, velocity);
}
