// One element of each column of [planes, n, inner] by id. `forward`: y[p, j, m] = x[p, ids[p, j, m], m], zero where
// there is no such element. `backward`: dx[p, i, m] = sum of dy[p, j, m] over the j with ids[p, j, m] = i, in the order
// of j.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // elements, or units of E, that an invocation makes, INVOCATIONS apart
// backward. If the axis is the last, a unit of dx goes along it, and an id is compared with all of its elements.
// Otherwise a unit goes across columns, as those of dy and ids do.
alias E = vec4<f32>; // unit of dx: f32 where that is no multiple of 4
alias I = vec4<u32>; // an id for each of its elements
alias D = f32; // unit of dy
alias J = u32; // unit of ids
const STEP: u32 = 4u; // elements of a column in a unit of dx
const OFFSETS: I = vec4<u32>(0u, 1u, 2u, 3u); // where they are in it

struct Params {
    len: u32, // units to make
    n: u32, // elements of a column of x; backward: in units
    k: u32, // ids of a column
    inner: u32, // in units
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> x: array<f32>; // [planes, n, inner]
@group(0) @binding(2) var<storage, read> ids: array<u32>; // [planes, k, inner]
@group(0) @binding(3) var<storage, read_write> y: array<f32>; // [planes, k, inner]

// backward
@group(0) @binding(1) var<storage, read> dy: array<D>; // [planes, k, inner]
@group(0) @binding(2) var<storage, read> id_units: array<J>; // [planes, k, inner]
@group(0) @binding(3) var<storage, read_write> dx: array<E>; // [planes, n, inner]

// Where an index of [planes, length, inner] is. It counts along with the index, since divisions are expensive.
struct Walk {
    plane: u32,
    row: u32,
    column: u32,
}

fn walk(i: u32, length: u32, inner: u32) -> Walk {
    return Walk(i / inner / length, i / inner % length, i % inner);
}

// The place that is as far from `w` as `by` is from 0.
fn moved(w: Walk, by: Walk, length: u32, inner: u32) -> Walk {
    var n = Walk(w.plane + by.plane, w.row + by.row, w.column + by.column);
    if (n.column >= inner) {
        n.column -= inner;
        n.row++;
    }
    if (n.row >= length) {
        n.row -= length;
        n.plane++;
    }
    return n;
}

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    let n = p.n; // loads in a loop are expensive, even of uniforms
    let k = p.k;
    let inner = p.inner;
    let step = walk(INVOCATIONS, k, inner);
    var w = walk(first, k, inner);
    for (var i = first; i < end; i += INVOCATIONS) {
        let id = ids[i];
        var v = 0.0;
        if (id < n) {
            v = x[(w.plane * n + id) * inner + w.column];
        }
        y[i] = v;
        w = moved(w, step, k, inner);
    }
}

@compute @workgroup_size(INVOCATIONS)
fn backward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    let n = p.n;
    let k = p.k;
    let inner = p.inner;
    let step = walk(INVOCATIONS, n, inner);
    var w = walk(first, n, inner);
    for (var i = first; i < end; i += INVOCATIONS) {
        let here = I(w.row * STEP) + OFFSETS;
        var at = w.plane * k * inner + w.column;
        var sum = E();
        for (var j = 0u; j < k; j++) {
            sum += select(E(), E(dy[at]), I(id_units[at]) == here);
            at += inner;
        }
        dx[i] = sum;
        w = moved(w, step, n, inner);
    }
}
