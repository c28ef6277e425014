// Which rows a workgroup has, and which it meets, in tiled.wgsl and cooperative.wgsl, whose constants TILE and OTHERS this
// uses.

// The workgroup's place. Those with the most keys to see come first, so that none of them is left over
// at the end.
fn tile_place(group: u32, heads: u32) -> Place {
    let index = group / p.blocks;
    return Place(index / heads, index % heads, (p.blocks - 1u - group % p.blocks) * TILE, p.tk - 1u);
}

// The same where rows are keys. The head is the first of those that share them.
fn key_place(group: u32) -> Place {
    let sharing = p.heads / p.kv_heads;
    let head = group / p.blocks; // counts (batch, key head)
    return Place(head / p.kv_heads, head % p.kv_heads * sharing, (group % p.blocks) * TILE, p.tk - 1u);
}

// Where the keys begin that a tile of query rows meets. Tiles of keys are the same for all, so that sums do not
// depend on where other texts begin.
fn first_tile(at: Place) -> u32 {
    return first_key_of(at.batch, at.row0, TILE) / OTHERS * OTHERS;
}

// The first query that sees the first of a workgroup's keys.
fn first_query(at: Place) -> u32 {
    if (CAUSAL) {
        return max(at.row0 + p.tq, p.tk) - p.tk;
    }
    return 0u;
}
