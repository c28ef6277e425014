// Dot products of rows of a packed matrix with few rows of x, on GPUs; after common/subgroups.wgsl or
// no_subgroups.wgsl and decode.wgsl. TEAM invocations share a row of the matrix and split k. Neighbours take
// neighbouring pieces of it, so that they read neighbouring words.
//
// The text with the entry point has GROUP, the invocations of a workgroup, and
// `fn input(row: u32, quad: u32) -> vec4<f32>`: elements 4 * quad to 4 * quad + 3 of a row of x.

// knobs
const TEAM: u32 = 32u; // a power of two that divides GROUP
const SUBGROUP: u32 = 1u; // how many of a team can shuffle
const COLS: u32 = 1u; // rows of the matrix: columns of y
const ROWS: u32 = 1u; // rows of x

// A piece: what an invocation decodes at a time. Of small blocks one word of nibbles; of blocks of 256, which
// have long heads, 32 elements.
const LARGE: bool = FORMAT == Q4_K || FORMAT == Q5_K || FORMAT == Q6_K;
const PIECE: u32 = select(2u, 8u, LARGE); // in quads

alias Piece = array<vec4<f32>, PIECE>;

// Which quad of a row of x belongs to quad `i` of piece `t` of the row.
fn piece_quad(t: u32, i: u32) -> u32 {
    if (FORMAT == Q6_K) {
        return 64u * (t / 8u) + 32u * (t / 4u % 2u) + 8u * (i / 2u) + 2u * (t % 4u) + i % 2u;
    }
    if (LARGE) {
        return 64u * (t / 8u) + 16u * (t / 2u % 4u) + 8u * (i / 4u) + 4u * (t % 2u) + i % 4u;
    }
    if (FORMAT == Q8_0 || FORMAT == F16 || FORMAT == BF16) {
        return 2u * t + i;
    }
    return 8u * (t / 4u) + t % 4u + 4u * i;
}

fn small_piece(index: u32, j: u32) -> Piece {
    let start = SMALL * index;
    let head = weight(start / 2u);
    let dm = unpack2x16float(select(head, head >> 16u, !WITH_MIN && (start & 1u) != 0u));
    var high = 0u;
    if (FIFTH) {
        high = word(start + SMALL_HEAD);
    }
    let packed = word(start + SMALL - 8u + 2u * j);
    var q: Piece;
    q[0] = small_quad(j, packed, high, dm);
    q[1] = small_quad(j + 4u, packed, high, dm);
    return q;
}

fn byte_piece(index: u32, j: u32) -> Piece {
    let start = BYTES * index;
    let odd = start & 1u;
    let head = weight(start / 2u);
    let d = unpack2x16float(select(head, head >> 16u, odd != 0u)).x;
    let at = (start + 1u) / 2u + 2u * j;
    let a = weight(at);
    let b = weight(at + 1u);
    let c = weight(at + 2u - odd);
    var q: Piece;
    q[0] = signed_bytes(select((a >> 16u) | (b << 16u), a, odd != 0u)) * d;
    q[1] = signed_bytes(select((b >> 16u) | (c << 16u), b, odd != 0u)) * d;
    return q;
}

fn k_piece(block: u32, j: u32) -> Piece {
    let start = K_WORDS * block;
    let s = j / 2u * 2u;
    let head = k_head(block);
    let even = k_scales(head, s);
    let odd = k_scales(head, s + 1u);
    var q: Piece;
    for (var i = 0u; i < 4u; i++) {
        var high = 0u;
        if (FIFTH) {
            high = weight(start + 4u + 4u * (j % 2u) + i);
        }
        let packed = weight(start + K_WORDS - 32u + 4u * j + i);
        q[i] = k_quad(s, packed, high, even);
        q[i + 4u] = k_quad(s + 1u, packed, high, odd);
    }
    return q;
}

fn six_bit_piece(block: u32, j: u32) -> Piece {
    let start = SIX * block;
    let part = j / 4u; // of 128 elements
    let i = j % 4u; // two words of 8
    let d = unpack2x16float(word(start + 104u)).x;
    let scales = array<vec4<f32>, 2>(
        signed_bytes(word(start + 96u + 4u * part)) * d,
        signed_bytes(word(start + 98u + 4u * part)) * d,
    );
    var low: array<vec2<u32>, 2>;
    low[0] = two_words(start + 32u * part + 4u * i);
    low[1] = two_words(start + 32u * part + 4u * i + 16u);
    let high = two_words(start + 64u + 16u * part + 4u * i);
    var q: Piece;
    for (var s = 0u; s < 4u; s++) {
        let pair = select(scales[s / 2u].xy, scales[s / 2u].zw, s % 2u != 0u);
        let scale = select(pair.x, pair.y, i >= 2u);
        q[2u * s] = six_quad(s, low[s % 2u].x, high.x, scale);
        q[2u * s + 1u] = six_quad(s, low[s % 2u].y, high.y, scale);
    }
    return q;
}

// Eight bytes from a half on.
fn two_words(half: u32) -> vec2<u32> {
    let odd = half & 1u;
    let a = weight(half / 2u);
    let b = weight(half / 2u + 1u);
    let c = weight(half / 2u + 1u + odd);
    return select(vec2<u32>(a, b), vec2<u32>((a >> 16u) | (b << 16u), (b >> 16u) | (c << 16u)), odd != 0u);
}

// Piece `t` of the row of the matrix that starts at this unit.
fn piece(first_unit: u32, t: u32) -> Piece {
    if (FORMAT == F16 || FORMAT == BF16) {
        let at = 16u * first_unit + 4u * t;
        var q: Piece;
        q[0] = half_quad(weight(at), weight(at + 1u));
        q[1] = half_quad(weight(at + 2u), weight(at + 3u));
        return q;
    }
    if (FORMAT == Q8_0) {
        return byte_piece(first_unit + t / 4u, t % 4u);
    }
    if (FORMAT == Q6_K) {
        return six_bit_piece(first_unit / 8u + t / 8u, t % 8u);
    }
    if (LARGE) {
        return k_piece(first_unit / 8u + t / 8u, t % 8u);
    }
    return small_piece(first_unit + t / 4u, t % 4u);
}

alias Sums = array<array<f32, COLS>, ROWS>;

// The dot products of rows 0 to ROWS - 1 of x with rows `col0` to `col0 + COLS - 1` of the matrix, which has
// `n` rows of `units` units. Complete in the first invocation of each team. All of a workgroup must call it.
fn dots(col0: u32, n: u32, units: u32, lid: u32) -> Sums {
    var acc: array<array<vec4<f32>, COLS>, ROWS>;
    let pieces = units * 8u / PIECE;
    for (var t = lid % TEAM; t < pieces; t += TEAM) {
        var ws: array<Piece, COLS>;
        for (var c = 0u; c < COLS; c++) {
            ws[c] = piece(min(col0 + c, n - 1u) * units, t);
        }
        for (var r = 0u; r < ROWS; r++) {
            for (var i = 0u; i < PIECE; i++) {
                let v = input(r, piece_quad(t, i));
                for (var c = 0u; c < COLS; c++) {
                    acc[r][c] = fma(v, ws[c][i], acc[r][c]);
                }
            }
        }
    }
    var sums: Sums;
    for (var r = 0u; r < ROWS; r++) {
        for (var c = 0u; c < COLS; c++) {
            var sum = dot(acc[r][c], vec4<f32>(1.0));
            for (var step = 1u; step < SUBGROUP; step *= 2u) {
                sum += across(vec2<f32>(sum), step).x;
            }
            sums[r][c] = sum;
        }
    }
    if (SUBGROUP < TEAM) {
        sums = gathered(sums, lid);
    }
    return sums;
}

var<workgroup> partial: array<f32, GROUP * ROWS * COLS>;

// The sums over the subgroups of a team, through workgroup memory and in a fixed order.
fn gathered(sums: Sums, lid: u32) -> Sums {
    var sum = sums;
    workgroupBarrier(); // An earlier call may still be reading.
    for (var r = 0u; r < ROWS; r++) {
        for (var c = 0u; c < COLS; c++) {
            partial[(r * COLS + c) * GROUP + lid] = sum[r][c];
        }
    }
    for (var step = TEAM / 2u; step >= SUBGROUP; step /= 2u) {
        workgroupBarrier();
        if (lid % TEAM < step) {
            for (var i = 0u; i < ROWS * COLS; i++) {
                partial[i * GROUP + lid] += partial[i * GROUP + lid + step];
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) {
        for (var c = 0u; c < COLS; c++) {
            sum[r][c] = partial[(r * COLS + c) * GROUP + lid];
        }
    }
    return sum;
}
