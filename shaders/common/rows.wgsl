// Kernels that work row by row: this text stands in front of theirs.
//
// A row is the work of LANES invocations: 1 on software adapters, where a lane is a thread of its
// own and a barrier costs a context switch; many on GPUs, with a tree reduction in workgroup
// memory.

// knobs
const GROUP: u32 = 8u; // invocations of a workgroup
const LANES: u32 = 1u; // of those, how many share a row; a power of two
alias E = vec4<f32>; // f32 where the columns are no multiple of 4
const WIDTH: u32 = 4u; // elements in an E

var<workgroup> partial: array<vec2<f32>, GROUP>;

// Sum over the elements of an E.
fn total(v: E) -> f32 {
    // For a scalar the constructor repeats it four times, which the weights undo.
    return dot(vec4<f32>(v), vec4<f32>(f32(WIDTH) * 0.25));
}

// Largest element of an E.
fn largest(v: E) -> f32 {
    let q = vec4<f32>(v);
    return max(max(q.x, q.y), max(q.z, q.w));
}

// Sum or maximum of `v` over the LANES invocations of this row, to all of them.
fn reduce(v: vec2<f32>, lid: u32, sum: bool) -> vec2<f32> {
    if (LANES == 1u) {
        return v;
    }
    partial[lid] = v;
    workgroupBarrier();
    let lane = lid % LANES;
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        if (lane < step) {
            let other = partial[lid + step];
            partial[lid] = select(max(partial[lid], other), partial[lid] + other, sum);
        }
        workgroupBarrier();
    }
    let result = partial[lid - lane];
    workgroupBarrier();
    return result;
}

fn row_sum(v: f32, lid: u32) -> f32 {
    return reduce(vec2<f32>(v, 0.0), lid, true).x;
}

fn row_sums(a: f32, b: f32, lid: u32) -> vec2<f32> {
    return reduce(vec2<f32>(a, b), lid, true);
}

fn row_max(v: f32, lid: u32) -> f32 {
    return reduce(vec2<f32>(v, v), lid, false).x;
}

