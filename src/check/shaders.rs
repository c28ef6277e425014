//! The WGSL of kernels, checked without running it.

use std::collections::BTreeMap;

use wgpu::naga;
use wgpu::naga::valid::{Capabilities, ValidationFlags, Validator};

use super::failures::Failures;
use super::harness::{Harness, Target};
use crate::device::Gpu;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::ops::Case;
use crate::plan::Plan;
use crate::plan::requirements::Requirements;
use crate::profile::{AdapterClass, Cooperative, Profile};

/// Checks each of [`texts`] as [`kernel`] does, and that plans for devices with four storage buffers keep within
/// `wgpu::Limits::downlevel_defaults`. Nothing runs.
pub fn shaders(gpu: &Gpu, cases: &[Case]) -> Result<(), Failures> {
    let (texts, mut failures) = collect(gpu, cases);
    for (name, (case, kernel)) in texts {
        if let Err(message) = self::kernel(&kernel) {
            failures.push(case, format_args!("kernel `{name}`"), message);
        }
    }
    failures.into_result()
}

/// Every kernel that any of the cases launches on any kind of device, by its description: with each of
/// [`profiles`](super::profiles) and with cooperative matrices, with every variant, and with bindings merged for
/// devices that have only four. To print them, or to give them to another compiler.
pub fn texts(gpu: &Gpu, cases: &[Case]) -> Result<BTreeMap<String, Kernel>, Failures> {
    let (texts, failures) = collect(gpu, cases);
    failures.into_result()?;
    Ok(texts.into_iter().map(|(name, (_, kernel))| (name, kernel)).collect())
}

/// Kernels by description, each with the first case that launches it.
type Texts<'a> = BTreeMap<String, (&'a Case, Kernel)>;

fn collect<'a>(gpu: &Gpu, cases: &'a [Case]) -> (Texts<'a>, Failures) {
    let (mut texts, mut failures) = (Texts::new(), Failures::default());
    for case in cases {
        if let Err(e) = collect_case(gpu, case, &mut texts, &mut failures) {
            failures.push_error(case, e);
        }
    }
    (texts, failures)
}

fn collect_case<'a>(gpu: &Gpu, case: &'a Case, texts: &mut Texts<'a>, failures: &mut Failures) -> Result<()> {
    let harness = Harness::new(case, 3)?;
    // To read their text, no device with cooperative matrices is needed.
    let sizes = |kind| [(kind, [32, 32]), (kind, [32, 64])];
    let cooperative = Cooperative::ALL.into_iter().flat_map(sizes).map(|(kind, subgroups)| Profile {
        subgroups: Some(subgroups),
        cooperative: Some(kind),
        ..Profile::portable(AdapterClass::Gpu)
    });
    let mut targets = harness.targets(gpu)?;
    targets.extend(cooperative.map(Target::of));
    let mut add = |plan: Plan| {
        for kernel in plan.steps.into_iter().flat_map(|s| s.dispatches).map(|d| d.kernel) {
            // Kernels of generated text may differ in nothing but that, and those with marked loops in their class.
            let mut name = kernel.describe();
            while texts.get(&name).is_some_and(|(_, known)| *known != kernel) {
                name.push('\'');
            }
            texts.entry(name).or_insert((case, kernel));
        }
    };
    for target in targets {
        let few = target.downlevel();
        match harness.plan(&few.profile) {
            // Bindings of one type are merged, and those of a halved case may be of three: that is an error by name.
            Err(Error::Limit { .. }) if case.is_halved => {}
            plan => {
                let plan = plan?;
                if let Err(e) = Requirements::of(&plan).check(&wgpu::Limits::downlevel_defaults()) {
                    failures.push(case, &few, e);
                }
                // The texts of other variants are merged alike.
                if target.variant == 0 {
                    add(plan);
                }
            }
        }
        add(harness.plan(&target.profile)?);
    }
    Ok(())
}

/// Checks that a kernel is valid WGSL for naga, wgpu's compiler, and uses as much workgroup memory as plans count; an
/// `Err` is what is wrong.
pub fn kernel(kernel: &Kernel) -> Result<(), String> {
    let wgsl = kernel.wgsl().map_err(|e| e.to_string())?;
    let (module, info) = parse(&wgsl)?;
    let Some(index) = module.entry_points.iter().position(|e| e.name == kernel.entry) else {
        return Err(format!("has no entry point `{}`", kernel.entry));
    };
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).map_err(|e| e.to_string())?;
    let entry = info.get_entry_point(index);
    let used = module
        .global_variables
        .iter()
        .filter(|(handle, g)| g.space == naga::AddressSpace::WorkGroup && !entry[*handle].is_empty());
    let bytes: u32 = used.map(|(_, g)| layouter[g.ty].size.next_multiple_of(16)).sum();
    match kernel.workgroup_bytes() {
        Some(ours) if ours != bytes => Err(format!("uses {bytes} bytes of workgroup memory, but plans count {ours}")),
        _ => Ok(()),
    }
}

/// Checks that a text is valid WGSL for naga, wgpu's compiler; an `Err` is its message, with the line.
pub fn wgsl(text: &str) -> Result<(), String> {
    parse(text).map(drop)
}

fn parse(wgsl: &str) -> Result<(naga::Module, naga::valid::ModuleInfo), String> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|e| e.emit_to_string(wgsl))?;
    let capabilities = Capabilities::SUBGROUP
        | Capabilities::COOPERATIVE_MATRIX
        | Capabilities::SHADER_FLOAT16
        | Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    let info =
        Validator::new(ValidationFlags::all(), capabilities).validate(&module).map_err(|e| e.emit_to_string(wgsl))?;
    Ok((module, info))
}
