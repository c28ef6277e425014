// What Muon needs besides matrix products: the momentum, scaled to a norm from which the Newton-Schulz
// iteration converges; the shift in its polynomial; and the update itself.
//
// After common/rows.wgsl, for which a chunk of a matrix is a row. Quads of all matrices follow one
// another: below, `all` is their number, matrices * quads of each.

// knobs
const NESTEROV: bool = true;
const SCALED: bool = false; // norm is an outcome of loss_scale: the factor of the gradient, and 1 to skip the step
const INVOCATIONS: u32 = 64u; // of a workgroup, in shift and update
const EACH: u32 = 1u; // quads that an invocation of these makes, INVOCATIONS apart

struct Params {
    quads: u32, // of a matrix; shift and update: of all matrices
    len: u32, // elements of a matrix
    chunk: u32, // quads that a workgroup works on
    chunks: u32, // of a matrix
    groups: u32, // workgroups
    side: u32, // of the matrices to shift
    x: f32, // normalise: norm to scale to; shift: added to the diagonal; update: factor of the learning rate
    y: f32, // shift: factor of the matrix
}

@group(0) @binding(0) var<uniform> p: Params;

// momentum: m += (grad * clip - m) * (1 - momentum), and sums of squares of what is to be orthogonalised
@group(0) @binding(1) var<storage, read> grad: array<vec4<f32>>; // [all]
@group(0) @binding(2) var<storage, read> hyper: array<vec4<f32>>; // [1] of vec4: see MuonSettings::values
// A vec4, so that it can share a binding with the other arrays. Of a norm, its x alone counts.
@group(0) @binding(3) var<storage, read> norm: array<vec4<f32>>; // [1]
@group(0) @binding(4) var<storage, read_write> moment: array<vec4<f32>>; // [all]
@group(0) @binding(5) var<storage, read_write> direction: array<vec4<f32>>; // [all]
@group(0) @binding(6) var<storage, read_write> sums: array<f32>; // [matrices, chunks], of squares

@compute @workgroup_size(GROUP)
fn momentum(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let settings = hyper[0]; // lr, momentum, weight decay, largest norm
    var clip = 1.0;
    if (SCALED) {
        clip = norm[0].x;
    } else if (settings.w > 0.0) {
        clip = min(1.0, settings.w / (norm[0].x + 1e-6));
    }
    let start = group / p.chunks * p.quads;
    let first = group % p.chunks * p.chunk;
    let end = min(first + p.chunk, p.quads);
    let skip = SCALED && norm[0].y != 0.0;
    let len = vec4<u32>(p.len);
    var sum = vec4<f32>();
    for (var i = first + lid; i < end; i += GROUP) {
        let g = grad[start + i] * clip;
        let old = moment[start + i];
        let m = old + (g - old) * (1.0 - settings.y);
        let u = select(m, g + (m - g) * settings.y, NESTEROV);
        if (!skip) {
            moment[start + i] = m;
        }
        direction[start + i] = u;
        // Past the last element there may be anything, even NaN.
        let inside = vec4<u32>(i * 4u) + vec4<u32>(0u, 1u, 2u, 3u) < len;
        sum += select(vec4<f32>(), u * u, inside);
    }
    let chunk_sum = row_sum(total(sum), lid);
    if (lid == 0u) {
        sums[group] = chunk_sum;
    }
}

// normalise: direction *= x / (norm + 1e-7)
@group(0) @binding(1) var<storage, read> squares: array<f32>; // [matrices, chunks]
@group(0) @binding(2) var<storage, read_write> scaled: array<vec4<f32>>; // [all]

@compute @workgroup_size(GROUP)
fn normalise(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let matrix = group / p.chunks;
    var sum = 0.0;
    for (var i = lid; i < p.chunks; i += GROUP) {
        sum += squares[matrix * p.chunks + i];
    }
    let factor = p.x / (sqrt(row_sum(sum, lid)) + 1e-7);
    let first = group % p.chunks * p.chunk;
    let end = matrix * p.quads + min(first + p.chunk, p.quads);
    for (var i = matrix * p.quads + first + lid; i < end; i += GROUP) {
        scaled[i] *= factor;
    }
}

// shift: out = x I + y gram
@group(0) @binding(1) var<storage, read> gram: array<vec4<f32>>; // [all]: [matrices, side, side] in elements
@group(0) @binding(2) var<storage, read_write> shifted: array<vec4<f32>>; // [all]

@compute @workgroup_size(INVOCATIONS)
fn shift(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.quads);
    let area = vec4<u32>(p.side * p.side);
    let stride = vec4<u32>(p.side + 1u); // from one element of a diagonal to the next
    let identity = vec4<f32>(p.x);
    let factor = p.y;
    for (var i = first; i < end; i += INVOCATIONS) {
        let element = vec4<u32>(i * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
        shifted[i] = factor * gram[i] + select(vec4<f32>(), identity, element % area % stride == vec4<u32>());
    }
}

// update: param = param * (1 - lr * decay) - lr * x * step
@group(0) @binding(1) var<storage, read> step: array<vec4<f32>>; // [all]; binding 2 is hyper
@group(0) @binding(3) var<storage, read_write> param: array<vec4<f32>>; // [all]

fn update_from(first: u32) {
    let end = min(first + INVOCATIONS * EACH, p.quads);
    let settings = hyper[0];
    let keep = 1.0 - settings.x * settings.z;
    let rate = settings.x * p.x;
    for (var i = first; i < end; i += INVOCATIONS) {
        param[i] = param[i] * keep - rate * step[i];
    }
}

@compute @workgroup_size(INVOCATIONS)
fn update(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    update_from((wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid);
}

// The same, unless the step is to be skipped.
@group(0) @binding(4) var<storage, read> outcome: array<vec4<f32>>; // [1] of vec4, of loss_scale; its y is 1 to skip

@compute @workgroup_size(INVOCATIONS)
fn update_scaled(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    if (outcome[0].y == 0.0) {
        update_from((wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid);
    }
}
