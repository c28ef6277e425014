// Weights that stay as files store them, in blocks of few bits, and are decoded where they are used.
//
// A matrix is [n, k]: row after row, each of k / 32 units of 32 elements. `unit` decodes one. The
// formats are ggml's; the layout of a block is at each decoder.
//
// After common/subgroups.wgsl or no_subgroups.wgsl.

// knobs
const FORMAT: u32 = Q4_1; // one of the ten below
const GROUP: u32 = 8u; // invocations of a workgroup, of which SLICES share a column of y and split k
const SLICES: u32 = 1u;
const ROWS: u32 = 1u; // sums of an invocation: ROWS x COLS
const COLS: u32 = 1u;

const F16: u32 = 0u;
const BF16: u32 = 1u;
const Q4_0: u32 = 2u;
const Q4_1: u32 = 3u;
const Q5_0: u32 = 4u;
const Q5_1: u32 = 5u;
const Q8_0: u32 = 6u;
const Q4_K: u32 = 7u;
const Q5_K: u32 = 8u;
const Q6_K: u32 = 9u;

struct Params {
    m: u32, // rows of x; in `rows`, tokens
    n: u32,
    units: u32, // of a row: k / 32
    groups_n: u32, // workgroups along n, or along k backward
    groups: u32,
    has_bias: u32,
    accumulate: u32, // add to what the output holds
    last: u32, // index of the last word of w
    first: u32, // id of the first row
    since: u32, // the rows of w that `backward` takes
    until: u32,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> w: array<u32>; // [last + 1]: the words of [n, units] in FORMAT

// rows: y[t] = w[ids[t] - first], zeros where there is no such row; an id below `first` wraps far above n
@group(0) @binding(2) var<storage, read> ids: array<u32>; // [m]
@group(0) @binding(3) var<storage, read_write> rows_out: array<vec4<f32>>; // [m, units, 8] of vec4

// forward: y = x w^T + bias
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>; // [m, units, 8] of vec4
@group(0) @binding(3) var<storage, read> bias: array<f32>; // [n], if has_bias
@group(0) @binding(4) var<storage, read_write> y: array<f32>; // [m, n]

// backward: dx = dy w
@group(0) @binding(2) var<storage, read> dy: array<f32>; // [m, n]
@group(0) @binding(3) var<storage, read_write> dx: array<vec4<f32>>; // [m, units, 8] of vec4

alias Unit = array<vec4<f32>, 8>;

// Four bytes from an even address.
fn word(byte: u32) -> u32 {
    let low = w[min(byte / 4u, p.last)];
    if (FORMAT != Q4_0 && FORMAT != Q5_0 && FORMAT != Q8_0 && FORMAT != Q6_K) {
        return low; // blocks of whole words
    }
    let high = w[min(byte / 4u + 1u, p.last)];
    return select(low, (low >> 16u) | (high << 16u), byte % 4u != 0u);
}

fn nibbles(word: u32, shift: u32) -> vec4<u32> {
    return (vec4<u32>(word) >> (vec4<u32>(0u, 8u, 16u, 24u) + vec4<u32>(shift))) & vec4<u32>(15u);
}

fn bytes(word: u32) -> vec4<u32> {
    return (vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u);
}

fn signed_bytes(word: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(vec4<u32>(word) << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4<u32>(24u));
}

// Bit `shift` of the word, for each of four, as 16 or 0.
fn fifth_bits(word: u32, shift: vec4<u32>) -> vec4<u32> {
    return ((vec4<u32>(word) >> shift) & vec4<u32>(1u)) << vec4<u32>(4u);
}

// Two bytes for each element.
fn halves(index: u32) -> Unit {
    var q: Unit;
    for (var i = 0u; i < 8u; i++) { // unroll
        let a = word(64u * index + 8u * i);
        let b = word(64u * index + 8u * i + 4u);
        if (FORMAT == F16) {
            q[i] = vec4<f32>(unpack2x16float(a), unpack2x16float(b));
        } else {
            q[i] = bitcast<vec4<f32>>(vec4<u32>(a << 16u, a & 0xffff0000u, b << 16u, b & 0xffff0000u));
        }
    }
    return q;
}

// d [, m] as halves, [32 fifth bits,] 16 bytes: the low nibbles are elements 0 to 15, the high ones 16
// to 31. x = d * (q - 8) or d * q + m; with a fifth bit, q - 16.
fn small_block(index: u32) -> Unit {
    const with_min = FORMAT == Q4_1 || FORMAT == Q5_1;
    const fifth = FORMAT == Q5_0 || FORMAT == Q5_1;
    const head = select(2u, 4u, with_min);
    const size = head + select(0u, 4u, fifth) + 16u;
    let start = size * index;
    let dm = unpack2x16float(word(start));
    var high = 0u;
    if (fifth) {
        high = word(start + head);
    }
    var q: Unit;
    for (var i = 0u; i < 4u; i++) { // unroll
        let packed = word(start + size - 16u + 4u * i);
        for (var half = 0u; half < 2u; half++) { // unroll
            var v = nibbles(packed, 4u * half);
            if (fifth) {
                v |= fifth_bits(high, vec4<u32>(0u, 1u, 2u, 3u) + vec4<u32>(4u * i + 16u * half));
            }
            if (with_min) {
                q[i + 4u * half] = vec4<f32>(v) * dm.x + vec4<f32>(dm.y);
            } else {
                q[i + 4u * half] = (vec4<f32>(v) - vec4<f32>(select(8.0, 16.0, fifth))) * dm.x;
            }
        }
    }
    return q;
}

// d as half, 32 signed bytes: x = d * q.
fn byte_block(index: u32) -> Unit {
    let start = 34u * index;
    let d = unpack2x16float(word(start)).x;
    var q: Unit;
    for (var i = 0u; i < 8u; i++) { // unroll
        q[i] = signed_bytes(word(start + 2u + 4u * i)) * d;
    }
    return q;
}

// 256 elements: d and dmin as halves, 12 bytes with eight 6-bit scales and mins, [32 bytes of fifth
// bits,] 128 bytes of nibbles, of which 32 hold two units. x = d * scale * q - dmin * min.
fn k_block(index: u32) -> Unit {
    const fifth = FORMAT == Q5_K;
    const size = select(144u, 176u, fifth);
    let start = size * (index / 8u);
    let s = index % 8u; // unit of the block
    let dm = unpack2x16float(word(start));
    let low = word(start + 4u);
    let middle = word(start + 8u);
    let top = word(start + 12u);
    let at = 8u * (s % 4u);
    var scale = (low >> at) & 63u;
    var least = (middle >> at) & 63u;
    if (s >= 4u) {
        scale = ((top >> at) & 15u) | (((low >> (at + 6u)) & 3u) << 4u);
        least = ((top >> (at + 4u)) & 15u) | (((middle >> (at + 6u)) & 3u) << 4u);
    }
    let d = dm.x * f32(scale);
    let m = dm.y * f32(least);
    var q: Unit;
    for (var i = 0u; i < 8u; i++) { // unroll
        var v = nibbles(word(start + size - 128u + 32u * (s / 2u) + 4u * i), 4u * (s % 2u));
        if (fifth) {
            v |= fifth_bits(word(start + 16u + 4u * i), vec4<u32>(0u, 8u, 16u, 24u) + vec4<u32>(s));
        }
        q[i] = vec4<f32>(v) * d - vec4<f32>(m);
    }
    return q;
}

// 256 elements: 128 bytes of low nibbles, 64 of two high bits each, 16 signed scales, d as half.
// x = d * scale * (q - 32); 16 elements share a scale.
fn six_bit_block(index: u32) -> Unit {
    let start = 210u * (index / 8u);
    let s = index % 8u;
    let part = s % 4u; // of 128 elements
    let d = unpack2x16float(word(start + 208u)).x;
    let scales = signed_bytes(word(start + 192u + 8u * (s / 4u) + 4u * (part / 2u)));
    var q: Unit;
    for (var i = 0u; i < 8u; i++) { // unroll
        let low = nibbles(word(start + 64u * (s / 4u) + 32u * (part % 2u) + 4u * i), 4u * (part / 2u));
        let high = word(start + 128u + 32u * (s / 4u) + 4u * i);
        let high_bits = (vec4<u32>(high) >> (vec4<u32>(0u, 8u, 16u, 24u) + vec4<u32>(2u * part))) & vec4<u32>(3u);
        let v = low | (high_bits << vec4<u32>(4u));
        let scale = scales[2u * (part % 2u) + i / 4u];
        q[i] = (vec4<f32>(v) - vec4<f32>(32.0)) * (d * scale);
    }
    return q;
}

// The 32 elements of unit `index`, counted over the whole matrix.
fn unit(index: u32) -> Unit {
    if (FORMAT == F16 || FORMAT == BF16) {
        return halves(index);
    }
    if (FORMAT == Q8_0) {
        return byte_block(index);
    }
    if (FORMAT == Q6_K) {
        return six_bit_block(index);
    }
    if (FORMAT == Q4_K || FORMAT == Q5_K) {
        return k_block(index);
    }
    return small_block(index);
}

// Each invocation decodes one unit.
@compute @workgroup_size(GROUP)
fn rows(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * GROUP + lid;
    if (i >= p.m * p.units) {
        return;
    }
    let id = ids[i / p.units] - p.first;
    var q: Unit;
    if (id < p.n) {
        q = unit(id * p.units + i % p.units);
    }
    for (var j = 0u; j < 8u; j++) { // unroll
        rows_out[8u * i + j] = q[j];
    }
}

var<workgroup> partial: array<f32, GROUP * ROWS * COLS>;

// An invocation sums ROWS x COLS elements of y over every SLICES-th unit of k. With SLICES > 1,
// neighbours take neighbouring units of one row of w, so that they load neighbouring memory.
@compute @workgroup_size(GROUP)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let slice = lid % SLICES;
    let row0 = (group / p.groups_n) * ROWS;
    let col0 = ((group % p.groups_n) * (GROUP / SLICES) + lid / SLICES) * COLS;
    var acc: array<array<vec4<f32>, COLS>, ROWS>;
    let units = p.units;
    for (var u0 = 0u; u0 < units; u0 += SLICES) {
        let u = min(u0 + slice, units - 1u);
        var ws: array<Unit, COLS>;
        for (var c = 0u; c < COLS; c++) { // unroll
            ws[c] = unit(min(col0 + c, p.n - 1u) * units + u);
        }
        for (var r = 0u; r < ROWS; r++) { // unroll
            let at = (min(row0 + r, p.m - 1u) * units + u) * 8u;
            // With subgroups, which all share a slice, each lane loads a quad and hands it round.
            var mine: vec4<f32>;
            if (SUBGROUPS) {
                mine = x[at + lid % 8u];
            }
            for (var i = 0u; i < 8u; i++) { // unroll
                var v: vec4<f32>;
                if (SUBGROUPS) {
                    v = from_lane(mine, i);
                } else {
                    v = x[at + i];
                }
                if (SLICES > 1u) {
                    v = select(vec4<f32>(), v, u0 + slice < units);
                }
                for (var c = 0u; c < COLS; c++) { // unroll
                    acc[r][c] = fma(v, ws[c][i], acc[r][c]);
                }
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var c = 0u; c < COLS; c++) { // unroll
            partial[(r * COLS + c) * GROUP + lid] = dot(acc[r][c], vec4<f32>(1.0));
        }
    }
    // Sums over slices, in a fixed order.
    for (var step = SLICES / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if (slice < step) {
            for (var i = 0u; i < ROWS * COLS; i++) {
                partial[i * GROUP + lid] += partial[i * GROUP + lid + step];
            }
        }
    }
    if (slice == 0u) {
        for (var row = row0; row < min(row0 + ROWS, p.m); row++) {
            for (var col = col0; col < min(col0 + COLS, p.n); col++) {
                var v = partial[((row - row0) * COLS + col - col0) * GROUP + lid];
                if (p.has_bias != 0u) {
                    v += bias[col];
                }
                if (p.accumulate != 0u) {
                    v += y[row * p.n + col];
                }
                y[row * p.n + col] = v;
            }
        }
    }
}

// dx = dy w. An invocation makes one unit of ROWS rows.
@compute @workgroup_size(GROUP)
fn backward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * ROWS;
    let at = (group % p.groups_n) * GROUP + lid;
    let u = min(at, p.units - 1u);
    var acc: array<Unit, ROWS>;
    let until = p.until;
    for (var col = p.since; col < until; col++) {
        let ws = unit(col * p.units + u);
        for (var r = 0u; r < ROWS; r++) { // unroll
            let d = dy[min(row0 + r, p.m - 1u) * p.n + col];
            for (var i = 0u; i < 8u; i++) { // unroll
                acc[r][i] = fma(vec4<f32>(d), ws[i], acc[r][i]);
            }
        }
    }
    if (at >= p.units) {
        return;
    }
    for (var r = 0u; r < ROWS; r++) { // unroll
        if (row0 + r < p.m) {
            for (var i = 0u; i < 8u; i++) { // unroll
                let to = ((row0 + r) * p.units + u) * 8u + i;
                var v = acc[r][i];
                if (p.accumulate != 0u) {
                    v += dx[to];
                }
                dx[to] = v;
            }
        }
    }
}
