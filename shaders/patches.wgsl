// `forward`: each window of an image as a row, tap by tap, with zeros for padding. `backward`, its dual: each pixel is
// the sum of its copies in all windows, in the order of windows. After common/windows.wgsl.

// forward
@group(0) @binding(1) var<storage, read> x: array<E>; // [n, height, width, units]
@group(0) @binding(2) var<storage, read_write> rows: array<E>; // [n, windows down, across, taps down, across, units]

// backward
@group(0) @binding(1) var<storage, read> drows: array<E>; // [n, windows down, across, taps down, across, units]
@group(0) @binding(2) var<storage, read_write> dx: array<E>; // [n, height, width, units]

@compute @workgroup_size(GROUP)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let q = p; // loads in a loop are expensive, even of uniforms
    let place = place_of(wid, nwg, lid, q.windows);
    if (place.index >= q.places) {
        return;
    }
    let length = q.taps.x * q.taps.y * q.units;
    let row = place.index * length;
    let corner = place.at * q.stride - q.before; // above or to the left of the image it wraps to a large number
    // Unit and tap count along with i, since divisions are expensive.
    let ahead = LANES / q.units;
    let step = vec2<u32>(ahead / q.taps.y, ahead % q.taps.y);
    let unit_step = LANES % q.units;
    var unit = place.lane % q.units;
    var tap = vec2<u32>(place.lane / q.units / q.taps.y, place.lane / q.units % q.taps.y);
    for (var i = place.lane; i < length; i += LANES) {
        let pixel = corner + tap * q.dilation;
        var v = E();
        if (all(pixel < q.image)) {
            v = x[index_of(place.image, pixel, q.image) * q.units + unit];
        }
        rows[row + i] = v;
        unit += unit_step;
        tap += step;
        if (unit >= q.units) {
            unit -= q.units;
            tap.y++;
        }
        if (tap.y >= q.taps.y) {
            tap.y -= q.taps.y;
            tap.x++;
        }
    }
}

fn from_window(image: u32, at: vec2<u32>, tap: u32, unit: u32, q: Params) -> E {
    return drows[(index_of(image, at, q.windows) * (q.taps.x * q.taps.y) + tap) * q.units + unit];
}
