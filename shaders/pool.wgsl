// What windows of an image have in each channel. `sum`: the sum or mean over the pixels in each. `largest`: the largest
// of them, and the first tap that has it. Padding is never counted. `backward`: each pixel is the sum over its windows
// of what is its own of each: all, a share, or all where it was the largest. After common/windows.wgsl.

// knobs
alias I = vec4<u32>; // a tap for each element of a unit
const MEAN: bool = false; // divide by the number of pixels in the window
const LARGEST: bool = false; // backward: that of `largest`

// sum
@group(0) @binding(1) var<storage, read> x: array<E>; // [n, height, width, units]
@group(0) @binding(2) var<storage, read_write> y: array<E>; // [n, windows down, across, units]

// largest also
@group(0) @binding(3) var<storage, read_write> tap_out: array<I>; // [n, windows down, across, units]

// backward
@group(0) @binding(1) var<storage, read> dy: array<E>; // [n, windows down, across, units]
@group(0) @binding(2) var<storage, read> taps: array<I>; // [n, windows down, across, units], if LARGEST
@group(0) @binding(3) var<storage, read_write> dx: array<E>; // [n, height, width, units]

// The pixels of a window from `first` up to `end`.
struct Inside {
    first: vec2<u32>,
    end: vec2<u32>,
}

fn inside(at: vec2<u32>, q: Params) -> Inside {
    let corner = at * q.stride; // in the padded image
    return Inside(max(corner, q.before) - q.before, min(corner + q.taps, q.image + q.before) - q.before);
}

// The sum over the pixels of a window, or their mean.
fn scaled(v: E, pixels: Inside) -> E {
    let size = pixels.end - pixels.first;
    return select(v, v / f32(size.x * size.y), MEAN);
}

@compute @workgroup_size(GROUP)
fn sum(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let q = p; // loads in a loop are expensive, even of uniforms
    let place = place_of(wid, nwg, lid, q.windows);
    if (place.index >= q.places) {
        return;
    }
    let pixels = inside(place.at, q);
    for (var unit = place.lane; unit < q.units; unit += LANES) {
        var sum = E();
        for (var row = pixels.first.x; row < pixels.end.x; row++) {
            let base = index_of(place.image, vec2<u32>(row, 0u), q.image) * q.units + unit;
            for (var column = pixels.first.y; column < pixels.end.y; column++) {
                sum += x[base + column * q.units];
            }
        }
        y[place.index * q.units + unit] = scaled(sum, pixels);
    }
}

@compute @workgroup_size(GROUP)
fn largest(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let q = p;
    let place = place_of(wid, nwg, lid, q.windows);
    if (place.index >= q.places) {
        return;
    }
    let pixels = inside(place.at, q);
    let to_tap = q.before - place.at * q.stride; // what leads from a pixel to its tap; it may wrap
    for (var unit = place.lane; unit < q.units; unit += LANES) {
        let first = pixels.first + to_tap;
        var top = x[index_of(place.image, pixels.first, q.image) * q.units + unit];
        var best = I(first.x * q.taps.y + first.y);
        for (var row = pixels.first.x; row < pixels.end.x; row++) {
            let base = index_of(place.image, vec2<u32>(row, 0u), q.image) * q.units + unit;
            for (var column = pixels.first.y; column < pixels.end.y; column++) {
                let v = x[base + column * q.units];
                let tap = vec2<u32>(row, column) + to_tap;
                best = select(best, I(tap.x * q.taps.y + tap.y), v > top);
                top = max(top, v);
            }
        }
        y[place.index * q.units + unit] = top;
        tap_out[place.index * q.units + unit] = best;
    }
}

fn from_window(image: u32, at: vec2<u32>, tap: u32, unit: u32, q: Params) -> E {
    let i = index_of(image, at, q.windows) * q.units + unit;
    if (LARGEST) {
        return select(E(), dy[i], taps[i] == I(tap));
    }
    return scaled(dy[i], inside(at, q));
}
