// Tiles of packed products with many rows, on GPUs; after decode.wgsl and shared.wgsl. A workgroup makes TILE_M rows
// of TILE_N columns. It goes along the sum in strips of 16, which it stages in workgroup memory, so that a weight
// is decoded once for all rows of the tile.

// knobs
const TILE_M: u32 = 64u;
const TILE_N: u32 = 64u;
const TILE_ROWS: u32 = 8u; // sums of an invocation: TILE_ROWS x TILE_COLS
const TILE_COLS: u32 = 8u;

const DOWN: u32 = TILE_M / TILE_ROWS; // invocations along m: GROUP is DOWN * ACROSS
const ACROSS: u32 = TILE_N / TILE_COLS;

// Both strips are quads: that of the left factor by [quad along the strip][row].
var<workgroup> left: array<vec4<f32>, 4u * TILE_M>;
var<workgroup> right: array<vec4<f32>, 4u * TILE_N>;

// Where quad `q` of row or column `x` is. Neighbours that store the four quads of a row would use the same banks of
// memory without this exchange.
fn slot(q: u32, x: u32, width: u32) -> u32 {
    return q * width + (x ^ (2u * q));
}
