// Dot products of rows of a packed matrix with few rows of x, on GPUs; after common/subgroups.wgsl or
// no_subgroups.wgsl, decode.wgsl and pieces.wgsl. TEAM invocations share a row of the matrix and split k. Neighbours take
// neighbouring pieces of it, so that they read neighbouring words.
//
// The text with the entry point has GROUP, the invocations of a workgroup, and
// `fn input(row: u32, quad: u32) -> vec4<f32>`: elements 4 * quad to 4 * quad + 3 of a row of x.

// knobs
const TEAM: u32 = 32u; // a power of two that divides GROUP
const SUBGROUP: u32 = 1u; // how many of a team can shuffle
const COLS: u32 = 1u; // rows of the matrix: columns of y
const ROWS: u32 = 1u; // rows of x

alias Sums = array<array<f32, COLS>, ROWS>;

// The dot products of rows 0 to ROWS - 1 of x with rows `col0` to `col0 + COLS - 1` of the matrix, which has
// `n` rows of `units` units. Complete in the first invocation of each team. All of a workgroup must call it.
fn dots(col0: u32, n: u32, units: u32, lid: u32) -> Sums {
    var acc: array<array<vec4<f32>, COLS>, ROWS>;
    let pieces = units * 8u / PIECE;
    for (var t = lid % TEAM; t < pieces; t += TEAM) {
        var ws: array<Piece, COLS>;
        for (var c = 0u; c < COLS; c++) { // unroll
            ws[c] = piece(min(col0 + c, n - 1u) * units, t);
        }
        for (var r = 0u; r < ROWS; r++) { // unroll
            for (var i = 0u; i < PIECE; i++) { // unroll
                let v = input(r, piece_quad(t, i));
                for (var c = 0u; c < COLS; c++) { // unroll
                    acc[r][c] = fma(v, ws[c][i], acc[r][c]);
                }
            }
        }
    }
    var sums: Sums;
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var c = 0u; c < COLS; c++) { // unroll
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
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var c = 0u; c < COLS; c++) { // unroll
            partial[(r * COLS + c) * GROUP + lid] = sum[r][c];
        }
    }
    for (var step = TEAM / 2u; step >= SUBGROUP; step /= 2u) {
        workgroupBarrier();
        if (lid % TEAM < step) {
            for (var i = 0u; i < ROWS * COLS; i++) { // unroll
                partial[i * GROUP + lid] += partial[i * GROUP + lid + step];
            }
        }
    }
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var c = 0u; c < COLS; c++) { // unroll
            sum[r][c] = partial[(r * COLS + c) * GROUP + lid];
        }
    }
    return sum;
}
