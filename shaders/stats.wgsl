// What a probe asks about a tensor, in one pass: sums, sums of squares and largest magnitudes of one
// tensor or two, and their dot product. Each workgroup reduces one chunk to one row of the board; the
// host adds these few rows.
//
// After common/rows.wgsl, for which a chunk is a row.

// knobs
const PAIR: bool = false; // there is a b

struct Params {
    len: u32, // elements
    chunk: u32, // quads that a workgroup reduces
    groups: u32, // workgroups
    first: u32, // row of the board that the first workgroup writes
}

@group(0) @binding(0) var<uniform> p: Params;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>; // [len / 4, rounded up] of vec4
@group(0) @binding(2) var<storage, read> b: array<vec4<f32>>; // [len / 4, rounded up] of vec4, if PAIR
// A row is (sum a, sum a^2, max |a|, a.b), (sum b, sum b^2, max |b|, 0).
@group(0) @binding(3) var<storage, read_write> board: array<vec4<f32>>; // [rows, 2] of vec4

struct Sums {
    sum: vec4<f32>,
    square: vec4<f32>,
    top: vec4<f32>,
}

fn with_quad(s: Sums, v: vec4<f32>) -> Sums {
    return Sums(s.sum + v, s.square + v * v, max(s.top, abs(v)));
}

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
    let whole = p.len / 4u;
    let end = min((group + 1u) * p.chunk, whole);
    var of_a = Sums();
    var of_b = Sums();
    var product = vec4<f32>();
    for (var at = group * p.chunk + lid; at < end; at += GROUP) {
        let v = a[at];
        of_a = with_quad(of_a, v);
        if (PAIR) {
            let w = b[at];
            of_b = with_quad(of_b, w);
            product += v * w;
        }
    }
    if (group == p.groups - 1u && lid == 0u && whole * 4u < p.len) {
        // Past the last element there may be anything, even NaN.
        let inside = vec4<u32>(whole * 4u) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(p.len);
        let v = select(vec4<f32>(), a[whole], inside);
        of_a = with_quad(of_a, v);
        if (PAIR) {
            let w = select(vec4<f32>(), b[whole], inside);
            of_b = with_quad(of_b, w);
            product += v * w;
        }
    }
    let sums = row_sums(total(of_a.sum), total(of_a.square), lid);
    var top = vec2<f32>(largest(of_a.top), 0.0);
    var second = vec3<f32>();
    if (PAIR) {
        top.y = largest(of_b.top);
        second = vec3<f32>(row_sums(total(of_b.sum), total(of_b.square), lid), row_sum(total(product), lid));
    }
    top = reduce(top, lid, false);
    if (lid == 0u) {
        let row = 2u * (p.first + group);
        board[row] = vec4<f32>(sums, top.x, second.z);
        board[row + 1u] = vec4<f32>(second.xy, top.y, 0.0);
    }
}
