// The large tensor consists of runs of `stride` units; the small one, a slice of it, of runs of `run`
// units, which lie `start` units into the large one's runs. `forward`: small = slice of large. `pad`,
// its dual: large = small with zeros around it, or large += small.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // units that an invocation goes over, INVOCATIONS apart
alias E = vec4<u32>; // unit that moves: u32 where runs or starts are no multiple of 4; pad: floats
const ACCUMULATE: bool = false; // pad adds to what the large tensor holds, and goes over the small one only

struct Params {
    len: u32, // units to go over
    run: u32,
    stride: u32,
    start: u32,
}

@group(0) @binding(0) var<uniform> p: Params;

@group(0) @binding(1) var<storage, read> x: array<E>; // [runs, stride]; pad: [runs, run]
@group(0) @binding(2) var<storage, read_write> y: array<E>; // [runs, run]; pad: [runs, stride]

// Steps of INVOCATIONS units through runs. They count along, since divisions are expensive.
struct Walk {
    at: u32, // unit in its run
    base: u32, // where this run starts in the other tensor
    period: u32, // units of a run
    pitch: u32, // units of a run in the other tensor
    step: u32, // what a step adds to `at`, before wrapping
    skip: u32, // and to `base`
}

fn walk(i: u32, period: u32, pitch: u32) -> Walk {
    return Walk(i % period, i / period * pitch, period, pitch, INVOCATIONS % period, INVOCATIONS / period * pitch);
}

fn next(w: Walk) -> Walk {
    var n = w;
    n.at += w.step;
    n.base += w.skip;
    if (n.at >= w.period) {
        n.at -= w.period;
        n.base += w.pitch;
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
    let start = p.start;
    var w = walk(first, p.run, p.stride);
    for (var i = first; i < end; i += INVOCATIONS) {
        y[i] = x[w.base + start + w.at];
        w = next(w);
    }
}

@compute @workgroup_size(INVOCATIONS)
fn pad(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    let start = p.start;
    let run = p.run;
    if (ACCUMULATE) {
        var w = walk(first, run, p.stride);
        for (var i = first; i < end; i += INVOCATIONS) {
            y[w.base + start + w.at] += x[i];
            w = next(w);
        }
        return;
    }
    var w = walk(first, p.stride, run);
    for (var i = first; i < end; i += INVOCATIONS) {
        var v = E();
        if (w.at >= start && w.at - start < run) {
            v = x[w.base + w.at - start];
        }
        y[i] = v;
        w = next(w);
    }
}
