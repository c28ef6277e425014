// The K largest logits of each row, in order, and the log of the row's sum of
// exp((x - largest) / temperature).
//
// Logits are compared as integers in the order of their values, so that nothing depends on what an adapter
// makes of NaN, infinities or denormals. Equal logits are in the order of their ids. For the same reason, a
// sum that includes NaN is ODD until the end, which writes the bits of NaN.
//
// `chunks` and `pick` are for software adapters. A row is cut into about sqrt(n) chunks; for each chunk an
// invocation finds the first element, in order, and the chunk's share of the sum. Then, K times, one
// invocation for each row takes the first of these elements and looks for the next one in the chunk that
// it came from: about sqrt(n) loads each time.
//
// `sorted` is for GPUs: a workgroup sorts up to SIZE elements and keeps the first K. What the workgroups of
// a row keep goes through the same kernel again, until one workgroup has it all.

// knobs
const GROUP: u32 = 8u; // invocations of a workgroup
const K: u32 = 40u;
const SIZE: u32 = 1024u; // sorted: elements that a workgroup sorts; a power of two, at least K
const FIRST: bool = true; // sorted: takes logits, not what other workgroups kept
const LAST: bool = true; // sorted: one workgroup a row, which takes the log
const BY_ROW: bool = false; // there is a temperature for each row

struct Params {
    rows: u32,
    n: u32, // elements of a row: logits, or, in sorted, what other workgroups kept
    groups: u32, // chunks of a row, a multiple of 4; in sorted, workgroups of a row
    span: u32, // quads of a chunk; in sorted, elements of a workgroup
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(2) var<storage, read> temperature: array<f32>; // [1], or [rows] if BY_ROW

// chunks, and pick; logits are read as bits, in quads that may span two rows
@group(0) @binding(1) var<storage, read> logits: array<vec4<u32>>; // [rows, n] in elements
@group(0) @binding(3) var<storage, read_write> first_keys_out: array<u32>; // [rows, groups]
@group(0) @binding(4) var<storage, read_write> first_places_out: array<u32>; // [rows, groups]
@group(0) @binding(5) var<storage, read_write> sums_out: array<f32>; // [rows, groups]

// pick: of each chunk, the first element that has not been taken yet
@group(0) @binding(3) var<storage, read_write> first_keys: array<vec4<u32>>; // [rows, groups / 4] of vec4
@group(0) @binding(4) var<storage, read_write> first_places: array<u32>; // [rows, groups]
@group(0) @binding(5) var<storage, read> sums: array<f32>; // [rows, groups]
@group(0) @binding(6) var<storage, read_write> values: array<u32>; // [rows, K], the bits of floats
@group(0) @binding(7) var<storage, read_write> ids: array<u32>; // [rows, K]
@group(0) @binding(8) var<storage, read_write> lse: array<u32>; // [rows], the bits of floats

// sorted
@group(0) @binding(1) var<storage, read> from_values: array<u32>; // [rows, n], the bits of floats
@group(0) @binding(3) var<storage, read> from_ids: array<u32>; // [rows, n], if not FIRST
@group(0) @binding(4) var<storage, read> from_sums: array<f32>; // [rows, n / K], if not FIRST
@group(0) @binding(5) var<storage, read_write> to_values: array<u32>; // [rows, groups, K], the bits of floats
@group(0) @binding(6) var<storage, read_write> to_ids: array<u32>; // [rows, groups, K]
@group(0) @binding(7) var<storage, read_write> to_sums: array<u32>; // [rows, groups], the bits of floats

const SIGN: u32 = 0x80000000u;
const INFINITY: u32 = 0x7f800000u;
const NAN: u32 = 0x7fc00000u;
const NOTHING: u32 = 0u; // below the key of every logit
const MINUS_INFINITY: u32 = 0x007fffffu; // its key
const ODD: f32 = -1e30; // a sum that includes NaN: it stays negative whatever is added
const LOW: u32 = 0x01698966u; // keys of -1e38 and 1e38
const HIGH: u32 = 0xfe967699u;

// The key of a logit: keys are integers in the order of the logits. NaN counts as -infinity.
fn key_of(bits: vec4<u32>) -> vec4<u32> {
    let key = select(bits | vec4<u32>(SIGN), ~bits, (bits & vec4<u32>(SIGN)) != vec4<u32>());
    return select(key, vec4<u32>(MINUS_INFINITY), is_nan(bits));
}

fn is_nan(bits: vec4<u32>) -> vec4<bool> {
    return (bits & vec4<u32>(~SIGN)) > vec4<u32>(INFINITY);
}

// The bits of a sum's logarithm, or of NaN.
fn log_bits(sum: f32) -> u32 {
    return select(bitcast<u32>(log(abs(sum))), NAN, sum < 0.0);
}

fn bits_of(key: vec4<u32>) -> vec4<u32> {
    return select(~key, key & vec4<u32>(~SIGN), (key & vec4<u32>(SIGN)) != vec4<u32>());
}

// Bounded, so that differences are finite.
fn logit_of(key: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(bits_of(clamp(key, vec4<u32>(LOW), vec4<u32>(HIGH))));
}

// What divides the logits of a row. A temperature of 0 stands for the limit, in which the sum counts how
// many logits are the largest.
fn divisor(row: u32) -> f32 {
    return clamp(temperature[select(0u, row, BY_ROW)], 1e-30, 1e30);
}

// exp((x - top) / by) for the logits x of these keys, none of which is above `top`. exp(-200) is 0 in f32.
fn weights(keys: vec4<u32>, top: u32, by: f32) -> vec4<f32> {
    let below = logit_of(keys) - logit_of(vec4<u32>(top));
    return exp(max(below, vec4<f32>(-200.0 * by)) * (1.0 / by));
}

// ---- software adapters ----

struct Chunk {
    key: u32, // of the first element that may be taken
    place: u32, // its index among all logits
    sum: f32, // of exp((x - largest) / temperature) over all elements, or ODD
}

fn largest(v: vec4<u32>) -> u32 {
    return max(max(v.x, v.y), max(v.z, v.w));
}

// The first index at which a quad has `key`.
fn index_of(key: u32, v: vec4<u32>) -> u32 {
    return select(select(select(3u, 2u, v.z == key), 1u, v.y == key), 0u, v.x == key);
}

fn places_of(quad: u32) -> vec4<u32> {
    return quad * 4u + vec4<u32>(0u, 1u, 2u, 3u);
}

fn logits_of(quad: u32) -> vec4<u32> {
    return logits[min(quad, (p.rows * p.n - 1u) / 4u)];
}

// The keys of a quad of the row. At the row's ends a quad may hold elements of other rows, or padding: for
// those it is NOTHING.
fn keys_of(bits: vec4<u32>, row: u32, quad: u32) -> vec4<u32> {
    let mine = (places_of(quad) - row * p.n) < vec4<u32>(p.n);
    return select(vec4<u32>(NOTHING), key_of(bits), mine);
}

// Those of the keys that come after (key, place) in order; NOTHING for the others.
fn after(keys: vec4<u32>, quad: u32, key: u32, place: u32) -> vec4<u32> {
    let equal = keys == vec4<u32>(key);
    let later = (keys < vec4<u32>(key)) | (equal & (places_of(quad) > vec4<u32>(place)));
    return select(vec4<u32>(NOTHING), keys, later);
}

// Goes through a chunk, for its first element after (key, place).
fn look(row: u32, chunk: u32, key: u32, place: u32, by: f32) -> Chunk {
    let start = row * p.n / 4u + chunk * p.span;
    var found = Chunk(NOTHING, 0u, 0.0);
    var top = NOTHING;
    var at = start;
    var odd = vec4<bool>();
    for (var quad = start; quad < start + p.span; quad++) {
        let bits = logits_of(quad);
        let keys = keys_of(bits, row, quad);
        odd = odd | (is_nan(bits) & (keys != vec4<u32>(NOTHING)));
        let new_top = max(top, largest(keys));
        let more = select(weights(keys, new_top, by), vec4<f32>(), keys == vec4<u32>(NOTHING));
        found.sum = found.sum * weights(vec4<u32>(top), new_top, by).x + dot(more, vec4<f32>(1.0));
        top = new_top;
        let first = largest(after(keys, quad, key, place));
        at = select(at, quad, first > found.key);
        found.key = max(first, found.key);
    }
    found.sum = select(found.sum, ODD, any(odd));
    found.place = at * 4u + index_of(found.key, after(keys_of(logits_of(at), row, at), at, key, place));
    return found;
}

@compute @workgroup_size(GROUP)
fn chunks(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * GROUP + lid;
    if (i >= p.rows * p.groups) {
        return;
    }
    let row = i / p.groups;
    let found = look(row, i % p.groups, ~NOTHING, 0u, divisor(row));
    first_keys_out[i] = found.key;
    first_places_out[i] = found.place;
    sums_out[i] = found.sum;
}

// The chunk of a row whose first element comes first; of several with equal elements, the first chunk.
fn first_chunk(row: u32) -> u32 {
    var key = NOTHING;
    var at = 0u;
    for (var quad = row * p.groups / 4u; quad < (row + 1u) * p.groups / 4u; quad++) {
        let first = largest(first_keys[quad]);
        at = select(at, quad, first > key);
        key = max(first, key);
    }
    return at * 4u + index_of(key, first_keys[at]);
}

@compute @workgroup_size(GROUP)
fn pick(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let row = (wid.x + wid.y * nwg.x) * GROUP + lid;
    if (row >= p.rows) {
        return;
    }
    let by = divisor(row);
    for (var i = 0u; i < K; i++) {
        let chunk = first_chunk(row);
        let key = first_keys[chunk / 4u][chunk % 4u];
        let place = first_places[chunk];
        if (i == 0u) {
            var sum = 0.0;
            var odd = false;
            for (var c = row * p.groups; c < (row + 1u) * p.groups; c += 4u) {
                let shares = vec4<f32>(sums[c], sums[c + 1u], sums[c + 2u], sums[c + 3u]);
                sum += dot(shares, weights(first_keys[c / 4u], key, by));
                odd = odd || any(shares < vec4<f32>());
            }
            lse[row] = log_bits(select(sum, ODD, odd));
        }
        values[row * K + i] = bits_of(vec4<u32>(key)).x;
        ids[row * K + i] = place - row * p.n;
        let next = look(row, chunk - row * p.groups, key, place, by);
        first_keys[chunk / 4u][chunk % 4u] = next.key;
        first_places[chunk] = next.place;
    }
}

// ---- GPUs ----

const NOBODY: u32 = 0xffffffffu; // id of padding: comes after all others

var<workgroup> entries: array<vec2<u32>, SIZE>; // keys and ids
var<workgroup> partial: array<f32, GROUP>;

fn before(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.x > b.x || (a.x == b.x && a.y < b.y);
}

// Bitonic sort (Batcher 1968).
fn sort(lid: u32) {
    for (var run = 2u; run <= SIZE; run *= 2u) {
        for (var step = run / 2u; step > 0u; step /= 2u) {
            for (var i = lid; i < SIZE / 2u; i += GROUP) {
                let left = 2u * i - (i & (step - 1u));
                let a = entries[left];
                let b = entries[left + step];
                // Every other run goes the other way.
                if (select(before(a, b), before(b, a), (left & run) == 0u)) {
                    entries[left] = b;
                    entries[left + step] = a;
                }
            }
            workgroupBarrier();
        }
    }
}

@compute @workgroup_size(GROUP)
fn sorted(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.rows * p.groups) {
        return;
    }
    let start = group % p.groups * p.span;
    let count = min(p.span, p.n - start);
    let base = group / p.groups * p.n + start;
    var odd = false;
    for (var i = lid; i < SIZE; i += GROUP) {
        var entry = vec2<u32>(MINUS_INFINITY, NOBODY);
        if (i < count) {
            let bits = vec4<u32>(from_values[base + i]);
            odd = odd || is_nan(bits).x;
            entry = vec2<u32>(key_of(bits).x, start + i);
            if (!FIRST) {
                entry.y = from_ids[base + i];
            }
        }
        entries[i] = entry;
    }
    workgroupBarrier();
    sort(lid);
    let by = divisor(group / p.groups);
    let top = entries[0].x;
    var sum = 0.0;
    if (FIRST) {
        for (var i = lid; i < count; i += GROUP) {
            sum += weights(vec4<u32>(entries[i].x), top, by).x;
        }
    } else {
        // There is a sum for each K of the elements, relative to the first of these.
        for (var part = base / K + lid; part < (base + count) / K; part += GROUP) {
            let key = key_of(vec4<u32>(from_values[part * K]));
            sum += from_sums[part] * weights(key, top, by).x;
            odd = odd || from_sums[part] < 0.0;
        }
    }
    partial[lid] = select(sum, ODD, odd);
    workgroupBarrier();
    for (var step = GROUP / 2u; step > 0u; step /= 2u) {
        if (lid < step) {
            partial[lid] += partial[lid + step];
        }
        workgroupBarrier();
    }
    if (lid == 0u) {
        let all = select(partial[0], ODD, partial[0] < 0.0);
        to_sums[group] = select(bitcast<u32>(all), log_bits(all), LAST);
    }
    for (var i = lid; i < K; i += GROUP) {
        to_values[group * K + i] = bits_of(vec4<u32>(entries[i].x)).x;
        to_ids[group * K + i] = entries[i].y;
    }
}
