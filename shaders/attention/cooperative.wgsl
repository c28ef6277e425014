// Attention on cooperative matrices, which the invocations of a subgroup hold together (tensor cores, simdgroup
// matrices); after the texts that shared.wgsl lists. `enable` lines must come before all of that, and only naga knows
// this extension: src/ops/attention/launch.rs adds them. There are no subgroup operations here: a driver crashes on
// both in one module. As in tiled.wgsl, a tile of rows meets a tile of the other side.
//
// Where the elements of a matrix are among the invocations is for the device to know. So what goes by element goes by
// way of workgroup memory: rows of q, k, v and do on their way into matrices, with zeros past the width of a head;
// scores on their way to the softmax and, as weights, back; sums on their way out. Where subgroups turn out smaller than
// COOPERATING, each of them does the same work: between two barriers, matrices are either loaded or stored.

// knobs
alias Factor = f32; // what is multiplied; sums are f32
alias MatrixA = coop_mat8x8<f32, A>;
alias MatrixB = coop_mat8x8<f32, B>;
alias MatrixC = coop_mat8x8<f32, C>;
const SIZE: u32 = 8u; // rows and columns of these matrices
const PAD: u32 = 4u; // elements of a Factor in 16 bytes, to which matrices in memory are aligned
const COOPERATING: u32 = 32u; // invocations of a subgroup
const DOWN: u32 = 1u; // subgroups that share the rows of a tile
const ACROSS: u32 = 1u; // subgroups that share its columns
const BLOCKS: u32 = 1u; // matrices that a subgroup has along the rows
const OTHERS: u32 = 8u; // rows of the other side that the workgroup meets at a time: a multiple of ACROSS * SIZE
const HELD: u32 = 1u; // whether subgroups hold their rows in registers, 1 or 0: software adapters take long to compile that
const SIDES: u32 = 1u; // of how many tensors the workgroup has its rows: q, or backward q and do, or k and v

const GROUP: u32 = DOWN * ACROSS * COOPERATING;
const BAND: u32 = DOWN * SIZE; // rows of all subgroups' first matrices, and of their second ones, ..
const TILE: u32 = BLOCKS * BAND; // rows of a workgroup
const COLUMNS: u32 = ACROSS * SIZE; // columns of all subgroups' first matrices
const WIDE: u32 = (DIM * WIDTH + COLUMNS - 1u) / COLUMNS * COLUMNS; // width of a head, with zeros
const ZEROS: u32 = WIDE - DIM * WIDTH;
const STEPS: u32 = WIDE / SIZE; // matrices along a row
const SCORED: u32 = OTHERS / COLUMNS; // of those of a row of scores, how many a subgroup has
const SUMMED: u32 = WIDE / COLUMNS; // the same of sums

// How far apart rows are: so that neighbours do not begin in the same bank.
const STRIDE: u32 = WIDE + PAD;
const WEIGHT_STRIDE: u32 = OTHERS + PAD;
const TILE_STRIDE: u32 = OTHERS + 4u;

// Of a tile of scores, an invocation has every TEAM-th column of OWN rows.
const TEAM: u32 = max(1u, GROUP / TILE);
const OWN: u32 = max(1u, TILE / GROUP);
const PART: u32 = OTHERS / TEAM;

// A row's weights are relative to its largest score so far, or to an earlier one: the sums are only made smaller where a
// score exceeds that by so much. No weight is more than exp of this, 256.
const SLACK: f32 = 5.545;

const KEPT: u32 = 1u + HELD * (STEPS - 1u);
alias Band = array<MatrixA, KEPT>; // rows of a subgroup's own
alias Held = array<Band, BLOCKS>;
alias Column = array<MatrixC, BLOCKS>;
alias Scores = array<Column, SCORED>;
alias Sums = array<Column, SUMMED>;
alias Mine = array<array<f32, PART>, OWN>; // an invocation's share of a tile

// Where rows are staged: two tiles of the other side, and those of the workgroup where they are not held.
const SECOND: u32 = OTHERS * STRIDE;
const SIDE: u32 = 2u * OTHERS * STRIDE;
const STAGED_ROWS: u32 = 2u * OTHERS + (1u - HELD) * SIDES * TILE;
var<workgroup> staged: array<Factor, STAGED_ROWS * STRIDE>;
var<workgroup> tile: array<f32, TILE * TILE_STRIDE>; // scores, or COLUMNS of the sums
var<workgroup> weights: array<Factor, TILE * WEIGHT_STRIDE>;
var<workgroup> shares: array<f32, TILE * TEAM>; // of maxima and norms
var<workgroup> factors: array<f32, TILE>; // of the sums of each row
var<workgroup> grown: atomic<u32>; // the last step at which a row's scores exceeded the slack

// cooperative_backward_kv, of each query that the keys meet
var<workgroup> met: array<vec2<f32>, OTHERS>; // lse and delta
var<workgroup> met_keys: array<vec2<u32>, OTHERS>; // first key and number of keys that it sees

// The first row of the invocation's subgroup in each band, and its first column.
fn down(lid: u32) -> u32 {
    return lid / COOPERATING / ACROSS * SIZE;
}

fn across(lid: u32) -> u32 {
    return lid / COOPERATING % ACROSS * SIZE;
}

// The row that is number `r` of those of an invocation, and the column that is number `i`.
fn own_row(r: u32, lid: u32) -> u32 {
    return r * GROUP + lid / TEAM;
}

fn own_column(i: u32, lid: u32) -> u32 {
    return i * TEAM + lid % TEAM;
}

// A driver may round what is too large for f16 to 65504 instead of infinity, which loss scaling looks for.
fn factor(v: f32) -> Factor {
    if (PAD == 8u) {
        return Factor(select(v, v * 3e38, abs(v) >= 65520.0));
    }
    return Factor(v);
}

// Zeros past the width of heads, where nothing else is ever staged.
fn clear(lid: u32) {
    for (var i = lid; i < STAGED_ROWS * ZEROS; i += GROUP) {
        staged[i / max(ZEROS, 1u) * STRIDE + DIM * WIDTH + i % max(ZEROS, 1u)] = Factor(0.0);
    }
    if (lid == 0u) {
        atomicStore(&grown, 0u);
    }
}

// Stages rows from `row` on. These four functions differ only in what they read: see tiled.wgsl.
fn stage_q(at: Place, lid: u32, to: u32, row: u32, rows: u32) {
    for (var i = lid; i < rows * DIM; i += GROUP) {
        put(to + i / DIM * STRIDE + i % DIM * WIDTH, q[q_at(at, row + i / DIM) + i % DIM]);
    }
}

fn stage_do(at: Place, lid: u32, to: u32, row: u32, rows: u32) {
    for (var i = lid; i < rows * DIM; i += GROUP) {
        put(to + i / DIM * STRIDE + i % DIM * WIDTH, do_[q_at(at, row + i / DIM) + i % DIM]);
    }
}

fn stage_k(at: Place, lid: u32, to: u32, key: u32, rows: u32) {
    for (var i = lid; i < rows * DIM; i += GROUP) {
        put(to + i / DIM * STRIDE + i % DIM * WIDTH, k[kv_at(at, kv_head(at), key + i / DIM) + i % DIM]);
    }
}

fn stage_v(at: Place, lid: u32, to: u32, key: u32, rows: u32) {
    for (var i = lid; i < rows * DIM; i += GROUP) {
        put(to + i / DIM * STRIDE + i % DIM * WIDTH, v[kv_at(at, kv_head(at), key + i / DIM) + i % DIM]);
    }
}

// Where the workgroup's rows are staged: band `b` of the tensor that is number `side`. Those that are held need a place
// only until they are.
fn own(side: u32, b: u32) -> u32 {
    if (HELD == 1u) {
        return 0u;
    }
    return SIDE + (side * TILE + b * BAND) * STRIDE;
}

// The matrices of a subgroup's rows in a band that is staged there.
fn of_band(lid: u32, at: u32) -> Band {
    var band: Band;
    if (HELD == 1u) {
        for (var c = 0u; c < KEPT; c++) { // unroll
            band[c] = coopLoadT<MatrixA>(&staged[at + down(lid) * STRIDE + c * SIZE], STRIDE);
        }
    }
    return band;
}

// scores += products of the workgroup's rows and those staged at `at`.
fn add_products(scores: ptr<function, Scores>, held: ptr<function, Held>, side: u32, lid: u32, at: u32) {
    let theirs = at + across(lid) * STRIDE;
    if (HELD == 1u) {
        for (var c = 0u; c < KEPT; c++) { // unroll
            for (var j = 0u; j < SCORED; j++) { // unroll
                let other = coopLoad<MatrixB>(&staged[theirs + j * COLUMNS * STRIDE + c * SIZE], STRIDE);
                for (var b = 0u; b < BLOCKS; b++) { // unroll
                    (*scores)[j][b] = coopMultiplyAdd((*held)[b][c], other, (*scores)[j][b]);
                }
            }
        }
        return;
    }
    let first = own(side, 0u) + down(lid) * STRIDE;
    for (var mine = first; mine < first + WIDE; mine += SIZE) { // not from 0, or Mesa would unroll it
        var rows: array<MatrixA, BLOCKS>;
        for (var b = 0u; b < BLOCKS; b++) { // unroll
            rows[b] = coopLoadT<MatrixA>(&staged[mine + b * BAND * STRIDE], STRIDE);
        }
        for (var j = 0u; j < SCORED; j++) { // unroll
            let other = coopLoad<MatrixB>(&staged[theirs + j * COLUMNS * STRIDE + mine - first], STRIDE);
            for (var b = 0u; b < BLOCKS; b++) { // unroll
                (*scores)[j][b] = coopMultiplyAdd(rows[b], other, (*scores)[j][b]);
            }
        }
    }
}

// Stores matrices of the invocation's subgroup, with those of the others, in columns `to` and following of the tile.
fn store(column: Column, lid: u32, to: u32) {
    let first = down(lid) * TILE_STRIDE + across(lid) + to;
    for (var b = 0u; b < BLOCKS; b++) { // unroll
        coopStoreT(column[b], &tile[first + b * BAND * TILE_STRIDE], TILE_STRIDE);
    }
}

// sums += weights times the rows staged at `at`.
fn add_weighted(sums: ptr<function, Sums>, lid: u32, at: u32) {
    let mine = down(lid) * WEIGHT_STRIDE;
    let theirs = at + across(lid);
    let first = (1u - HELD) * lid; // on software adapters not 0, or Mesa would unroll the loop
    for (var other = first; other < first + OTHERS; other += SIZE) {
        var w: array<MatrixA, BLOCKS>;
        for (var b = 0u; b < BLOCKS; b++) { // unroll
            w[b] = coopLoadT<MatrixA>(&weights[mine + b * BAND * WEIGHT_STRIDE + other - first], WEIGHT_STRIDE);
        }
        for (var j = 0u; j < SUMMED; j++) { // unroll
            let x = coopLoadT<MatrixB>(&staged[theirs + (other - first) * STRIDE + j * COLUMNS], STRIDE);
            for (var b = 0u; b < BLOCKS; b++) { // unroll
                (*sums)[j][b] = coopMultiplyAdd(w[b], x, (*sums)[j][b]);
            }
        }
    }
}

// Each row of sums times its factor.
fn scale_sums(sums: ptr<function, Sums>, lid: u32) {
    for (var j = 0u; j < SUMMED; j++) { // unroll
        store((*sums)[j], lid, 0u);
        workgroupBarrier();
        for (var i = lid; i < TILE * COLUMNS; i += GROUP) {
            tile[i / COLUMNS * TILE_STRIDE + i % COLUMNS] *= factors[i / COLUMNS];
        }
        workgroupBarrier();
        for (var b = 0u; b < BLOCKS; b++) { // unroll
            let from_ = down(lid) * TILE_STRIDE + across(lid) + b * BAND * TILE_STRIDE;
            (*sums)[j][b] = coopLoadT<MatrixC>(&tile[from_], TILE_STRIDE);
        }
        workgroupBarrier();
    }
}

// On their way out, sums are in the tile, COLUMNS of them at a time, after those before.
fn store_sums(column: Column, lid: u32) {
    workgroupBarrier();
    store(column, lid, 0u);
    workgroupBarrier();
}

// Their units: number `i` of a row is number `j * UNITS + i` of the head.
const UNITS: u32 = COLUMNS / WIDTH;

@compute @workgroup_size(GROUP)
fn cooperative_forward(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    var at = tile_place(group, p.heads);
    let before = ahead(at.batch);
    let end = visible(at.row0 + TILE - 1u, before);
    at.last = end - 1u;
    var first: array<u32, OWN>;
    var seen: array<u32, OWN>; // keys, counted from the first
    var top: array<f32, OWN>; // what a row's weights are relative to
    var norm: array<f32, OWN>; // this invocation's share
    for (var r = 0u; r < OWN; r++) { // unroll
        let row = at.row0 + own_row(r, lid);
        first[r] = first_key(at.batch, row);
        seen[r] = visible(row, before) - first[r];
        top[r] = MASKED;
    }
    clear(lid);
    var held: Held;
    for (var b = 0u; b < BLOCKS; b++) { // unroll
        workgroupBarrier();
        stage_q(at, lid, own(0u, b), at.row0 + b * BAND, BAND);
        workgroupBarrier();
        held[b] = of_band(lid, own(0u, b));
    }
    var sums: Sums;
    var step = 0u;
    for (var key0 = first_tile(at); key0 < end; key0 += OTHERS) {
        step++;
        workgroupBarrier();
        stage_k(at, lid, 0u, key0, OTHERS);
        stage_v(at, lid, SECOND, key0, OTHERS);
        workgroupBarrier();
        var scores: Scores;
        add_products(&scores, &held, 0u, lid, 0u);
        for (var j = 0u; j < SCORED; j++) { // unroll
            store(scores[j], lid, j * COLUMNS);
        }
        workgroupBarrier();
        var s: Mine;
        var peak: array<f32, OWN>;
        var grows = false;
        for (var r = 0u; r < OWN; r++) { // unroll
            peak[r] = MASKED;
            for (var i = 0u; i < PART; i++) { // unroll
                let score = tile[own_row(r, lid) * TILE_STRIDE + own_column(i, lid)] * p.scale;
                s[r][i] = select(MASKED, score, key0 + own_column(i, lid) - first[r] < seen[r]);
                peak[r] = max(peak[r], s[r][i]);
            }
            grows = grows || peak[r] > top[r] + SLACK;
            shares[own_row(r, lid) * TEAM + lid % TEAM] = peak[r];
        }
        // Whoever comes first, it becomes the number of the step.
        if (grows) {
            atomicMax(&grown, step);
        }
        workgroupBarrier();
        if (atomicLoad(&grown) == step) {
            for (var r = 0u; r < OWN; r++) { // unroll
                var highest = top[r];
                for (var i = 0u; i < TEAM; i++) {
                    highest = max(highest, shares[own_row(r, lid) * TEAM + i]);
                }
                let factor = exp(top[r] - highest);
                top[r] = highest;
                norm[r] *= factor;
                if (lid % TEAM == 0u) {
                    factors[own_row(r, lid)] = factor;
                }
            }
            // Before the first sums there is nothing to scale.
            if (step > 1u) {
                scale_sums(&sums, lid);
            }
        }
        for (var r = 0u; r < OWN; r++) { // unroll
            for (var i = 0u; i < PART; i++) { // unroll
                let w = select(0.0, exp(s[r][i] - top[r]), s[r][i] != MASKED);
                norm[r] += w;
                weights[own_row(r, lid) * WEIGHT_STRIDE + own_column(i, lid)] = factor(w);
            }
        }
        workgroupBarrier();
        add_weighted(&sums, lid, SECOND);
    }
    for (var r = 0u; r < OWN; r++) { // unroll
        shares[own_row(r, lid) * TEAM + lid % TEAM] = norm[r];
    }
    workgroupBarrier();
    for (var r = 0u; r < OWN; r++) { // unroll
        var all = 0.0;
        for (var i = 0u; i < TEAM; i++) {
            all += shares[own_row(r, lid) * TEAM + i];
        }
        let row = at.row0 + own_row(r, lid);
        if (lid % TEAM == 0u) {
            factors[own_row(r, lid)] = 1.0 / all;
            if (row < p.tq) {
                lse_out[stat_at(at, row)] = top[r] + log(all);
            }
        }
    }
    for (var j = 0u; j < SUMMED; j++) { // unroll
        store_sums(sums[j], lid);
        for (var i = lid; i < TILE * UNITS; i += GROUP) {
            let row = i / UNITS;
            let unit = j * UNITS + i % UNITS;
            if (at.row0 + row < p.tq && unit < DIM) {
                o[q_at(at, at.row0 + row) + unit] = taken(row * TILE_STRIDE + i % UNITS * WIDTH) * factors[row];
            }
        }
    }
}

@compute @workgroup_size(GROUP)
fn cooperative_backward_q(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    let at = tile_place(group, p.heads);
    let end = visible(at.row0 + TILE - 1u, p.tk - p.tq);
    var first: array<u32, OWN>;
    var seen: array<u32, OWN>; // keys, counted from the first
    var row_lse: array<f32, OWN>;
    var row_delta: array<f32, OWN>;
    for (var r = 0u; r < OWN; r++) { // unroll
        let row = at.row0 + own_row(r, lid);
        first[r] = first_key(at.batch, row);
        seen[r] = visible(row, p.tk - p.tq) - first[r];
        row_lse[r] = lse_at(stat_at(at, row));
        row_delta[r] = delta_at(stat_at(at, row));
    }
    clear(lid);
    var held_q: Held;
    var held_do: Held;
    for (var b = 0u; b < BLOCKS; b++) { // unroll
        workgroupBarrier();
        stage_q(at, lid, own(0u, b), at.row0 + b * BAND, BAND);
        workgroupBarrier();
        held_q[b] = of_band(lid, own(0u, b));
        workgroupBarrier();
        stage_do(at, lid, own(1u, b), at.row0 + b * BAND, BAND);
        workgroupBarrier();
        held_do[b] = of_band(lid, own(1u, b));
    }
    var sums: Sums;
    for (var key0 = first_tile(at); key0 < end; key0 += OTHERS) {
        workgroupBarrier();
        stage_k(at, lid, 0u, key0, OTHERS);
        stage_v(at, lid, SECOND, key0, OTHERS);
        workgroupBarrier();
        var scores: Scores;
        add_products(&scores, &held_q, 0u, lid, 0u);
        for (var j = 0u; j < SCORED; j++) { // unroll
            store(scores[j], lid, j * COLUMNS);
        }
        var dps: Scores;
        add_products(&dps, &held_do, 1u, lid, SECOND);
        workgroupBarrier();
        var probs: Mine;
        for (var r = 0u; r < OWN; r++) { // unroll
            for (var i = 0u; i < PART; i++) { // unroll
                let score = tile[own_row(r, lid) * TILE_STRIDE + own_column(i, lid)] * p.scale;
                let sees = key0 + own_column(i, lid) - first[r] < seen[r];
                probs[r][i] = select(0.0, exp(score - row_lse[r]), sees);
            }
        }
        workgroupBarrier();
        for (var j = 0u; j < SCORED; j++) { // unroll
            store(dps[j], lid, j * COLUMNS);
        }
        workgroupBarrier();
        for (var r = 0u; r < OWN; r++) { // unroll
            for (var i = 0u; i < PART; i++) { // unroll
                let dp = tile[own_row(r, lid) * TILE_STRIDE + own_column(i, lid)];
                let ds = probs[r][i] * (dp - row_delta[r]);
                weights[own_row(r, lid) * WEIGHT_STRIDE + own_column(i, lid)] = factor(ds);
            }
        }
        workgroupBarrier();
        add_weighted(&sums, lid, 0u);
    }
    for (var j = 0u; j < SUMMED; j++) { // unroll
        store_sums(sums[j], lid);
        for (var i = lid; i < TILE * UNITS; i += GROUP) {
            let row = i / UNITS;
            let unit = j * UNITS + i % UNITS;
            if (at.row0 + row < p.tq && unit < DIM) {
                dq[q_at(at, at.row0 + row) + unit] = taken(row * TILE_STRIDE + i % UNITS * WIDTH) * p.scale;
            }
        }
    }
}

@compute @workgroup_size(GROUP)
fn cooperative_backward_kv(
    @builtin(workgroup_id) wid: vec3<u32>,
    @builtin(num_workgroups) nwg: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let group = wid.x + wid.y * nwg.x;
    if (group >= p.groups) {
        return;
    }
    var at = key_place(group);
    let to = kv_at(at, kv_head(at), at.row0); // of the first key
    clear(lid);
    var held_k: Held;
    var held_v: Held;
    for (var b = 0u; b < BLOCKS; b++) { // unroll
        workgroupBarrier();
        stage_k(at, lid, own(0u, b), at.row0 + b * BAND, BAND);
        workgroupBarrier();
        held_k[b] = of_band(lid, own(0u, b));
        workgroupBarrier();
        stage_v(at, lid, own(1u, b), at.row0 + b * BAND, BAND);
        workgroupBarrier();
        held_v[b] = of_band(lid, own(1u, b));
    }
    var dks: Sums;
    var dvs: Sums;
    let first = first_query(at);
    let until = queries_until(at.batch, at.row0 + TILE - 1u);
    for (var h = 0u; h < p.heads / p.kv_heads; h++) {
        for (var row0 = first; row0 < until; row0 += OTHERS) {
            workgroupBarrier();
            stage_q(at, lid, 0u, row0, OTHERS);
            stage_do(at, lid, SECOND, row0, OTHERS);
            for (var i = lid; i < OTHERS; i += GROUP) {
                let row = row0 + i;
                let stat = stat_at(at, row);
                let row_first = first_key(at.batch, row);
                let seen = select(0u, visible(row, p.tk - p.tq) - row_first, row < p.tq);
                met[i] = vec2<f32>(lse_at(stat), delta_at(stat));
                met_keys[i] = vec2<u32>(row_first, seen);
            }
            workgroupBarrier();
            var scores: Scores;
            add_products(&scores, &held_k, 0u, lid, 0u);
            for (var j = 0u; j < SCORED; j++) { // unroll
                store(scores[j], lid, j * COLUMNS);
            }
            var dps: Scores;
            add_products(&dps, &held_v, 1u, lid, SECOND);
            workgroupBarrier();
            var probs: Mine;
            for (var r = 0u; r < OWN; r++) { // unroll
                for (var i = 0u; i < PART; i++) { // unroll
                    let other = own_column(i, lid);
                    let score = tile[own_row(r, lid) * TILE_STRIDE + other] * p.scale;
                    // A key before the first has a number past all.
                    let sees = at.row0 + own_row(r, lid) - met_keys[other].x < met_keys[other].y;
                    probs[r][i] = select(0.0, exp(score - met[other].x), sees);
                    weights[own_row(r, lid) * WEIGHT_STRIDE + other] = factor(probs[r][i]);
                }
            }
            workgroupBarrier();
            for (var j = 0u; j < SCORED; j++) { // unroll
                store(dps[j], lid, j * COLUMNS);
            }
            add_weighted(&dvs, lid, SECOND);
            workgroupBarrier();
            for (var r = 0u; r < OWN; r++) { // unroll
                for (var i = 0u; i < PART; i++) { // unroll
                    let other = own_column(i, lid);
                    let dp = tile[own_row(r, lid) * TILE_STRIDE + other];
                    let ds = probs[r][i] * (dp - met[other].y);
                    weights[own_row(r, lid) * WEIGHT_STRIDE + other] = factor(ds);
                }
            }
            workgroupBarrier();
            add_weighted(&dks, lid, 0u);
        }
        at.head++;
    }
    for (var j = 0u; j < SUMMED; j++) { // unroll
        store_sums(dks[j], lid);
        for (var i = lid; i < TILE * UNITS; i += GROUP) {
            let row = i / UNITS;
            let unit = j * UNITS + i % UNITS;
            if (at.row0 + row < p.tk && unit < DIM) {
                dk[to + row * p.kv_heads * DIM + unit] = taken(row * TILE_STRIDE + i % UNITS * WIDTH) * p.scale;
            }
        }
        store_sums(dvs[j], lid);
        for (var i = lid; i < TILE * UNITS; i += GROUP) {
            let row = i / UNITS;
            let unit = j * UNITS + i % UNITS;
            if (at.row0 + row < p.tk && unit < DIM) {
                dv[to + row * p.kv_heads * DIM + unit] = taken(row * TILE_STRIDE + i % UNITS * WIDTH);
            }
        }
    }
}
