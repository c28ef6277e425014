//! The facts about an adapter that plans depend on.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What kind of processor the shaders run on; kernels pick their variant by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdapterClass {
    /// A software rasteriser (lavapipe, SwiftShader, WARP): a barrier is a coroutine switch and
    /// every load is slow, so kernels keep many accumulators in few independent lanes.
    Cpu,
    /// Anything with many threads and workgroup memory.
    Gpu,
}

/// Cooperative matrices (tensor cores, simdgroup matrices) that matmuls may use. Never by default:
/// wgpu calls them experimental. See [`Gpu::headless_cooperative`](crate::Gpu::headless_cooperative).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cooperative {
    /// 8 x 8 tiles of f32.
    F32,
    /// 16 x 16 tiles of f16, summed in f32: inputs of matmuls lose all but 11 bits, and those
    /// beyond 65504 become infinite.
    F16,
}

impl Cooperative {
    /// What a device must be opened with.
    pub fn features(self) -> wgpu::Features {
        let base = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SUBGROUP;
        match self {
            Cooperative::F32 => base,
            Cooperative::F16 => base | wgpu::Features::SHADER_F16,
        }
    }

    /// Whether an adapter of these properties has such matrices.
    pub fn is_in(self, properties: &[wgpu::CooperativeMatrixProperties]) -> bool {
        use wgpu::CooperativeScalarType as Scalar;
        let (size, ab) = match self {
            Cooperative::F32 => (8, Scalar::F32),
            Cooperative::F16 => (16, Scalar::F16),
        };
        properties
            .iter()
            .any(|p| [p.m_size, p.n_size, p.k_size] == [size; 3] && p.ab_type == ab && p.cr_type == Scalar::F32)
    }
}

/// The facts about an adapter that plans depend on. Plain data: a plan can be made and printed for
/// a machine that is not here.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Which variants kernels use.
    pub class: AdapterClass,
    /// Largest range that one storage binding may cover, in bytes.
    pub max_binding_bytes: u64,
    /// Largest buffer, in bytes.
    pub max_buffer_bytes: u64,
    /// Workgroups per dispatch dimension.
    pub max_workgroups: u32,
    /// Storage buffers per shader stage. Kernels that have more are rewritten: bindings of one type become ranges of
    /// one buffer, into and out of which a step copies. Four do for every op of the table.
    pub max_storage_buffers: u32,
    /// Invocations per workgroup.
    pub max_invocations: u32,
    /// Workgroup memory, in bytes.
    pub max_workgroup_bytes: u32,
    /// Smallest and largest subgroup, where the device was opened with subgroup operations.
    pub subgroups: Option<[u32; 2]>,
    /// Cooperative matrices, where the app opted in.
    pub cooperative: Option<Cooperative>,
    /// Which variants ops take, where a [`Tuner`](crate::Tuner) has measured.
    pub choices: Choices,
}

impl Profile {
    /// Features that make throughline faster or let it measure itself. None is required: ask for those of them that
    /// the adapter has.
    pub const USEFUL_FEATURES: wgpu::Features =
        wgpu::Features::SUBGROUP.union(wgpu::Features::TIMESTAMP_QUERY).union(wgpu::Features::PIPELINE_CACHE);

    /// WebGPU's default limits, which every adapter offers.
    pub fn portable(class: AdapterClass) -> Self {
        Profile {
            class,
            max_binding_bytes: 128 << 20,
            max_buffer_bytes: 256 << 20,
            max_workgroups: 65_535,
            max_storage_buffers: 8,
            max_invocations: 256,
            max_workgroup_bytes: 16 << 10,
            subgroups: None,
            cooperative: None,
            choices: Choices::default(),
        }
    }

    /// What a device of this adapter would have, opened with all its limits and with [`Profile::USEFUL_FEATURES`]: to plan
    /// before there is one.
    pub fn of_adapter(adapter: &wgpu::Adapter) -> Self {
        Profile::of(&adapter.get_info(), adapter.features() & Profile::USEFUL_FEATURES, &adapter.limits())
    }

    pub(crate) fn of(info: &wgpu::AdapterInfo, features: wgpu::Features, limits: &wgpu::Limits) -> Self {
        let class = match info.device_type {
            wgpu::DeviceType::Cpu => AdapterClass::Cpu,
            _ => AdapterClass::Gpu,
        };
        Profile {
            class,
            max_binding_bytes: limits.max_storage_buffer_binding_size,
            max_buffer_bytes: limits.max_buffer_size,
            max_workgroups: limits.max_compute_workgroups_per_dimension,
            max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
            max_invocations: limits.max_compute_invocations_per_workgroup,
            max_workgroup_bytes: limits.max_compute_workgroup_storage_size,
            subgroups: features
                .contains(wgpu::Features::SUBGROUP)
                .then_some([info.subgroup_min_size, info.subgroup_max_size]),
            cooperative: None,
            choices: Choices::default(),
        }
    }

    /// Largest tensor, in bytes: one that a buffer holds and a binding covers.
    pub fn max_tensor_bytes(&self) -> u64 {
        self.max_binding_bytes.min(self.max_buffer_bytes)
    }

    /// Lanes of a vector of a software adapter, and whether subgroup operations can move values
    /// between them: kernels of [`AdapterClass::Cpu`] use workgroups of one vector.
    pub fn vector_lanes(&self) -> (usize, bool) {
        match self.subgroups {
            Some([min, max]) if min == max && [4, 8, 16].contains(&min) => (min as usize, true),
            _ => (8, false),
        }
    }

    /// Lanes that can shuffle on a GPU: as many as every subgroup has, of whatever size it is. `None` without
    /// subgroup operations, or where that is no power of two of at least 4.
    pub(crate) fn subgroup_lanes(&self) -> Option<u32> {
        self.subgroups.map(|[min, _]| min).filter(|min| *min >= 4 && min.is_power_of_two())
    }

    /// Splits `n` workgroups over x and y so that neither exceeds the limit. Kernels take
    /// `workgroup_id.x + workgroup_id.y * num_workgroups.x` as the index and return where it is
    /// `>= n`.
    pub fn grid(&self, n: usize) -> [u32; 3] {
        let max = self.max_workgroups as usize;
        let y = n.div_ceil(max).max(1);
        [n.div_ceil(y).max(1) as u32, y as u32, 1]
    }
}

/// Which variant each op takes, by op and class of shape. Ops that are not in here take their first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choices(Arc<BTreeMap<String, String>>);

impl Choices {
    /// Sets the variant of all ops of this [`key`](crate::plan::variants::key).
    pub fn set(&mut self, key: String, variant: String) {
        Arc::make_mut(&mut self.0).insert(key, variant);
    }

    /// Whether nothing is chosen.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The variant set for a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}
