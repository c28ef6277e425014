// Forward: y[t] = table[ids[t] - first], zero where there is no such row. (An id below `first` wraps to
// a number that no table reaches.)
//
// Backward: dtable[v] = sum of dy[t] over the tokens t whose id is first + v, in the order of t, without
// atomics. `chain` links the tokens of each id into a list: head[v] is the first token plus one, or
// 0, and next[t] is the following token plus one, or 0. Each of WAYS invocations owns the ids that
// equal its index modulo WAYS and walks all tokens, so no two share a list. `backward` then walks the
// lists.

// knobs
const INVOCATIONS: u32 = 64u; // of a workgroup
const EACH: u32 = 1u; // units of E that an invocation makes, INVOCATIONS apart
alias E = vec4<f32>; // f32 where the columns are no multiple of 4
const GROUP: u32 = 8u; // invocations of a workgroup of chain
const WAYS: u32 = 16u; // invocations of chain altogether; a power of two
const BY_TOKEN: bool = false; // backward goes over tokens, not over rows of the table
const ACCUMULATE: bool = false; // backward adds to what dtable holds

struct Params {
    len: u32, // elements E that forward or backward goes over
    cols: u32, // in units of E
    vocab: u32, // rows of the table
    tokens: u32,
    first: u32, // id of the table's first row
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
