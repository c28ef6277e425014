// Which rows an invocation owns, in lanes.wgsl and wide.wgsl, whose knobs GROUP and ROWS this uses.

fn place(group: u32, lane: u32, heads: u32) -> Place {
    let index = group / p.blocks;
    return Place(index / heads, index % heads, ((group % p.blocks) * GROUP + lane) * ROWS, p.tk - 1u);
}

// The first row of a workgroup.
fn first_row(group: u32) -> u32 {
    return (group % p.blocks) * GROUP * ROWS;
}

// The last row of a workgroup.
fn last_row(group: u32) -> u32 {
    return ((group % p.blocks) * GROUP + GROUP) * ROWS - 1u;
}
