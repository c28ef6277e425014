// How cooperative.wgsl moves what shared.wgsl loads and stores at a time, where that is a quad.

fn put(to: u32, unit: E) {
    for (var i = 0u; i < 4u; i++) { // unroll
        staged[to + i] = factor(unit[i]);
    }
}

fn taken(from_: u32) -> E {
    return E(tile[from_], tile[from_ + 1u], tile[from_ + 2u], tile[from_ + 3u]);
}
