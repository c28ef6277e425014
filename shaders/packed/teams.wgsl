// Invocations that share sums, on any adapter; after common/subgroups.wgsl or no_subgroups.wgsl. TEAM consecutive ones
// of a workgroup have a part each of the same ROWS x COLS sums. The text with the entry point has GROUP, the
// invocations of a workgroup.

// knobs
const TEAM: u32 = 32u; // a power of two that divides GROUP
const SUBGROUP: u32 = 1u; // how many of a team can shuffle
const ROWS: u32 = 1u; // rows of x
const COLS: u32 = 1u; // columns of y: rows of the matrix

alias Sums = array<array<f32, COLS>, ROWS>;

// The sums over a team, in a fixed order: within subgroups first, then through workgroup memory. Complete in the
// first invocation of each team. All of a workgroup must call it.
fn team_sums(parts: Sums, lid: u32) -> Sums {
    var sums = parts;
    for (var r = 0u; r < ROWS; r++) { // unroll
        for (var c = 0u; c < COLS; c++) { // unroll
            for (var step = 1u; step < SUBGROUP; step *= 2u) {
                sums[r][c] += across(vec2<f32>(sums[r][c]), step).x;
            }
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
