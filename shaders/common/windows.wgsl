// What kernels share that go over images [n, height, width, channels] in windows. This text comes before theirs.
//
// Tap k of window o is the pixel o * stride + k * dilation - before, along both axes; where there is no such pixel,
// there is padding. A place, which is a window or a pixel, is the work of LANES invocations: each makes every LANES-th
// unit of it, and nothing of others.

// knobs
const GROUP: u32 = 64u; // invocations of a workgroup
const LANES: u32 = 1u; // of those, how many share a place
alias E = vec4<f32>; // unit: channels of a pixel; f32 where they are no multiple of 4
const DILATED: bool = false; // the dilation is not 1

struct Params {
    // Along both axes: down and across.
    image: vec2<u32>, // pixels
    windows: vec2<u32>,
    taps: vec2<u32>, // of a window
    stride: vec2<u32>, // pixels from one window to the next
    dilation: vec2<u32>, // pixels from one tap to the next
    before: vec2<u32>, // pixels of padding above and to the left
    units: u32, // of a pixel
    places: u32, // of all images
}

@group(0) @binding(0) var<uniform> p: Params;

struct Place {
    index: u32, // among all
    image: u32,
    at: vec2<u32>, // row and column in its image
    lane: u32, // of the invocation
}

// The place of an invocation, in a grid of this size in each image. There may be no such place.
fn place_of(wid: vec3<u32>, nwg: vec3<u32>, lid: u32, size: vec2<u32>) -> Place {
    let index = (wid.x + wid.y * nwg.x) * (GROUP / LANES) + lid / LANES;
    let row = index / size.y;
    return Place(index, row / size.x, vec2<u32>(row % size.x, index % size.y), lid % LANES);
}

// Index of a pixel, or of a window, in a grid of this size in each image.
fn index_of(image: u32, at: vec2<u32>, size: vec2<u32>) -> u32 {
    return (image * size.x + at.x) * size.y + at.y;
}

// The windows from `first` up to `end` have the pixel, or would if their taps were not `dilation` apart.
struct Around {
    pixel: vec2<u32>, // in the padded image
    first: vec2<u32>,
    end: vec2<u32>,
}

fn around(at: vec2<u32>) -> Around {
    let pixel = at + p.before;
    let reach = (p.taps - 1u) * p.dilation;
    return Around(pixel, (max(pixel, reach) - reach + p.stride - 1u) / p.stride, min(pixel / p.stride + 1u, p.windows));
}

// The sum over these windows of `from_window`, which the text after this one defines: what window `at` of an image has
// for `unit` of its tap `tap`.
fn sum_around(place: Place, a: Around, unit: u32, q: Params) -> E {
    var sum = E();
    for (var row = a.first.x; row < a.end.x; row++) {
        for (var column = a.first.y; column < a.end.y; column++) {
            let at = vec2<u32>(row, column);
            let offset = a.pixel - at * q.stride;
            var tap = offset;
            if (DILATED) {
                tap = offset / q.dilation;
                if (any(tap * q.dilation != offset)) {
                    continue;
                }
            }
            sum += from_window(place.image, at, tap.x * q.taps.y + tap.y, unit, q);
        }
    }
    return sum;
}

// The gradient `dx` of the image, which the text after this one declares.
@compute @workgroup_size(GROUP)
fn backward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let q = p;
    let place = place_of(wid, nwg, lid, q.image);
    if (place.index >= q.places) {
        return;
    }
    let windows = around(place.at);
    for (var unit = place.lane; unit < q.units; unit += LANES) {
        dx[place.index * q.units + unit] = sum_around(place, windows, unit, q);
    }
}
