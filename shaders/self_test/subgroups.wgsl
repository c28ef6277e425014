// What a device does with subgroups, for src/device/self_test.rs; after common/subgroups.wgsl. One
// workgroup, whose invocations write what they see.

// knobs
const WIDTH: u32 = 256u; // invocations

const MARK: u32 = 20480u; // tells a row that was written from a buffer that is still empty
const STEPS: u32 = 7u; // of `across`: 1, 2, 4, ... 64
const FROM: u32 = 16u; // lanes of `from_lane`
const ROW: u32 = 3u + STEPS + FROM;

@group(0) @binding(1) var<storage, read_write> seen: array<u32>; // [WIDTH, ROW]

@compute @workgroup_size(WIDTH)
fn subgroups(
    @builtin(local_invocation_index) lid: u32,
    @builtin(subgroup_size) size: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let row = lid * ROW;
    let mine = f32(lid);
    seen[row] = MARK;
    seen[row + 1u] = size;
    seen[row + 2u] = lane;
    for (var i = 0u; i < STEPS; i++) {
        seen[row + 3u + i] = u32(across(vec2(mine, 0.0), 1u << i).x);
    }
    for (var i = 0u; i < FROM; i++) {
        seen[row + 3u + STEPS + i] = u32(from_lane(vec4(0.0, 0.0, 0.0, mine), i).w);
    }
}
