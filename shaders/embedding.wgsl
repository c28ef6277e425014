// Forward: y[t] = table[ids[t] - first], zero where there is no such row. (An id below `first` wraps to
// a number that no table reaches.)
//
// Backward: dtable[v] = sum of dy[t] over the tokens t whose id is first + v, without atomics.
//
// On software adapters in the order of t. `chain` links the tokens of each id into a list: head[v] is the first token
// plus one, or 0, and next[t] is the following token plus one, or 0. Each of WAYS invocations owns the ids that equal
// its index modulo WAYS and walks all tokens, so no two share a list. `backward` then walks the lists.
//
// On GPUs in pieces, since a frequent id would make a long list. `sort` puts each token where it belongs in the order
// of rows, tokens of one row in the order of t: by counting those before it, which costs little next to what a model
// does for each token. `pieces` cuts that order into pieces of PIECE tokens, and sums each row's tokens in a piece. The
// sum goes to the row where its first token is in this piece, and to parts[piece] where the row has tokens in the piece
// before. `join` adds these parts to their rows, in order.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // units of E that an invocation makes, INVOCATIONS apart
alias E = vec4<f32>; // f32 where the columns are no multiple of 4
const GROUP: u32 = 8u; // invocations of a workgroup of chain or sort
const WAYS: u32 = 16u; // invocations of chain altogether; a power of two
const BY_TOKEN: bool = false; // backward goes over tokens, not over rows of the table
const ACCUMULATE: bool = false; // backward and pieces add to what dtable holds
const SLICES: u32 = 4u; // invocations of sort that share a token
const PIECE: u32 = 32u; // tokens of a piece

struct Params {
    len: u32, // elements E that an entry point goes over; sort: that it clears
    cols: u32, // in units of E
    vocab: u32, // rows of the table
    tokens: u32,
    first: u32, // id of the table's first row
    stride: u32, // invocations of sort
}

@group(0) @binding(0) var<uniform> p: Params;

// forward
@group(0) @binding(1) var<storage, read> table: array<E>; // [vocab, cols]
@group(0) @binding(2) var<storage, read> ids: array<u32>; // [tokens]
@group(0) @binding(3) var<storage, read_write> y: array<E>; // [tokens, cols]

// chain
@group(0) @binding(1) var<storage, read> id_quads: array<vec4<u32>>; // [tokens / 4, rounded up] of vec4
@group(0) @binding(2) var<storage, read_write> head_out: array<u32>; // [vocab]
@group(0) @binding(3) var<storage, read_write> next_out: array<u32>; // [tokens]

// backward
@group(0) @binding(1) var<storage, read> dy: array<E>; // [tokens, cols]; binding 2 is ids
@group(0) @binding(3) var<storage, read> head: array<u32>; // [vocab]
@group(0) @binding(4) var<storage, read> next: array<u32>; // [tokens]
@group(0) @binding(5) var<storage, read_write> dtable: array<E>; // [vocab, cols]

// sort; binding 1 is id_quads
@group(0) @binding(2) var<storage, read_write> sorted_out: array<vec2<u32>>; // [tokens] of row and token
@group(0) @binding(3) var<storage, read_write> rows: array<E>; // [vocab, cols]: dtable

// pieces; bindings 1 and 3 are dy and rows
@group(0) @binding(2) var<storage, read> sorted: array<vec2<u32>>; // [tokens] of row and token
@group(0) @binding(4) var<storage, read_write> parts_out: array<E>; // [pieces, cols]

// join; bindings 2 and 3 are sorted and rows
@group(0) @binding(1) var<storage, read> parts: array<E>; // [pieces, cols]

@compute @workgroup_size(INVOCATIONS)
fn forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    // Token and column count along with i, since divisions are expensive; so are loads in a loop, even
    // of uniforms.
    let cols = p.cols;
    let vocab = p.vocab;
    let first_row = p.first;
    let step = INVOCATIONS % cols;
    let skip = INVOCATIONS / cols;
    var token = first / cols;
    var col = first % cols;
    for (var i = first; i < end; i += INVOCATIONS) {
        let id = ids[token] - first_row;
        var v = E();
        if (id < vocab) {
            v = table[id * cols + col];
        }
        y[i] = v;
        token += skip;
        col += step;
        if (col >= cols) {
            token++;
            col -= cols;
        }
    }
}

@compute @workgroup_size(GROUP)
fn chain(@builtin(workgroup_id) wid: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let way = wid.x * GROUP + lid;
    if (way >= WAYS) {
        return;
    }
    for (var v = way; v < p.vocab; v += WAYS) {
        head_out[v] = 0u;
    }
    let first_row = p.first;
    // From the last token to the first: each becomes the head of what was linked before.
    for (var q = (p.tokens + 3u) / 4u; q > 0u; q--) {
        let quad = id_quads[q - 1u];
        for (var j = 4u; j > 0u; j--) {
            let t = (q - 1u) * 4u + j; // plus one
            let id = quad[j - 1u] - first_row;
            if (t <= p.tokens && id < p.vocab && id % WAYS == way) {
                next_out[t - 1u] = head_out[id];
                head_out[id] = t;
            }
        }
    }
}

// Makes column `col` of row `line` of dtable; with BY_TOKEN, of the row of token `line`.
fn add_up(line: u32, col: u32, cols: u32) {
    var row = line;
    if (BY_TOKEN) {
        row = ids[line] - p.first;
        if (row >= p.vocab) {
            return;
        }
        if (head[row] != line + 1u) {
            return; // the first token of this id does the work
        }
    }
    var t = head[row];
    if (ACCUMULATE && t == 0u) {
        return;
    }
    var sum = E();
    // A list goes up, to no more than all tokens. What does not is no list: a slice of a step may be recorded
    // without the slice that has `chain`.
    while (t != 0u && t <= p.tokens) {
        sum += dy[(t - 1u) * cols + col];
        let then = next[t - 1u];
        t = select(0u, then, then > t);
    }
    if (ACCUMULATE) {
        sum += dtable[row * cols + col];
    }
    dtable[row * cols + col] = sum;
}

@compute @workgroup_size(INVOCATIONS)
fn backward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let first = (wid.x + wid.y * nwg.x) * (INVOCATIONS * EACH) + lid;
    let end = min(first + INVOCATIONS * EACH, p.len);
    let cols = p.cols;
    let step = INVOCATIONS % cols;
    let skip = INVOCATIONS / cols;
    var line = first / cols;
    var col = first % cols;
    for (var i = first; i < end; i += INVOCATIONS) {
        add_up(line, col, cols);
        line += skip;
        col += step;
        if (col >= cols) {
            line++;
            col -= cols;
        }
    }
}

// The rows of the tokens of quad `q`; `vocab` for those without a row, which so come last.
fn rows_of(q: u32) -> vec4<u32> {
    return min(id_quads[q] - p.first, vec4<u32>(p.vocab));
}

fn count_of(found: vec4<bool>) -> vec4<u32> {
    return select(vec4<u32>(), vec4<u32>(1u), found);
}

var<workgroup> counts: array<vec4<u32>, GROUP>;

const TOKENS: u32 = GROUP / SLICES; // of a workgroup of sort

@compute @workgroup_size(GROUP)
fn sort(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (!ACCUMULATE) {
        for (var i = group * GROUP + lid; i < p.len; i += p.stride) {
            rows[i] = E();
        }
    }
    if (group * TOKENS >= p.tokens) {
        return;
    }
    // Past the last token it is that token again, to keep barriers uniform.
    let t = min(group * TOKENS + lid % TOKENS, p.tokens - 1u);
    let own = t / 4u;
    let slice = lid / TOKENS;
    let row = rows_of(own)[t % 4u];
    let whole = p.tokens / 4u;
    var count = vec4<u32>();
    for (var q = slice; q < whole; q += SLICES) {
        // Of the same row, earlier tokens come first.
        count += count_of(rows_of(q) < vec4<u32>(select(row, row + 1u, q < own)));
    }
    if (slice == 0u) {
        let at = vec4<u32>(0u, 1u, 2u, 3u);
        count += count_of((rows_of(own) == vec4<u32>(row)) & (at < vec4<u32>(t % 4u)));
        if (p.tokens % 4u > 0u) {
            // Past the last token there may be anything.
            count += count_of((rows_of(whole) < vec4<u32>(row)) & (at < vec4<u32>(p.tokens % 4u)));
        }
    }
    counts[lid] = count;
    workgroupBarrier();
    if (slice > 0u || group * TOKENS + lid >= p.tokens) {
        return;
    }
    for (var s = 1u; s < SLICES; s++) {
        count += counts[lid + s * TOKENS];
    }
    sorted_out[count.x + count.y + count.z + count.w] = vec2<u32>(row, t);
}

// Puts the sum of a row's tokens in a piece where it belongs.
fn put(sum: E, row: u32, piece: u32, col: u32, goes_on: bool) {
    if (goes_on) {
        parts_out[piece * p.cols + col] = sum;
    } else if (row < p.vocab) {
        let at = row * p.cols + col;
        if (ACCUMULATE) {
            rows[at] += sum;
        } else {
            rows[at] = sum;
        }
    }
}

const AT_ONCE: u32 = 4u; // rows of dy that an invocation waits for together

@compute @workgroup_size(INVOCATIONS)
fn pieces(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * INVOCATIONS + lid;
    if (i >= p.len) {
        return;
    }
    let piece = i / p.cols;
    let col = i % p.cols;
    let start = piece * PIECE;
    let last = min(start + PIECE, p.tokens) - 1u;
    var row = sorted[start].x;
    var goes_on = start > 0u && sorted[max(start, 1u) - 1u].x == row;
    var sum = E();
    for (var at = start; at <= last; at += AT_ONCE) {
        var found: array<vec2<u32>, AT_ONCE>;
        var d: array<E, AT_ONCE>;
        for (var j = 0u; j < AT_ONCE; j++) {
            found[j] = sorted[min(at + j, last)];
        }
        for (var j = 0u; j < AT_ONCE; j++) {
            // What is no token was not sorted: a slice of a step may be recorded without the slice that has `sort`.
            d[j] = dy[min(found[j].y, p.tokens - 1u) * p.cols + col];
        }
        for (var j = 0u; j < AT_ONCE; j++) {
            let inside = at + j <= last;
            if (inside && found[j].x != row) {
                put(sum, row, piece, col, goes_on);
                row = found[j].x;
                goes_on = false;
                sum = E();
            }
            sum += select(E(), d[j], inside);
        }
    }
    put(sum, row, piece, col, goes_on);
}

@compute @workgroup_size(INVOCATIONS)
fn join(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let i = (wid.x + wid.y * nwg.x) * INVOCATIONS + lid;
    if (i >= p.len) {
        return;
    }
    let first = i / p.cols + 1u;
    let col = i % p.cols;
    let start = first * PIECE;
    let row = sorted[start].x;
    // One of the pieces that a row goes on in adds up all of them: the first.
    let goes_on = sorted[start - 1u].x == row;
    let is_first = first == 1u || sorted[start - min(PIECE + 1u, start)].x != row;
    if (row >= p.vocab || !goes_on || !is_first) {
        return;
    }
    // The first piece after them, by bisection.
    var end = first + 1u;
    var after = (p.tokens + PIECE - 1u) / PIECE;
    while (end < after) {
        let middle = (end + after) / 2u;
        if (sorted[middle * PIECE].x == row) {
            end = middle + 1u;
        } else {
            after = middle;
        }
    }
    let cols = p.cols;
    var sum = E();
    var k = first;
    for (; k + 4u <= end; k += 4u) {
        let at = k * cols + col;
        sum += (parts[at] + parts[at + cols]) + (parts[at + 2u * cols] + parts[at + 3u * cols]);
    }
    for (; k < end; k++) {
        sum += parts[k * cols + col];
    }
    rows[row * cols + col] += sum;
}
