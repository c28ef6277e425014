//! What a self-test of a device finds, and how it judges what kernels have written.

use std::fmt;

use crate::profile::{Cooperative, Profile};

/// What kernels did on a device, as against what its driver says: see [`Gpu::self_test`](crate::Gpu::self_test).
///
/// ```
/// let gpu = throughline::Gpu::headless_blocking()?; // this tests itself
/// for dropped in gpu.tested().map_or(&[][..], |test| &test.dropped) {
///     eprintln!("not used here: {dropped}");
/// }
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SelfTest {
    /// Lanes of the subgroups in which a workgroup of 256 ran. `None` without subgroup operations.
    pub subgroup_size: Option<u32>,
    /// What the driver offers and plans for this device do not use, since it does something else than specified.
    pub dropped: Vec<Dropped>,
    /// The driver compiles kernels and runs none, as those do which stand in for a card that is not there. Every result
    /// is zero, so that nothing could be tested, and nothing is dropped.
    pub compiles_only: bool,
}

/// Something that a driver offers, and why it is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Dropped {
    /// What is not used.
    pub capability: Capability,
    /// What went wrong in the test.
    pub reason: String,
}

/// What a self-test can drop from a device's profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Capability {
    /// [`Profile::subgroups`].
    Subgroups,
    /// [`Profile::cooperative`].
    CooperativeMatrices,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Capability::Subgroups => "subgroup operations",
            Capability::CooperativeMatrices => "cooperative matrices",
        })
    }
}

impl fmt::Display for Dropped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.capability, self.reason)
    }
}

impl SelfTest {
    pub(super) fn drop(&mut self, capability: Capability, reason: String) {
        self.dropped.push(Dropped { capability, reason });
    }

    /// The profile without what was dropped. The measured size of subgroups replaces a range only on Metal, which names
    /// every size that its GPUs ever had: others may choose another size for another kernel.
    pub(super) fn corrected(&self, profile: &Profile, backend: wgpu::Backend) -> Profile {
        let mut profile = profile.clone();
        if let Some(size) = self.subgroup_size.filter(|_| backend == wgpu::Backend::Metal) {
            profile.subgroups = profile.subgroups.map(|_| [size, size]);
        }
        for dropped in &self.dropped {
            match dropped.capability {
                Capability::Subgroups => profile.subgroups = None,
                Capability::CooperativeMatrices => profile.cooperative = None,
            }
        }
        profile
    }
}

/// Numbers of a row that shaders/self_test/subgroups.wgsl writes, one row for each invocation.
pub(super) const ROW: usize = FROM_LANE + 16;
const MARK: u32 = 20_480;
/// Where a row has what came from the lanes across, and from lanes 0, 1, ...
const ACROSS: usize = 3;
const FROM_LANE: usize = ACROSS + 7;

/// The size of the subgroups that wrote this, or how they differ from what kernels rely on. `None` if nothing ran.
/// `advertised` are the smallest and the largest size that the driver names: no kernel lets values go further than the
/// smallest.
pub(super) fn subgroup_size(seen: &[u32], advertised: [u32; 2]) -> Result<Option<u32>, String> {
    if seen.iter().all(|&word| word == 0) {
        return Ok(None);
    }
    let rows: Vec<&[u32]> = seen.chunks_exact(ROW).collect();
    if let Some(i) = rows.iter().position(|row| row[0] != MARK) {
        return Err(format!("invocation {i} of a workgroup of {} did not write its results", rows.len()));
    }
    let size = rows[0][1];
    let [min, max] = advertised;
    if !size.is_power_of_two() || !(min..=max).contains(&size) {
        return Err(format!("subgroups have {size} lanes, where the driver says {min} to {max}"));
    }
    let reach = min.min(size) as usize;
    for (i, row) in rows.iter().enumerate() {
        if row[1] != size {
            return Err(format!("one workgroup has subgroups of {size} and of {} lanes", row[1]));
        }
        let lane = i as u32 % size;
        if row[2] != lane {
            return Err(format!("invocation {i} is lane {} of its subgroup of {size}, not {lane}", row[2]));
        }
        let across = (0..).map(|step| (i ^ 1 << step, 1 << step)).take_while(|&(_, step)| step < reach);
        for ((from, step), &got) in across.zip(&row[ACROSS..FROM_LANE]) {
            if got != from as u32 && from < rows.len() {
                return Err(format!(
                    "`subgroupShuffleXor` by {step} gave invocation {i} the value of {got}, not {from}"
                ));
            }
        }
        let first = i - lane as usize;
        for (from, &got) in (first..first + reach).zip(&row[FROM_LANE..]) {
            if got != from as u32 && from < rows.len() {
                let lane = from - first;
                return Err(format!(
                    "`subgroupShuffle` from lane {lane} gave invocation {i} the value of {got}, not {from}"
                ));
            }
        }
    }
    Ok(Some(size))
}

/// Rows, columns and inner dimension of the product in shaders/self_test/matrices.wgsl, by so many subgroups along rows
/// and along columns.
pub(super) fn product_shape(kind: Cooperative, subgroups: usize) -> [usize; 3] {
    let side = 2 * subgroups * kind.size() as usize;
    [side, side, 40]
}

fn product(kind: Cooperative, subgroups: usize) -> Vec<f32> {
    let [m, n, k] = product_shape(kind, subgroups);
    let eighths = |hash: usize| ((hash % 15) as f32 - 7.0) / 8.0;
    let large = if kind.is_f16() { f32::INFINITY } else { 70_000.0 };
    let a = |i: usize, k: usize| if (i, k) == (5, 3) { large } else { eighths(7 * i + 3 * k + i * k) };
    let term = |i: usize, j: usize, k: usize| a(i, k) * eighths(5 * k + 11 * j + k * k * j);
    (0..m * n).map(|at| (0..k).map(|k| term(at / n, at % n, k)).sum()).collect()
}

/// How a product differs from the one that cooperative matrices should give.
pub(super) fn product_problem(y: &[f32], kind: Cooperative, subgroups: usize) -> Option<String> {
    let [_, n, _] = product_shape(kind, subgroups);
    let want = product(kind, subgroups);
    // What is infinite times zero is not a number.
    let differ = |(y, want): (&f32, &f32)| y != want && !(y.is_nan() && want.is_nan());
    let wrong = y.iter().zip(&want).filter(|&pair| differ(pair)).count();
    let at = y.iter().zip(&want).position(differ)?;
    let (row, column) = (at / n, at % n);
    Some(format!(
        "of a product's {} elements {wrong} are wrong: [{row}, {column}] is {}, not {}",
        want.len(),
        y[at],
        want[at]
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::AdapterClass;

    /// What a workgroup of 256 writes if lanes number as they should, with one number changed.
    fn seen(size: u32, change: impl FnOnce(&mut [u32])) -> Vec<u32> {
        let row = |i: u32| {
            let across = (0..7).map(|step| i ^ 1 << step);
            let from = (0..16).map(|lane| i - i % size + lane);
            [MARK, size, i % size].into_iter().chain(across).chain(from).collect::<Vec<_>>()
        };
        let mut seen: Vec<u32> = (0..256).flat_map(row).collect();
        assert_eq!(seen.len(), 256 * ROW);
        change(&mut seen);
        seen
    }

    #[test]
    fn subgroups_that_do_as_specified_are_measured() {
        for size in [4, 8, 16, 32, 64, 128] {
            assert_eq!(subgroup_size(&seen(size, |_| ()), [4, 128]), Ok(Some(size)));
            assert_eq!(subgroup_size(&seen(size, |_| ()), [size, size]), Ok(Some(size)));
        }
        assert_eq!(subgroup_size(&[0; 256 * ROW], [4, 64]), Ok(None));
    }

    #[test]
    fn subgroups_that_do_something_else_are_not_believed() {
        let problem = |advertised, change: fn(&mut [u32])| subgroup_size(&seen(32, change), advertised).unwrap_err();
        let row = |i: usize| i * ROW;
        assert!(problem([8, 16], |_| ()).contains("32 lanes, where the driver says 8 to 16"));
        assert!(problem([64, 64], |_| ()).contains("32 lanes"));
        assert!(problem([4, 64], |s| s[5 * ROW] = 0).contains("invocation 5 of a workgroup of 256 did not write"));
        assert!(problem([4, 64], |s| s[255 * ROW + 1] = 16).contains("of 32 and of 16 lanes"));
        // Lanes that number along another axis of the workgroup.
        let swapped = |s: &mut [u32]| s.swap(ROW + 2, 2 * ROW + 2);
        assert!(problem([4, 64], swapped).contains("invocation 1 is lane 2 of its subgroup of 32, not 1"));
        let across = |s: &mut [u32]| s[7 * ROW + ACROSS + 1] = 7;
        assert!(problem([4, 64], across).contains("by 2 gave invocation 7 the value of 7, not 5"));
        let from = |s: &mut [u32]| s[40 * ROW + FROM_LANE + 3] = 3;
        assert!(problem([4, 64], from).contains("from lane 3 gave invocation 40 the value of 3, not 35"));
        // Further than the smallest size, nothing is asked of it.
        let mut far = seen(32, |_| ());
        far[row(7) + ACROSS + 4] = 99;
        far[row(7) + FROM_LANE + 8] = 99;
        assert_eq!(subgroup_size(&far, [8, 32]), Ok(Some(32)));
        assert!(subgroup_size(&far, [32, 32]).is_err());
    }

    #[test]
    fn matrices_must_multiply_in_the_right_order_and_orientation() {
        for (kind, subgroups) in Cooperative::ALL.into_iter().flat_map(|kind| [(kind, 1), (kind, 2)]) {
            let [m, n, _] = product_shape(kind, subgroups);
            let problem = |y: &[f32]| product_problem(y, kind, subgroups);
            let y = product(kind, subgroups);
            assert_eq!(problem(&y), None);
            let transposed: Vec<f32> = (0..m * n).map(|i| y[i % m * n + i / m]).collect();
            assert!(problem(&transposed).is_some());
            let size = kind.size() as usize;
            // Each matrix transposed in its place: a driver that takes rows for columns.
            let place = |r: usize, c: usize| (r - r % size + c % size) * n + c - c % size + r % size;
            let turned: Vec<f32> = (0..m * n).map(|i| y[place(i / n, i % n)]).collect();
            assert!(problem(&turned).unwrap().contains("elements"));
            assert!(problem(&vec![0.0; m * n]).is_some());
            // What f16 can't hold, at its largest instead of infinite.
            let kept: Vec<f32> = y.iter().map(|y| if y.is_finite() { *y } else { 65_504.0 }).collect();
            assert_eq!(problem(&kept).is_some(), kind.is_f16());
            let mut one_off = y;
            one_off[n + 2] += 1.0;
            assert!(problem(&one_off).unwrap().contains("1 are wrong: [1, 2] is"));
        }
    }

    #[test]
    fn what_fails_leaves_the_profile() {
        let profile = Profile {
            subgroups: Some([4, 64]),
            cooperative: Some(Cooperative::F32),
            ..Profile::portable(AdapterClass::Gpu)
        };
        let mut test = SelfTest { subgroup_size: Some(32), ..SelfTest::default() };
        assert_eq!(test.corrected(&profile, wgpu::Backend::Vulkan), profile);
        assert_eq!(test.corrected(&profile, wgpu::Backend::Metal).subgroups, Some([32, 32]));
        test.drop(Capability::CooperativeMatrices, "they add".into());
        let corrected = test.corrected(&profile, wgpu::Backend::Metal);
        assert_eq!((corrected.subgroups, corrected.cooperative), (Some([32, 32]), None));
        test.drop(Capability::Subgroups, "lanes number backwards".into());
        assert_eq!(test.corrected(&profile, wgpu::Backend::Metal).subgroups, None);
        assert_eq!(test.dropped[1].to_string(), "subgroup operations: lanes number backwards");
    }
}
