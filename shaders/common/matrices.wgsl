// Tiles of a product on cooperative matrices, which the invocations of a subgroup hold together (tensor
// cores, simdgroup matrices). `enable` lines must come before all text, and only naga knows this
// extension, so ops add them.
//
// A workgroup goes along k in strips of TILE_K, which it stages in workgroup memory: there edges are
// zeros and E may be f16, whatever tensors are like. Each of its subgroups multiplies a block of the
// tile. The number of a subgroup is computed: a driver crashes over modules that have both matrices and
// subgroup operations. So where subgroups may have several sizes, the workgroup is one of the largest;
// where it turns out to be several smaller ones, each does the same work.
//
// The text around this has:
// - `TILE_M`, `TILE_N` and `TILE_K`;
// - `struct Work`, with where the tile's `k` begins and ends (`k_end`);
// - `struct Staging`, what an invocation holds of strips on their way;
// - `fn fetch(s: ptr<function, Staging>, w: Work, k: u32, lid: u32)`, which loads the strips at `k`;
// - `fn put(s: ptr<function, Staging>, buffer: u32, lid: u32)`, which stores them by `put_a` and `put_b`.

// knobs
alias E = f32; // what is multiplied; sums are f32
alias MatrixA = coop_mat8x8<f32, A>;
alias MatrixB = coop_mat8x8<f32, B>;
alias MatrixC = coop_mat8x8<f32, C>;
const SIZE: u32 = 8u; // rows and columns of these matrices
const PAD: u32 = 4u; // elements between rows of a strip, 16 bytes of them, so that rows are in different banks
const COOPERATING: u32 = 32u; // invocations of a subgroup
const SUBGROUPS_M: u32 = 2u; // subgroups along m
const SUBGROUPS_N: u32 = 2u; // along n
const BUFFERS: u32 = 1u; // strips that memory holds: with 2, one is stored while another is multiplied
const B_ALONG_N: bool = false; // b's strip is [k][n]

const TILE_GROUP: u32 = COOPERATING * SUBGROUPS_M * SUBGROUPS_N;
const MATRICES_M: u32 = TILE_M / SUBGROUPS_M / SIZE; // of a subgroup
const MATRICES_N: u32 = TILE_N / SUBGROUPS_N / SIZE;
const STRIDE: u32 = TILE_K + PAD;
const B_STRIDE: u32 = select(STRIDE, TILE_N + PAD, B_ALONG_N);
const A_STRIP: u32 = TILE_M * STRIDE;
const B_STRIP: u32 = select(TILE_N, TILE_K, B_ALONG_N) * B_STRIDE;

var<workgroup> strip_a: array<E, BUFFERS * A_STRIP>; // [m][k]
var<workgroup> strip_b: array<E, BUFFERS * B_STRIP>; // [n][k], or [k][n]

// Stores a quad of a row of a strip.
fn put_a(buffer: u32, row: u32, x: u32, quad: vec4<f32>) {
    let at = buffer * A_STRIP + row * STRIDE + x;
    let v = vec4<E>(quad);
    strip_a[at] = v.x;
    strip_a[at + 1u] = v.y;
    strip_a[at + 2u] = v.z;
    strip_a[at + 3u] = v.w;
}

fn put_b(buffer: u32, row: u32, x: u32, quad: vec4<f32>) {
    let at = buffer * B_STRIP + row * B_STRIDE + x;
    let v = vec4<E>(quad);
    strip_b[at] = v.x;
    strip_b[at + 1u] = v.y;
    strip_b[at + 2u] = v.z;
    strip_b[at + 3u] = v.w;
}

fn b_matrix(buffer: u32, k: u32, n: u32) -> MatrixB {
    if (B_ALONG_N) {
        return coopLoadT<MatrixB>(&strip_b[buffer * B_STRIP + k * B_STRIDE + n], B_STRIDE);
    }
    return coopLoad<MatrixB>(&strip_b[buffer * B_STRIP + n * B_STRIDE + k], B_STRIDE);
}

alias Sums = array<array<MatrixC, MATRICES_N>, MATRICES_M>;

// Adds up the products of a tile. While strips are multiplied, the next ones are being loaded.
fn multiply(w: Work, lid: u32, s: ptr<function, Staging>, sums: ptr<function, Sums>) {
    let subgroup = lid / COOPERATING;
    let row = subgroup / SUBGROUPS_N * MATRICES_M * SIZE;
    let col = subgroup % SUBGROUPS_N * MATRICES_N * SIZE;
    var buffer = 0u;
    fetch(s, w, w.k, lid);
    for (var k = w.k; k < w.k_end; k += TILE_K) {
        put(s, buffer, lid);
        workgroupBarrier();
        if (k + TILE_K < w.k_end) {
            fetch(s, w, k + TILE_K, lid);
        }
        for (var kk = 0u; kk < TILE_K; kk += SIZE) {
            var bs: array<MatrixB, MATRICES_N>;
            for (var j = 0u; j < MATRICES_N; j++) { // unroll
                bs[j] = b_matrix(buffer, kk, col + j * SIZE);
            }
            for (var i = 0u; i < MATRICES_M; i++) { // unroll
                let at = buffer * A_STRIP + (row + i * SIZE) * STRIDE + kk;
                let a_matrix = coopLoadT<MatrixA>(&strip_a[at], STRIDE);
                for (var j = 0u; j < MATRICES_N; j++) { // unroll
                    (*sums)[i][j] = coopMultiplyAdd(a_matrix, bs[j], (*sums)[i][j]);
                }
            }
        }
        if (BUFFERS == 1u) {
            workgroupBarrier();
        }
        buffer = (buffer + 1u) % BUFFERS;
    }
}

// Sums leave through workgroup memory, where an invocation knows which are where: SIZE rows of each
// subgroup at a time, OUT_WIDE columns of them.
const OUT_WIDE: u32 = min(256u / SIZE, MATRICES_N * SIZE);
const OUT_LEN: u32 = SIZE * OUT_WIDE;
var<workgroup> out: array<f32, SUBGROUPS_M * SUBGROUPS_N * OUT_LEN>; // [subgroup][m][n]

// What an invocation's subgroup has in `out`: where that starts, and its first row and column in the tile.
struct Place {
    at: u32,
    row: u32,
    col: u32,
}

// Where the sums of matrix (i, j), and of those to its right, go.
fn place_of(i: u32, j: u32, lid: u32) -> Place {
    let subgroup = lid / COOPERATING;
    return Place(
        subgroup * OUT_LEN,
        (subgroup / SUBGROUPS_N * MATRICES_M + i) * SIZE,
        (subgroup % SUBGROUPS_N * MATRICES_N + j) * SIZE,
    );
}

fn out_quad(at: u32) -> vec4<f32> {
    return vec4<f32>(out[at], out[at + 1u], out[at + 2u], out[at + 3u]);
}
