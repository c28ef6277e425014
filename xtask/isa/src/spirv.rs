//! WGSL to SPIR-V, with the settings that wgpu has for the table's kernels.

use anyhow::{Context, Result, anyhow, bail};
use naga::AddressSpace;
use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use serde::{Deserialize, Serialize};

/// A shader that a driver can compile.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Shader {
    /// The entry point.
    pub entry: String,
    /// The module, with this entry point alone.
    pub words: Vec<u32>,
    /// What the entry point uses, all in group 0.
    pub bindings: Vec<Binding>,
    /// Bytes of workgroup memory that it uses.
    pub shared: u32,
    /// Whether it multiplies cooperative matrices.
    pub matrices: bool,
}

/// A buffer that a shader uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Binding {
    /// Number in group 0.
    pub number: u32,
    /// A uniform, not a storage buffer.
    pub uniform: bool,
}

/// Translates one entry point as `Gpu::compile` has it for trusted kernels: no bounds checks, no loop
/// bounding, no checks of divisors, no zeroed workgroup memory.
pub fn translate(wgsl: &str, entry: &str) -> Result<Shader> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|e| anyhow!(e.emit_to_string(wgsl)))?;
    let info = Validator::new(ValidationFlags::all(), Capabilities::all())
        .validate(&module)
        .map_err(|e| anyhow!(e.emit_to_string(wgsl)))?;
    let Some(index) = module.entry_points.iter().position(|e| e.name == entry) else {
        let names: Vec<&str> = module.entry_points.iter().map(|e| e.name.as_str()).collect();
        bail!("no entry point `{entry}`; the entry points are {}", names.join(", "));
    };
    let uses = info.get_entry_point(index);
    let mut bindings = vec![];
    let mut shared = 0;
    for (handle, global) in module.global_variables.iter().filter(|(handle, _)| !uses[*handle].is_empty()) {
        if global.space == AddressSpace::WorkGroup {
            shared += module.types[global.ty].inner.size(module.to_ctx());
        }
        let Some(place) = &global.binding else { continue };
        let uniform = match global.space {
            AddressSpace::Uniform => true,
            AddressSpace::Storage { .. } => false,
            other => bail!("binding {} is in space {other:?}; expected uniform or storage", place.binding),
        };
        if place.group != 0 {
            bail!("binding {} is in group {}; expected group 0", place.binding, place.group);
        }
        bindings.push((Binding { number: place.binding, uniform }, handle));
    }
    bindings.sort_unstable_by_key(|(binding, _)| *binding);
    let stage = naga::ShaderStage::Compute;
    let pipeline = spv::PipelineOptions { entry_point: entry.into(), shader_stage: stage };
    let (module, info) =
        naga::back::pipeline_constants::process_overrides(&module, &info, Some((stage, entry)), &Default::default())
            .context("overrides")?;
    let words = spv::write_vec(&module, &info, &options(), Some(&pipeline)).context("writing SPIR-V")?;
    let bindings = bindings.into_iter().map(|(binding, _)| binding).collect();
    let matrices = wgsl.starts_with("enable wgpu_cooperative_matrix");
    Ok(Shader { entry: entry.into(), words, bindings, shared, matrices })
}

fn options() -> spv::Options<'static> {
    let unchecked = BoundsCheckPolicy::Unchecked;
    spv::Options {
        lang_version: (1, 6),
        flags: spv::WriterFlags::empty(),
        bounds_check_policies: BoundsCheckPolicies {
            index: unchecked,
            buffer: unchecked,
            image_load: unchecked,
            binding_array: unchecked,
        },
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        emit_int_div_checks: false,
        ..Default::default()
    }
}

/// Names of a file's entry points.
pub fn entry_points(wgsl: &str) -> Result<Vec<String>> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|e| anyhow!(e.emit_to_string(wgsl)))?;
    Ok(module.entry_points.iter().map(|e| e.name.clone()).collect())
}
