// How cooperative.wgsl moves what shared.wgsl loads and stores at a time, where that is an element.

fn put(to: u32, unit: E) {
    staged[to] = factor(unit);
}

fn taken(from_: u32) -> E {
    return tile[from_];
}
