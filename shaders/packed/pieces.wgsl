// Rows of a packed matrix piece by piece, so that neighbours read neighbouring words; after decode.wgsl.

// knobs
const PIECE: u32 = 2u; // quads of a piece: what an invocation decodes at a time. Of small blocks one word of
// nibbles; of blocks of 256, which have long heads, 32 elements, so 8 quads.

const LARGE: bool = FORMAT == Q4_K || FORMAT == Q5_K || FORMAT == Q6_K;

alias Piece = array<vec4<f32>, 8>; // the first PIECE count; a text that is not called must be valid, too

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
    for (var i = 0u; i < 4u; i++) { // unroll
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
    for (var s = 0u; s < 4u; s++) { // unroll
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
