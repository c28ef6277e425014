//! What a device must offer to run a plan, as plain data: before there is a device.

use std::collections::HashSet;

use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::plan::Plan;
use crate::profile::{AdapterClass, Profile};

/// What the kernels of some plans need of a device. A whole trainer's come from
/// [`TrainPlan`](crate::train::TrainPlan), a decoder's from [`DecodePlan`](crate::decode::DecodePlan).
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
    /// Bytes of the largest storage binding.
    pub binding_bytes: u64,
    /// Bytes of the largest buffer.
    pub buffer_bytes: u64,
    /// Storage buffers of a kernel: a plan for a [profile](Profile::max_storage_buffers) that has few needs no more.
    pub storage_buffers: u32,
    /// Workgroups of a dispatch along one dimension.
    pub workgroups: u32,
    /// Invocations of a workgroup.
    pub invocations: u32,
    /// Bytes of workgroup memory.
    pub workgroup_bytes: u32,
    /// Bytes of a uniform.
    pub uniform_bytes: u64,
    /// Features that its kernels use: none, unless it was planned for a profile with subgroups or cooperative
    /// matrices.
    pub features: wgpu::Features,
}

impl Requirements {
    /// [`Profile::USEFUL_FEATURES`], none of which is needed, one by one with what each is good for.
    pub const USEFUL_FEATURES: [(wgpu::Features, &'static str); 3] = [
        (wgpu::Features::SUBGROUP, "plans for a profile with subgroups share loads and sums by shuffles: faster rows"),
        (wgpu::Features::TIMESTAMP_QUERY, "profiles have the GPU's own times of kernels, not the host's clock"),
        (wgpu::Features::PIPELINE_CACHE, "`Gpu::save_pipelines` keeps compiled kernels for the next start"),
    ];

    /// Those of a plan.
    pub fn of(plan: &Plan) -> Self {
        let dispatches = || plan.steps.iter().flat_map(|s| &s.dispatches);
        let bound = dispatches().flat_map(|d| d.binds.iter().flatten()).map(|b| b.bytes as u64);
        let external = plan.externals.iter().map(|e| e.ty.storage_bytes() as u64);
        let planned = plan.buffers.iter().map(|b| b.bytes as u64).chain([plan.uniform_bytes() as u64]);
        // Kernels keep to these, whatever a device offers.
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

    /// That of one buffer.
    pub(crate) fn of_buffer(bytes: usize) -> Self {
        Requirements { buffer_bytes: bytes as u64, ..Self::default() }
    }

    /// What runs these and those.
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

    /// Raises limits to what is needed, where they are lower.
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

    /// What of it these limits do not offer: the limit's name in wgpu, what is needed, what is offered.
    pub fn missing(&self, limits: &wgpu::Limits) -> Vec<(&'static str, u64, u64)> {
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
        all.into_iter().filter(|(_, needed, offered)| needed > offered).collect()
    }

    /// An `Err` that names each limit that is too low. Where a plan is too large, a smaller batch or context, or a plan
    /// made for the device's own profile, may fit.
    pub fn check(&self, limits: &wgpu::Limits) -> Result<()> {
        let shown = |(limit, needed, offered): (&str, u64, u64)| format!("{limit} must be {needed}, but is {offered}");
        let missing: Vec<String> = self.missing(limits).into_iter().map(shown).collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(Error::Limit(missing.join("; "))),
        }
    }

    /// What to open a device of this adapter with that runs these: wgpu's default limits raised, and the features
    /// needed, with the useful ones that the adapter has. Your own limits and features go on top.
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
        // Many dispatches have one text, which is static: no need to search it again.
        let mut seen = HashSet::new();
        kernels.retain(|k| seen.insert(k.source.as_ptr()));
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
