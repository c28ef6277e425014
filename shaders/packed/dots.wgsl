// Dot products of rows of a packed matrix with few rows of x, on GPUs; after decode.wgsl and teams.wgsl. A team
// shares a row of the matrix and splits k. Neighbours take neighbouring pieces of it, so that they read
// neighbouring words.
//
// The text with the entry point has `fn input(row: u32, quad: u32) -> vec4<f32>`: elements 4 * quad to
// 4 * quad + 3 of a row of x.

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
            sums[r][c] = dot(acc[r][c], vec4<f32>(1.0));
        }
    }
    return team_sums(sums, lid);
}
