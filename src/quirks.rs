//! Faults and oddities of drivers and compilers that the code works around: a table, so that each is known by a name,
//! has a reason to be there, and can go when it is no longer needed.
//!
//! Look here when a kernel is written in a roundabout way, and after a driver's update: `retest` shows whether a
//! workaround is still worth it. Comments at the workaround name the quirk. tests/quirks.rs checks that they do, and
//! that what can be tried on any machine still fails.

use std::fmt;

/// Something that a driver or compiler gets wrong, or does in its own way.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Quirk {
    /// What comments call it.
    pub name: &'static str,
    /// Who has it.
    pub driver: &'static str,
    /// Where it was seen, and where it was looked for in vain.
    pub versions: &'static str,
    /// What goes wrong.
    pub effect: &'static str,
    /// What is done instead.
    pub workaround: &'static str,
    /// Files with the workaround, which name the quirk.
    pub places: &'static [&'static str],
    /// The command that shows whether it is still there.
    pub retest: &'static str,
}

/// Plain kernels with strided loads; see [`QUIRKS`].
pub const SLOW_STRIDES: Quirk = Quirk {
    name: "slow-strides",
    driver: "Mesa lavapipe",
    versions: "Mesa 22.3.6 has it, 25.0.7 does not; taken to end with 25",
    effect: "a matmul whose first matrix is transposed, without subgroups, takes two to seven times as long as a \
             packed one, and each run leaks memory in the driver",
    workaround: "the second matrix is packed first, also where few rows share the cost",
    places: &["src/ops/matmul/tiles.rs"],
    retest: "cargo bench --bench ops matmul",
};

/// How many iterations of loops an invocation may run on a software adapter: [`LOOPS_END_EARLY`].
pub(crate) const LOOP_ITERATIONS: usize = 65_535;

/// Wrong results of long loops; see [`QUIRKS`].
pub const LOOPS_END_EARLY: Quirk = Quirk {
    name: "loops-end-early",
    driver: "Mesa lavapipe",
    versions: "Mesa 22.3.6 has it, 26.2 does not; taken to end with 26",
    effect: "after 65,535 iterations of all loops together an invocation leaves its loops, and what it then stores is \
             wrong",
    workaround: "an invocation gets less to do: of wide heads, of long rows, of lists of equal tokens, of packed \
                 vocabularies; where that is not so, a size that takes more is an error when it is planned",
    places: &[
        "shaders/attention/wide.wgsl",
        "src/ops/attention/tiles.rs",
        "src/ops/rowwise.rs",
        "src/ops/embedding.rs",
        "src/ops/gather.rs",
        "src/ops/packed.rs",
        "src/ops/reduce.rs",
        "src/ops/rope.rs",
        "src/ops/windows.rs",
    ],
    retest: "cargo test --test ops attention",
};

/// All quirks that the code works around.
pub const QUIRKS: &[Quirk] = &[
    SLOW_STRIDES,
    Quirk {
        name: "late-timestamps",
        driver: "Mesa lavapipe",
        versions: "Mesa 22.3.6 and 25.0.7",
        effect: "a timestamp is taken when the next flush comes, which may be long after the work before it",
        workaround: "a second timestamp follows the first at once, so that the first is taken in time",
        places: &["src/device/pace.rs"],
        retest: "cargo test --test measuring a_pace_corrects_estimates_by_what_frames_took",
    },
    Quirk {
        name: "slow-unrolled-memory",
        driver: "Mesa lavapipe",
        versions: "Mesa 25.0.7, where an unrolled load takes about 70 ms to compile; less so 22.3.6",
        effect: "loops of constant length over loads or stores are unrolled, and each copy is slow to compile",
        workaround: "such loops count from a number that is not constant",
        places: &["shaders/attention/lanes.wgsl", "shaders/attention/wide.wgsl", "shaders/matmul/lanes.wgsl"],
        retest: "cargo test --test ops attention",
    },
    Quirk {
        name: "no-long-unrolling",
        driver: "Mesa lavapipe",
        versions: "Mesa 22.3.6, where such a kernel also takes 60 times as long to compile, and 26.2",
        effect: "loops of more than 32 iterations are not unrolled, so that arrays which they index leave the registers: \
                 attention with heads of 192 ran at a third of the rate of 128",
        workaround: "wide heads have kernels of their own, which keep sums in memory",
        places: &["src/ops/attention/tiles.rs"],
        retest: "cargo bench --bench ops attention",
    },
    LOOPS_END_EARLY,
    Quirk {
        name: "no-enable-subgroups",
        driver: "naga",
        versions: "30",
        effect: "`enable subgroups;`, which the standard asks for, is a syntax error",
        workaround: "kernels use subgroup operations without the directive, and features are found by their names",
        places: &["shaders/common/subgroups.wgsl", "src/kernel/wgsl.rs"],
        retest: "cargo test --test quirks naga_rejects_enable_subgroups",
    },
    Quirk {
        name: "tanh-overflow",
        driver: "several",
        versions: "as WGSL allows",
        effect: "tanh of a large argument is NaN or infinite on some drivers",
        workaround: "GELU and tanh are written with one exp that stays in range",
        places: &["shaders/gelu.wgsl", "shaders/map/helpers.wgsl"],
        retest: "cargo test --test ops gelu",
    },
];

/// Which quirks an adapter has, of those that plans depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Quirks {
    /// [`SLOW_STRIDES`].
    pub slow_strides: bool,
    /// [`LOOPS_END_EARLY`].
    pub loops_end_early: bool,
}

impl Quirks {
    /// Those of an adapter, by the name and version of its driver.
    pub fn of(info: &wgpu::AdapterInfo) -> Self {
        if info.driver != "llvmpipe" {
            return Quirks::default();
        }
        let major = mesa(&info.driver_info);
        Quirks {
            slow_strides: major.is_some_and(|major| major < 25),
            // Results are at stake, so a version that we cannot read counts as an old one.
            loops_end_early: major.is_none_or(|major| major < 26),
        }
    }

    /// Whether an invocation gets to the end of its loops with so many iterations: not always with [`LOOPS_END_EARLY`].
    pub(crate) fn ends_loops(self, iterations: usize) -> bool {
        !self.loops_end_early || iterations < LOOP_ITERATIONS
    }

    /// Checks that it does, with as many `iterations` as it takes because `what` is `size`.
    pub(crate) fn check_loops(self, what: &str, size: usize, iterations: usize) -> Result<(), String> {
        if self.ends_loops(iterations) {
            return Ok(());
        }
        let most = size as u64 * LOOP_ITERATIONS as u64 / iterations as u64;
        Err(format!(
            "{what} is {size}, too much for Mesa's lavapipe before version 26, which ends a kernel's loops after \
             {LOOP_ITERATIONS} iterations and would get wrong results: about {most} is the most. Make it smaller, for \
             example with a smaller batch, or update Mesa"
        ))
    }
}

/// The major version in `Mesa 22.3.6 (LLVM 15.0.6)`.
fn mesa(driver_info: &str) -> Option<u32> {
    driver_info.strip_prefix("Mesa ")?.split(['.', '-', ' ']).next()?.parse().ok()
}

impl fmt::Display for Quirk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Quirk { name, driver, versions, effect, workaround, retest, .. } = self;
        write!(f, "{name} ({driver}: {versions}): {effect}. Instead, {workaround}. Retest: {retest}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_mesa() {
        assert_eq!(mesa("Mesa 22.3.6 (LLVM 15.0.6)"), Some(22));
        assert_eq!(mesa("Mesa 25.0.7-2~bpo12+1 (LLVM 19.1.7)"), Some(25));
        assert_eq!(mesa("Mesa 26"), Some(26));
        assert_eq!((mesa("535.183.01"), mesa("Mesa unknown"), mesa("")), (None, None, None));
    }
}
