//! What a device must offer to run a plan, as plain data that is known before there is a device.

use std::borrow::Cow;
use std::collections::HashSet;

use crate::error::{Error, Exceeded, Result};
use crate::kernel::Kernel;
use crate::plan::Plan;
use crate::profile::{AdapterClass, Profile};

/// What the kernels of some plans need of a device.
///
/// Use it to request a device with sufficient limits, or to find out whether one suffices.
/// [`TrainPlan`](crate::train::TrainPlan) and [`DecodePlan`](crate::decode::DecodePlan) return that of a whole trainer
/// or decoder.
///
/// ```
/// use throughline::{AdapterClass, Graph, Plan, Profile, Requirements, TensorType};
///
/// let mut g = Graph::new();
/// let x = g.input("x", TensorType::f32([40 << 20]))?; // 160 MiB
/// let y = g.gelu("y", x)?;
/// // Of an adapter, `Profile::of_adapter`.
/// let profile = Profile { max_binding_bytes: 1 << 30, ..Profile::portable(AdapterClass::Gpu) };
/// let plan = Plan::new(&g, &[y], &profile)?;
///
/// // An app merges that into what it asks for anyway:
/// let mut limits = wgpu::Limits::default();
/// let needs = Requirements::of(&plan);
/// assert_eq!(needs.missing(&limits).len(), 1);
/// needs.raise(&mut limits);
/// assert_eq!(limits.max_storage_buffer_binding_size, 160 << 20);
/// needs.check(&limits)?;
/// # Ok::<(), throughline::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Requirements {
    /// Size of the largest storage binding, in bytes.
    pub binding_bytes: u64,
    /// Size of the largest buffer, in bytes.
    pub buffer_bytes: u64,
    /// Most storage buffers of a kernel. A plan for a [profile](Profile::max_storage_buffers) with few needs no more
    /// than those.
    pub storage_buffers: u32,
    /// Most workgroups of a dispatch along one dimension.
    pub workgroups: u32,
    /// Most invocations of a workgroup.
    pub invocations: u32,
    /// Most workgroup memory, in bytes.
    pub workgroup_bytes: u32,
    /// Size of the largest uniform, in bytes.
    pub uniform_bytes: u64,
    /// Features that the kernels use. None, unless the plan was made for a profile with subgroups or cooperative
    /// matrices.
    pub features: wgpu::Features,
}

impl Requirements {
    /// The [`Profile::USEFUL_FEATURES`], each with what it is good for. None of them is required.
    pub const USEFUL_FEATURES: [(wgpu::Features, &'static str); 4] = [
        (wgpu::Features::SUBGROUP, "plans for a profile with subgroups share loads and sums by shuffles: faster rows"),
        (wgpu::Features::SHADER_F16, "kernels load and store tensors in f16 as they are, not as pairs in words"),
        (wgpu::Features::TIMESTAMP_QUERY, "profiles have the GPU's own times of kernels, not the host's clock"),
        (wgpu::Features::PIPELINE_CACHE, "`Gpu::save_pipelines` keeps compiled kernels for the next start"),
    ];

    /// The requirements of a plan.
    pub fn of(plan: &Plan) -> Self {
        let dispatches = || plan.steps.iter().flat_map(|s| &s.dispatches);
        let bound = dispatches().flat_map(|d| d.binds.iter().flatten()).map(|b| b.bytes as u64);
        let external = plan.externals.iter().map(|e| e.ty.storage_bytes() as u64);
        let planned = plan.buffers.iter().map(|b| b.bytes as u64).chain([plan.uniform_bytes() as u64]);
        // Kernels stay within these, whatever a device offers.
        let Profile { max_invocations, max_workgroup_bytes, .. } = Profile::portable(AdapterClass::Gpu);
        let kernels: HashSet<&Kernel> = dispatches().map(|d| &d.kernel).collect();
        let workgroup_bytes = kernels.into_iter().map(|k| k.workgroup_bytes().unwrap_or(max_workgroup_bytes));
        Requirements {
            binding_bytes: bound.max().unwrap_or(0).next_multiple_of(16),
            buffer_bytes: planned.chain(external).max().unwrap_or(0),
            storage_buffers: dispatches().map(|d| d.binds.len() as u32).max().unwrap_or(0),
            workgroups: dispatches().flat_map(|d| d.workgroups).max().unwrap_or(0),
            invocations: max_invocations,
            workgroup_bytes: workgroup_bytes.max().unwrap_or(0),
            uniform_bytes: dispatches().map(|d| 4 * d.words.len().max(d.ranges.len()) as u64).max().unwrap_or(0),
            features: plan.features(),
        }
    }

    /// The requirements of a single buffer.
    pub(crate) fn of_buffer(bytes: usize) -> Self {
        Requirements { buffer_bytes: bytes as u64, ..Self::default() }
    }

    /// The requirements of both: what a device must offer to run all of it.
    pub fn and(self, other: Self) -> Self {
        Requirements {
            binding_bytes: self.binding_bytes.max(other.binding_bytes),
            buffer_bytes: self.buffer_bytes.max(other.buffer_bytes),
            storage_buffers: self.storage_buffers.max(other.storage_buffers),
            workgroups: self.workgroups.max(other.workgroups),
            invocations: self.invocations.max(other.invocations),
            workgroup_bytes: self.workgroup_bytes.max(other.workgroup_bytes),
            uniform_bytes: self.uniform_bytes.max(other.uniform_bytes),
            features: self.features | other.features,
        }
    }

    /// Raises limits to what is needed, where they are lower. Others stay as they are.
    pub fn raise(&self, limits: &mut wgpu::Limits) {
        let l = limits;
        l.max_storage_buffer_binding_size = l.max_storage_buffer_binding_size.max(self.binding_bytes);
        l.max_buffer_size = l.max_buffer_size.max(self.buffer_bytes);
        l.max_storage_buffers_per_shader_stage = l.max_storage_buffers_per_shader_stage.max(self.storage_buffers);
        l.max_compute_workgroups_per_dimension = l.max_compute_workgroups_per_dimension.max(self.workgroups);
        l.max_compute_invocations_per_workgroup = l.max_compute_invocations_per_workgroup.max(self.invocations);
        l.max_compute_workgroup_size_x = l.max_compute_workgroup_size_x.max(self.invocations);
        l.max_compute_workgroup_storage_size = l.max_compute_workgroup_storage_size.max(self.workgroup_bytes);
        l.max_uniform_buffer_binding_size = l.max_uniform_buffer_binding_size.max(self.uniform_bytes);
    }

    /// The limits that are too low, by their names in wgpu.
    pub fn missing(&self, limits: &wgpu::Limits) -> Vec<Exceeded> {
        let l = limits;
        let all = [
            ("max_storage_buffer_binding_size", self.binding_bytes, l.max_storage_buffer_binding_size),
            ("max_buffer_size", self.buffer_bytes, l.max_buffer_size),
            (
                "max_storage_buffers_per_shader_stage",
                self.storage_buffers.into(),
                l.max_storage_buffers_per_shader_stage.into(),
            ),
            (
                "max_compute_workgroups_per_dimension",
                self.workgroups.into(),
                l.max_compute_workgroups_per_dimension.into(),
            ),
            (
                "max_compute_invocations_per_workgroup",
                self.invocations.into(),
                l.max_compute_invocations_per_workgroup.into(),
            ),
            ("max_compute_workgroup_size_x", self.invocations.into(), l.max_compute_workgroup_size_x.into()),
            (
                "max_compute_workgroup_storage_size",
                self.workgroup_bytes.into(),
                l.max_compute_workgroup_storage_size.into(),
            ),
            ("max_uniform_buffer_binding_size", self.uniform_bytes, l.max_uniform_buffer_binding_size),
        ];
        let missing = all.into_iter().filter(|(_, needed, allowed)| needed > allowed);
        missing.map(|(limit, needed, allowed)| Exceeded { what: limit.into(), needed, allowed }).collect()
    }

    /// Checks that these limits suffice.
    ///
    /// # Errors
    ///
    /// The error names each limit that is too low. If a plan is too large, a smaller batch or context may fit, or a
    /// plan made for the device's own profile.
    pub fn check(&self, limits: &wgpu::Limits) -> Result<()> {
        let exceeded = self.missing(limits);
        match exceeded.is_empty() {
            true => Ok(()),
            false => Err(Error::Limit { exceeded, advice: None }),
        }
    }

    /// A descriptor to open a device of this adapter with: wgpu's default limits, raised to the requirements, and the
    /// required features plus the useful ones that the adapter has. Add your own limits and features to it.
    pub fn descriptor(&self, adapter: &wgpu::Adapter) -> wgpu::DeviceDescriptor<'static> {
        let mut required_limits = wgpu::Limits::default();
        self.raise(&mut required_limits);
        let required_features = self.features | adapter.features() & Profile::USEFUL_FEATURES;
        wgpu::DeviceDescriptor { required_features, required_limits, ..Default::default() }
    }
}

impl Plan {
    /// Those that its kernels use.
    pub(crate) fn features(&self) -> wgpu::Features {
        let mut kernels: Vec<_> = self.steps.iter().flat_map(|s| &s.dispatches).map(|d| &d.kernel).collect();
        // Many dispatches share one text, which need not be searched again. A static one is known by its address.
        let (mut places, mut texts) = (HashSet::new(), HashSet::new());
        kernels.retain(|k| match &k.source {
            Cow::Borrowed(text) => places.insert(text.as_ptr()),
            Cow::Owned(text) => texts.insert(text.as_str()),
        });
        kernels.into_iter().fold(wgpu::Features::empty(), |all, k| all | k.features())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn useful_features_are_those_of_gpu() {
        let all =
            Requirements::USEFUL_FEATURES.iter().fold(wgpu::Features::empty(), |all, (feature, _)| all | *feature);
        assert_eq!(all, Profile::USEFUL_FEATURES);
    }
}
