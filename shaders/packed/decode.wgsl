// Weights that stay as files store them, in blocks of few bits, and are decoded where they are used.
//
// A matrix is [n, k]: row after row, each of k / 32 units of 32 elements. `unit` decodes one. `piece` decodes
// what an invocation takes if neighbours are to read neighbouring words. The formats are ggml's; the layout of
// a block is at each decoder.
//
// The text with the binding has `fn weight(i: u32) -> u32`, word i of the matrix. No word past its last is read.

// knobs
const FORMAT: u32 = Q4_1; // one of the ten below
const PIECE: u32 = 2u; // quads of a piece: 2 of blocks of 32 elements, 8 or 4 of blocks of 256

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

const WITH_MIN: bool = FORMAT == Q4_1 || FORMAT == Q5_1 || FORMAT == Q4_K || FORMAT == Q5_K;
const FIFTH: bool = FORMAT == Q5_0 || FORMAT == Q5_1 || FORMAT == Q5_K;
// Whether blocks are whole words. Others are whole halves of words.
const WHOLE_WORDS: bool = FORMAT == F16 || FORMAT == BF16 || WITH_MIN;

alias Unit = array<vec4<f32>, 8>;

// Four bytes from a half on. Where those are one word, it is loaded again in place of the next.
fn word(half: u32) -> u32 {
    if (WHOLE_WORDS) {
        return weight(half / 2u);
    }
    let odd = half & 1u;
    let low = weight(half / 2u);
    let high = weight(half / 2u + odd);
    return select(low, (low >> 16u) | (high << 16u), odd != 0u);
}

// 32 bytes from a half on. If they are whole words, the last is loaded twice.
fn eight_words(half: u32) -> array<u32, 8> {
    let odd = half & 1u;
    var words: array<u32, 8>;
    var low = weight(half / 2u);
    for (var i = 0u; i < 8u; i++) { // unroll
        let high = weight(half / 2u + select(i + 1u, 7u + odd, i == 7u));
        words[i] = select(low, (low >> 16u) | (high << 16u), odd != 0u);
        low = high;
    }
    return words;
}

fn nibbles(word: u32, shift: u32) -> vec4<u32> {
    return (vec4<u32>(word) >> (vec4<u32>(0u, 8u, 16u, 24u) + vec4<u32>(shift))) & vec4<u32>(15u);
}

fn signed_bytes(word: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(vec4<u32>(word) << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4<u32>(24u));
}

// Bit `shift` of the word, for each of four, as 16 or 0.
fn fifth_bits(word: u32, shift: vec4<u32>) -> vec4<u32> {
    return ((vec4<u32>(word) >> shift) & vec4<u32>(1u)) << vec4<u32>(4u);
}

// Two bytes for each element: four of two words.
fn half_quad(a: u32, b: u32) -> vec4<f32> {
    if (FORMAT == F16) {
        return vec4<f32>(unpack2x16float(a), unpack2x16float(b));
    }
    return bitcast<vec4<f32>>(vec4<u32>(a << 16u, a & 0xffff0000u, b << 16u, b & 0xffff0000u));
}

fn halves(index: u32) -> Unit {
    var q: Unit;
    for (var i = 0u; i < 8u; i++) { // unroll
        q[i] = half_quad(weight(16u * index + 2u * i), weight(16u * index + 2u * i + 1u));
    }
    return q;
}

// d [, m] as halves, [32 fifth bits,] 16 bytes: the low nibbles are elements 0 to 15, the high ones 16
// to 31. x = d * (q - 8) or d * q + m; with a fifth bit, q - 16.
const SMALL_HEAD: u32 = select(1u, 2u, WITH_MIN); // in halves
const SMALL: u32 = SMALL_HEAD + select(0u, 2u, FIFTH) + 8u;
// The head and what follows, in words from the one on in which they start.
const SMALL_WORDS: u32 = select(4u, 5u, FIFTH);

fn small_quad(quad: u32, packed: u32, high: u32, dm: vec2<f32>) -> vec4<f32> {
    var v = nibbles(packed, quad & 4u);
    if (FIFTH) {
        v |= fifth_bits(high, vec4<u32>(0u, 1u, 2u, 3u) + vec4<u32>(4u * quad));
    }
    if (WITH_MIN) {
        return vec4<f32>(v) * dm.x + vec4<f32>(dm.y);
    }
    return (vec4<f32>(v) - vec4<f32>(select(8.0, 16.0, FIFTH))) * dm.x;
}

fn small_block(index: u32) -> Unit {
    let start = SMALL * index;
    let odd = select(start & 1u, 1u, WITH_MIN);
    var words: array<u32, SMALL_WORDS>;
    let first = weight(start / 2u);
    let dm = unpack2x16float(select(first, first >> 16u, !WITH_MIN && odd != 0u));
    var low = first;
    for (var i = 0u; i < SMALL_WORDS; i++) { // unroll
        let high = weight(start / 2u + i + 1u);
        words[i] = select((low >> 16u) | (high << 16u), high, odd != 0u);
        low = high;
    }
    var q: Unit;
    for (var i = 0u; i < 8u; i++) { // unroll
        q[i] = small_quad(i, words[i % 4u + SMALL_WORDS - 4u], words[0], dm);
    }
    return q;
}

// d as half, 32 signed bytes: x = d * q.
const BYTES: u32 = 17u; // in halves

fn byte_block(index: u32) -> Unit {
    let start = BYTES * index;
    let odd = start & 1u;
    var low = weight(start / 2u);
    let d = unpack2x16float(select(low, low >> 16u, odd != 0u)).x;
    var q: Unit;
    for (var i = 0u; i < 8u; i++) { // unroll
        let high = weight(start / 2u + i + 1u);
        q[i] = signed_bytes(select((low >> 16u) | (high << 16u), high, odd != 0u)) * d;
        low = high;
    }
    return q;
}

// 256 elements: d and dmin as halves, 12 bytes with eight 6-bit scales and mins, [32 bytes of fifth
// bits,] 128 bytes of nibbles, of which 32 hold two units. x = d * scale * q - dmin * min.
const K_WORDS: u32 = select(36u, 44u, FIFTH);

struct KHead {
    dm: vec2<f32>,
    low: u32, // words of scales and mins
    middle: u32,
    top: u32,
}

fn k_head(block: u32) -> KHead {
    let start = K_WORDS * block;
    return KHead(unpack2x16float(weight(start)), weight(start + 1u), weight(start + 2u), weight(start + 3u));
}

// d * scale and dmin * min of unit `s` of the block.
fn k_scales(head: KHead, s: u32) -> vec2<f32> {
    let at = 8u * (s % 4u);
    var scale = (head.low >> at) & 63u;
    var least = (head.middle >> at) & 63u;
    if (s >= 4u) {
        scale = ((head.top >> at) & 15u) | (((head.low >> (at + 6u)) & 3u) << 4u);
        least = ((head.top >> (at + 4u)) & 15u) | (((head.middle >> (at + 6u)) & 3u) << 4u);
    }
    return head.dm * vec2<f32>(f32(scale), f32(least));
}

fn k_quad(s: u32, packed: u32, high: u32, dm: vec2<f32>) -> vec4<f32> {
    var v = nibbles(packed, 4u * (s % 2u));
    if (FIFTH) {
        v |= fifth_bits(high, vec4<u32>(0u, 8u, 16u, 24u) + vec4<u32>(s));
    }
    return vec4<f32>(v) * dm.x - vec4<f32>(dm.y);
}

fn k_block(index: u32) -> Unit {
    let start = K_WORDS * (index / 8u);
    let s = index % 8u; // unit of the block
    let dm = k_scales(k_head(index / 8u), s);
    var q: Unit;
    for (var i = 0u; i < 8u; i++) { // unroll
        var high = 0u;
        if (FIFTH) {
            high = weight(start + 4u + i);
        }
        q[i] = k_quad(s, weight(start + K_WORDS - 32u + 8u * (s / 2u) + i), high, dm);
    }
    return q;
}

// 256 elements: 128 bytes of low nibbles, 64 of two high bits each, 16 signed scales, d as half.
// x = d * scale * (q - 32); 16 elements share a scale. Of each 128 elements, unit s % 4 = `part` has the low or
// high nibbles of 32 bytes, and two bits of each byte of 32.
const SIX: u32 = 105u; // in halves

fn six_quad(part: u32, low: u32, high: u32, scale: f32) -> vec4<f32> {
    let bits = (vec4<u32>(high) >> (vec4<u32>(0u, 8u, 16u, 24u) + vec4<u32>(2u * part))) & vec4<u32>(3u);
    let v = nibbles(low, 4u * (part / 2u)) | (bits << vec4<u32>(4u));
    return (vec4<f32>(v) - vec4<f32>(32.0)) * scale;
}

fn six_bit_block(index: u32) -> Unit {
    let start = SIX * (index / 8u);
    let s = index % 8u;
    let part = s % 4u;
    let d = small_head(start + 104u).x;
    let scales = signed_bytes(word(start + 96u + 4u * (s / 4u) + 2u * (part / 2u))) * d;
    let pair = select(scales.xy, scales.zw, part % 2u != 0u);
    let low = eight_words(start + 32u * (s / 4u) + 16u * (part % 2u));
    let high = eight_words(start + 64u + 16u * (s / 4u));
    var q: Unit;
    for (var i = 0u; i < 8u; i++) { // unroll
        q[i] = six_quad(part, low[i], high[i], pair[i / 4u]);
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

// Pieces: of blocks of 32 elements two quads, of which low and high nibbles share a word. Blocks of 256 have long
// heads, so their pieces are larger.
const LARGE: bool = FORMAT == Q4_K || FORMAT == Q5_K || FORMAT == Q6_K;
const PIECES: u32 = select(4u, 64u / PIECE, LARGE); // of a block

// The first PIECE count. Decoders that are not called must be valid, too.
alias Piece = array<vec4<f32>, 8>;

// Which quad of a row of elements is quad `i` of piece `t` of the row.
fn piece_quad(t: u32, i: u32) -> u32 {
    let j = t % PIECES;
    if (FORMAT == Q6_K) {
        return 64u * (t / PIECES) + 32u * (2u * j / PIECES) + 8u * (i / SIX_WORDS) + SIX_WORDS * j % 8u + i % SIX_WORDS;
    }
    if (LARGE) {
        const words = PIECE / 2u;
        return 64u * (t / PIECES) + 16u * (words * j / 8u) + 8u * (i / words) + words * j % 8u + i % words;
    }
    if (FORMAT == Q8_0 || FORMAT == F16 || FORMAT == BF16) {
        return 2u * t + i;
    }
    return 8u * (t / 4u) + j + 4u * i;
}

// d and what follows it, as halves.
fn small_head(start: u32) -> vec2<f32> {
    let head = weight(start / 2u);
    return unpack2x16float(select(head, head >> 16u, !WITH_MIN && (start & 1u) != 0u));
}

// Word `j` of the nibbles.
fn small_piece(index: u32, j: u32) -> Piece {
    let start = SMALL * index;
    let dm = small_head(start);
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

// Eight bytes from a half on. If they are whole words, the last is loaded twice.
fn two_words(half: u32) -> vec2<u32> {
    let odd = half & 1u;
    let a = weight(half / 2u);
    let b = weight(half / 2u + 1u);
    let c = weight(half / 2u + 1u + odd);
    return select(vec2<u32>(a, b), vec2<u32>((a >> 16u) | (b << 16u), (b >> 16u) | (c << 16u)), odd != 0u);
}

fn byte_piece(index: u32, j: u32) -> Piece {
    let start = BYTES * index;
    let d = small_head(start).x;
    let words = two_words(start + 1u + 4u * j);
    var q: Piece;
    q[0] = signed_bytes(words.x) * d;
    q[1] = signed_bytes(words.y) * d;
    return q;
}

// Some words of the nibbles: of two units.
fn k_piece(block: u32, j: u32) -> Piece {
    const words = PIECE / 2u;
    let start = K_WORDS * block;
    let at = words * j;
    let s = at / 8u * 2u;
    let head = k_head(block);
    let even = k_scales(head, s);
    let odd = k_scales(head, s + 1u);
    var q: Piece;
    for (var i = 0u; i < PIECE / 2u; i++) { // unroll
        var high = 0u;
        if (FIFTH) {
            high = weight(start + 4u + at % 8u + i);
        }
        let packed = weight(start + K_WORDS - 32u + at + i);
        q[i] = k_quad(s, packed, high, even);
        q[i + words] = k_quad(s + 1u, packed, high, odd);
    }
    return q;
}

// One or two words of the high bits: of four units.
const SIX_WORDS: u32 = max(1u, PIECE / 4u);

fn six_bit_piece(block: u32, j: u32) -> Piece {
    let start = SIX * block;
    let part = 2u * j / PIECES; // of 128 elements
    let at = SIX_WORDS * j % 8u;
    let d = small_head(start + 104u).x;
    let scales = two_words(start + 96u + 4u * part);
    let even = two_words(start + 32u * part + 2u * at);
    let odd = two_words(start + 32u * part + 2u * at + 16u);
    let high = two_words(start + 64u + 16u * part + 2u * at);
    var q: Piece;
    for (var i = 0u; i < PIECE; i++) { // unroll
        let s = i / SIX_WORDS;
        let second = i % SIX_WORDS == 1u;
        let four = signed_bytes(select(scales.x, scales.y, s >= 2u));
        let pair = select(four.xy, four.zw, s % 2u != 0u);
        let scale = select(pair.x, pair.y, at >= 4u) * d;
        let low = select(even, odd, s % 2u != 0u);
        q[i] = six_quad(s, select(low.x, low.y, second), select(high.x, high.y, second), scale);
    }
    return q;
}

// Piece `t` of the row that starts at this unit.
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
        return six_bit_piece(first_unit / 8u + t / PIECES, t % PIECES);
    }
    if (LARGE) {
        return k_piece(first_unit / 8u + t / PIECES, t % PIECES);
    }
    return small_piece(first_unit + t / 4u, t % 4u);
}
