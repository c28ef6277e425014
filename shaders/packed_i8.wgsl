// Packed products of few rows with x in 8 bits, by integer dot products of four elements at a time; after
// common/subgroups.wgsl or no_subgroups.wgsl, packed/decode.wgsl, packed/shared.wgsl, packed/store.wgsl and
// packed/teams.wgsl.

// `quantize`: each unit of x as 32 signed bytes and a scale. Then y = x w^T + bias of those.
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>; // [m, units, 8] of vec4
@group(0) @binding(2) var<storage, read_write> rounded_out: array<u32>; // [m, units, 9]: all words, then all scales

@group(0) @binding(2) var<storage, read> rounded: array<u32>; // [m, units, 9]

@compute @workgroup_size(GROUP)
fn quantize(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * GROUP + lid;
    let count = p.m * p.units;
    if (i >= count) {
        return;
    }
    var q: Unit;
    var bits: vec4<u32>;
    for (var j = 0u; j < 8u; j++) { // unroll
        q[j] = x[8u * i + j];
        bits = max(bits, bitcast<vec4<u32>>(q[j]) & vec4<u32>(0x7fffffffu));
    }
    // Bits of magnitudes sort as these do, and NaN after all others. It gets into the scale, and so into y.
    let pair = max(bits.xy, bits.zw);
    let most = bitcast<f32>(max(pair.x, pair.y));
    var inverse = 0.0;
    if (most > 1e-30 && most < 3e38) {
        inverse = 127.0 / most;
    }
    for (var j = 0u; j < 8u; j++) { // unroll
        rounded_out[8u * i + j] = pack4xI8(vec4<i32>(round(q[j] * inverse)));
    }
    rounded_out[8u * count + i] = bitcast<u32>(most / 127.0);
}

// knobs
const UNITS: u32 = 1u; // of a piece: 2 of Q4_K

const QUADS: u32 = PIECE / UNITS;

// A piece as integers, four to a word: element = dm.x * integer + dm.y, by unit. The first PIECE words count, and
// the first UNITS.
struct Whole {
    words: array<u32, 8>,
    dm: array<vec2<f32>, 2>,
}

// Four integers from -8 to 7 for four from 0 to 15.
fn less_eight(four: u32) -> u32 {
    return ((four | 0x80808080u) - 0x08080808u) ^ 0x80808080u;
}

fn whole_piece(first_unit: u32, t: u32) -> Whole {
    var q: Whole;
    if (FORMAT == Q4_K) {
        let start = K_WORDS * (first_unit / 8u + t / PIECES);
        let j = t % PIECES;
        let s = j / 2u * 2u;
        let head = k_head(first_unit / 8u + t / PIECES);
        for (var u = 0u; u < UNITS; u++) { // unroll
            q.dm[u] = k_scales(head, s + u) * vec2<f32>(1.0, -1.0);
        }
        for (var i = 0u; i < QUADS; i++) { // unroll
            let packed = weight(start + K_WORDS - 32u + QUADS * j + i);
            q.words[i] = packed & 0x0f0f0f0fu;
            q.words[PIECE - QUADS + i] = (packed >> 4u) & 0x0f0f0f0fu;
        }
        return q;
    }
    let unit = first_unit + t / 4u;
    let j = t % 4u;
    if (FORMAT == Q8_0) {
        q.dm[0] = vec2<f32>(small_head(BYTES * unit).x, 0.0);
        let words = two_words(BYTES * unit + 1u + 4u * j);
        q.words[0] = words.x;
        q.words[1] = words.y;
        return q;
    }
    let packed = word(SMALL * unit + SMALL - 8u + 2u * j);
    q.dm[0] = small_head(SMALL * unit);
    q.words[0] = packed & 0x0f0f0f0fu;
    q.words[1] = (packed >> 4u) & 0x0f0f0f0fu;
    if (!WITH_MIN) {
        q.dm[0].y = 0.0;
        q.words[0] = less_eight(q.words[0]);
        q.words[1] = less_eight(q.words[1]);
    }
    return q;
}

@compute @workgroup_size(GROUP)
fn forward_i8(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let row0 = (group / p.groups_n) * ROWS;
    let col0 = ((group % p.groups_n) * (GROUP / TEAM) + lid / TEAM) * COLS;
    let units = p.units;
    let scales = 8u * p.m * units;
    let pieces = units * 8u / PIECE;
    var acc: Sums;
    for (var t = lid % TEAM; t < pieces; t += TEAM) {
        var ws: array<Whole, COLS>;
        for (var c = 0u; c < COLS; c++) { // unroll
            ws[c] = whole_piece(min(col0 + c, p.n - 1u) * units, t);
        }
        for (var r = 0u; r < ROWS; r++) { // unroll
            let first = min(row0 + r, p.m - 1u) * units;
            for (var u = 0u; u < UNITS; u++) { // unroll
                let scale = bitcast<f32>(rounded[scales + first + piece_quad(t, QUADS * u) / 8u]);
                var sums: array<i32, COLS>;
                var sum = 0;
                for (var i = 0u; i < QUADS; i++) { // unroll
                    let v = rounded[8u * first + piece_quad(t, QUADS * u + i)];
                    for (var c = 0u; c < COLS; c++) { // unroll
                        sums[c] += dot4I8Packed(ws[c].words[QUADS * u + i], v);
                    }
                    sum += dot4I8Packed(0x01010101u, v);
                }
                for (var c = 0u; c < COLS; c++) { // unroll
                    var part = ws[c].dm[u].x * f32(sums[c]);
                    if (WITH_MIN) {
                        part += ws[c].dm[u].y * f32(sum);
                    }
                    acc[r][c] = fma(scale, part, acc[r][c]);
                }
            }
        }
    }
    acc = team_sums(acc, lid);
    if (lid % TEAM != 0u) {
        return;
    }
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var c = 0u; c < COLS; c++) { // unroll
            store(row0 + r, col0 + c, acc[r][c]);
        }
    }
}
