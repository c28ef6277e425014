// Rotates each pair (a, b) of a head by position * frequency.
//
// WGSL promises little about sin and cos past pi, and in f32 position * frequency loses its fraction of
// a turn as it grows. So angles are integers, in units of 2^-32 turns, where wrapping drops whole turns
// exactly. `halves` pairs element j of a head with j + dh / 2; `interleaved` pairs neighbours.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // steps of `len` that an invocation makes, INVOCATIONS apart
alias E = vec4<f32>; // f32 where half a head is no multiple of 4, and for `interleaved`
alias U = vec4<u32>; // u32 likewise
alias I = vec4<i32>; // i32 likewise
const UNITS: u32 = 8u; // of E in half a head
const HAS_START: bool = false; // positions of sequence b count from start[b], not from 0
const INTO_CACHE: bool = false; // y is a cache, where row t of sequence b is row place[b] + t

// Turns per position, without whole turns, in units of 2^-48: the 32 high bits and the 16 low ones.
struct Frequency {
    @align(16) high: U,
    @align(16) low: U,
}

struct Params {
    len: u32, // UNITS * groups * rows
    time: u32, // rows of a sequence
    heads: u32,
    group: u32, // heads that an invocation rotates
    groups: u32, // of heads
    sign: f32, // -1 rotates back
    capacity: u32, // INTO_CACHE: rows of a sequence of the cache
    @align(16) frequencies: array<Frequency, UNITS>,
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> start: array<u32>; // [batch], if HAS_START
@group(0) @binding(4) var<storage, read> place: array<u32>; // [batch], if INTO_CACHE

// halves
@group(0) @binding(1) var<storage, read> x: array<E>; // [rows, heads, 2, UNITS]
@group(0) @binding(3) var<storage, read_write> y: array<E>; // [rows or cache rows, heads, 2, UNITS]

// interleaved
@group(0) @binding(1) var<storage, read> pairs: array<vec2<f32>>; // [rows, heads, UNITS] of pairs
@group(0) @binding(3) var<storage, read_write> pairs_out: array<vec2<f32>>; // [rows or cache rows, heads, UNITS] of pairs

// One step of an invocation: unit `unit` of heads `first` to `end`, counted over all rows.
struct Work {
    unit: u32,
    first: u32,
    end: u32,
    shift: u32, // from a head of x to the same of y, in heads; it may wrap
    cos: E,
    sin: E,
}

fn work(i: u32) -> Work {
    let unit = i % UNITS;
    let row = i / UNITS / p.groups;
    let first = i / UNITS % p.groups * p.group;
    var position = row % p.time;
    if (HAS_START) {
        position += start[row / p.time];
    }
    var shift = 0u;
    var count = min(p.group, p.heads - first);
    if (INTO_CACHE) {
        // Rows past the end of the cache are left out. Places past it are clamped, so that sums do not wrap.
        let sequence = row / p.time;
        let to = min(place[sequence], p.capacity) + row % p.time;
        shift = (sequence * p.capacity + to - row) * p.heads;
        count = select(0u, count, to < p.capacity);
    }
    // The position in two halves, so that its product with the low bits fits.
    let f = p.frequencies[unit];
    let angle = f.high * position + f.low * (position >> 16u) + ((f.low * (position & 0xffffu)) >> U(16u));
    // The nearest quarter turn, and the rest, which is at most an eighth of a turn.
    let quarter = (angle + U(1u << 29u)) >> U(30u);
    let r = E(I(angle - (quarter << U(30u)))) * 1.46291807927e-9; // 2 pi / 2^32
    // The polynomials of Cephes (Moshier 1989), good to f32.
    let z = r * r;
    let s = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4));
    let c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5));
    let swapped = (quarter & U(1u)) != U();
    let sin = select(s, c, swapped);
    let cos = select(c, s, swapped);
    return Work(
        unit,
        row * p.heads + first,
        row * p.heads + first + count,
        shift,
        select(cos, -cos, ((quarter + U(1u)) & U(2u)) != U()),
        p.sign * select(sin, -sin, (quarter & U(2u)) != U()),
    );
}

@compute @workgroup_size(INVOCATIONS)
fn halves(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let start = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(start + INVOCATIONS * EACH, p.len);
    for (var i = start; i < end; i += INVOCATIONS) {
        let w = work(i);
        for (var head = w.first; head < w.end; head++) {
            let at = head * 2u * UNITS + w.unit;
            let a = x[at];
            let b = x[at + UNITS];
            let to = at + w.shift * 2u * UNITS;
            y[to] = a * w.cos - b * w.sin;
            y[to + UNITS] = b * w.cos + a * w.sin;
        }
    }
}

@compute @workgroup_size(INVOCATIONS)
fn interleaved(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let start = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(start + INVOCATIONS * EACH, p.len);
    for (var i = start; i < end; i += INVOCATIONS) {
        let w = work(i);
        // E is f32 here, but the file as written must be valid with vec4<f32>, too.
        let cos = vec4<f32>(w.cos).x;
        let sin = vec4<f32>(w.sin).x;
        for (var head = w.first; head < w.end; head++) {
            let at = head * UNITS + w.unit;
            let v = pairs[at];
            pairs_out[at + w.shift * UNITS] = v * cos + vec2<f32>(-v.y, v.x) * sin;
        }
    }
}
