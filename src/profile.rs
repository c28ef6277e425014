//! The facts about an adapter that plans depend on.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::quirks::Quirks;

/// What kind of processor the shaders run on. Kernels choose their variant by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AdapterClass {
    /// A software rasteriser (lavapipe, SwiftShader, WARP). A barrier is a coroutine switch and every load is slow, so
    /// kernels keep many accumulators in a few independent lanes.
    Cpu,
    /// Any processor with many threads and workgroup memory.
    Gpu,
}

/// Cooperative matrices (tensor cores, simdgroup matrices) for products.
///
/// They are never used by default, because wgpu calls them experimental. Opt in with
/// [`Gpu::headless_cooperative`](crate::Gpu::headless_cooperative).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Cooperative {
    /// 8 x 8 tiles of f32.
    F32,
    /// 16 x 16 tiles of f16, summed in f32. What is multiplied is rounded to 11 bits, and infinite beyond
    /// 65504. Cards of NVIDIA and AMD have them.
    F16,
    /// 8 x 8 tiles of f16, summed in f32, with the same rounding. Apple's GPUs have them, and newer Mesa's software
    /// driver.
    F16x8,
}

impl Cooperative {
    /// Every kind.
    pub const ALL: [Cooperative; 3] = [Cooperative::F32, Cooperative::F16, Cooperative::F16x8];

    /// Rows and columns of a matrix.
    pub fn size(self) -> u32 {
        match self {
            Cooperative::F32 | Cooperative::F16x8 => 8,
            Cooperative::F16 => 16,
        }
    }

    /// Whether inputs are rounded to f16.
    pub fn is_f16(self) -> bool {
        self != Cooperative::F32
    }

    /// What kernels on such matrices call them: knobs and their values.
    pub(crate) fn knobs(self) -> [(&'static str, String); 5] {
        let (size, e) = (self.size(), if self.is_f16() { "f16" } else { "f32" });
        let matrix = |e: &str, role: &str| format!("coop_mat{size}x{size}<{e}, {role}>");
        [
            ("E", e.into()),
            ("MatrixA", matrix(e, "A")),
            ("MatrixB", matrix(e, "B")),
            ("MatrixC", matrix("f32", "C")),
            ("SIZE", format!("{size}u")),
        ]
    }

    /// The features that a device must be opened with.
    pub fn features(self) -> wgpu::Features {
        let base = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SUBGROUP;
        if self.is_f16() { base | wgpu::Features::SHADER_F16 } else { base }
    }

    /// Whether an adapter with these properties has such matrices.
    pub fn is_in(self, properties: &[wgpu::CooperativeMatrixProperties]) -> bool {
        use wgpu::CooperativeScalarType as Scalar;
        let ab = if self.is_f16() { Scalar::F16 } else { Scalar::F32 };
        properties
            .iter()
            .any(|p| [p.m_size, p.n_size, p.k_size] == [self.size(); 3] && p.ab_type == ab && p.cr_type == Scalar::F32)
    }
}

/// The facts about an adapter that plans depend on.
///
/// This is plain data: a plan can be made and printed for a machine that is not at hand.
/// [`Gpu::profile`](crate::Gpu::profile) has that of an open device, [`of_adapter`](Self::of_adapter) that of an
/// adapter before you open its device, and [`portable`](Self::portable) one that suits every adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Profile {
    /// Which kind of kernels to use.
    pub class: AdapterClass,
    /// Size of the largest storage binding, in bytes.
    pub max_binding_bytes: u64,
    /// Size of the largest buffer, in bytes.
    pub max_buffer_bytes: u64,
    /// Most workgroups of a dispatch along one dimension.
    pub max_workgroups: u32,
    /// Most storage buffers of a shader. Kernels with more are rewritten: bindings of one type become ranges of one
    /// buffer, with copies into and out of it. Four suffice for every op of the table.
    pub max_storage_buffers: u32,
    /// Compute units of a GPU: streaming multiprocessors, workgroup processors, cores. Kernels for
    /// [`AdapterClass::Gpu`] split work into at least twice as many workgroups where they can, and cut what would keep
    /// so many units busy for long. No API says how many there are, so this is a guess by the kind of adapter: 80 for
    /// cards of their own, and where nothing is known. Set it if you know better.
    pub units: u32,
    /// Most invocations of a workgroup.
    pub max_invocations: u32,
    /// Most workgroup memory, in bytes.
    pub max_workgroup_bytes: u32,
    /// Sizes of the smallest and the largest subgroup, if the device was opened with subgroup operations: what its driver
    /// says, or what [`Gpu::self_test`](crate::Gpu::self_test) measured.
    pub subgroups: Option<[u32; 2]>,
    /// Whether shaders have 16-bit floats. Without, kernels take tensors in f16 out of pairs.
    pub shader_f16: bool,
    /// Kind of cooperative matrices, if the application opted in.
    pub cooperative: Option<Cooperative>,
    /// Quirks of its driver.
    pub quirks: Quirks,
    /// The variants that ops use, if a [`Tuner`](crate::Tuner) has measured them.
    pub choices: Choices,
}

/// What of a [`Profile`] the kernels rely on, beyond limits that a device checks itself: how invocations share work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lanes {
    subgroups: Option<[u32; 2]>,
    cooperative: Option<Cooperative>,
}

impl Lanes {
    /// What is wrong with kernels made for these lanes, which use these features, on a device that has `theirs`.
    pub(crate) fn problem(self, features: wgpu::Features, theirs: Lanes) -> Option<String> {
        // Kernels made for a range of sizes run with every size in it.
        let suits = match (self.subgroups, theirs.subgroups) {
            (Some([min, max]), Some([least, most])) => min <= least && most <= max,
            (ours, theirs) => ours == theirs,
        };
        if features.contains(wgpu::Features::SUBGROUP) && !suits {
            let (ours, theirs) = (self.subgroups, theirs.subgroups);
            return Some(format!("the plan is for subgroups of {ours:?} lanes, but the device's have {theirs:?}"));
        }
        let matrices = features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        (matrices && self.cooperative != theirs.cooperative).then(|| {
            let (ours, theirs) = (self.cooperative, theirs.cooperative);
            format!("the plan is for cooperative matrices of {ours:?}, but the device was opened with {theirs:?}")
        })
    }
}

impl Profile {
    /// Features that make throughline faster or let it measure itself. None is required: request those that the adapter
    /// has.
    pub const USEFUL_FEATURES: wgpu::Features = wgpu::Features::SUBGROUP
        .union(wgpu::Features::SHADER_F16)
        .union(wgpu::Features::TIMESTAMP_QUERY)
        .union(wgpu::Features::PIPELINE_CACHE);

    /// The profile of WebGPU's default limits, which every adapter offers: plans made for it run anywhere.
    pub fn portable(class: AdapterClass) -> Self {
        Profile {
            class,
            max_binding_bytes: 128 << 20,
            max_buffer_bytes: 256 << 20,
            max_workgroups: 65_535,
            max_storage_buffers: 8,
            units: 80,
            max_invocations: 256,
            max_workgroup_bytes: 16 << 10,
            subgroups: None,
            shader_f16: false,
            cooperative: None,
            quirks: Quirks { loops_end_early: class == AdapterClass::Cpu, ..Quirks::default() },
            choices: Choices::default(),
        }
    }

    /// The profile of a device of this adapter, opened with all of its limits and the
    /// [`USEFUL_FEATURES`](Self::USEFUL_FEATURES) that it has. Use it to plan before you open the device.
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
            units: units(info),
            max_invocations: limits.max_compute_invocations_per_workgroup,
            max_workgroup_bytes: limits.max_compute_workgroup_storage_size,
            subgroups: features
                .contains(wgpu::Features::SUBGROUP)
                .then_some([info.subgroup_min_size, info.subgroup_max_size]),
            shader_f16: features.contains(wgpu::Features::SHADER_F16),
            cooperative: None,
            quirks: Quirks::of(info),
            choices: Choices::default(),
        }
    }

    /// Size of the largest tensor, in bytes: one that fits a buffer and a binding.
    pub fn max_tensor_bytes(&self) -> u64 {
        // Kernels count elements in 32 bits, and DX12 bytes.
        self.max_binding_bytes.min(self.max_buffer_bytes).min(u32::MAX.into())
    }

    /// What a device must have in common with this profile to run its plans.
    pub(crate) fn lanes(&self) -> Lanes {
        Lanes { subgroups: self.subgroups, cooperative: self.cooperative }
    }

    /// Lanes of a vector on a software adapter, and whether subgroup operations can move values between them. Kernels
    /// for [`AdapterClass::Cpu`] use workgroups of one vector.
    pub fn vector_lanes(&self) -> (usize, bool) {
        match self.subgroups {
            Some([min, max]) if min == max && [4, 8, 16].contains(&min) => (min as usize, true),
            _ => (8, false),
        }
    }

    /// Lanes that can shuffle on a GPU: the number that every subgroup has, whatever its size. `None` without subgroup
    /// operations, or if the number is not a power of two of at least 4.
    pub(crate) fn subgroup_lanes(&self) -> Option<u32> {
        self.subgroups.map(|[min, _]| min).filter(|min| *min >= 4 && min.is_power_of_two())
    }

    /// Whether kernels have tensors in f16 as words of two. On lavapipe that takes half the time of its 16-bit floats, if
    /// it has some: 3.7 against 7.2 ms for a matmul on Mesa 26.2, 6.9 against 9.2 on 22.3.6.
    pub(crate) fn f16_in_words(&self) -> bool {
        !self.shader_f16 || self.class == AdapterClass::Cpu
    }

    /// Invocations that hold a cooperative matrix together, and whether all subgroups have that many. Where they may
    /// have fewer, a kernel can't tell which subgroup an invocation is in, and workgroups are one of the largest.
    pub(crate) fn cooperating(&self) -> (u32, bool) {
        self.subgroups.map_or((32, false), |[min, max]| (max, min == max))
    }

    /// Splits `n` workgroups over x and y so that neither exceeds the limit.
    ///
    /// Kernels compute `workgroup_id.x + workgroup_id.y * num_workgroups.x` as their index and return if it is `>= n`.
    /// [`Elements`](crate::ops::Elements) writes kernels that do.
    pub fn grid(&self, n: usize) -> [u32; 3] {
        let max = self.max_workgroups.max(1) as usize;
        let y = n.div_ceil(max).max(1);
        [n.div_ceil(y).max(1) as u32, y as u32, 1]
    }
}

/// How many compute units an adapter probably has.
fn units(info: &wgpu::AdapterInfo) -> u32 {
    // Apple's are all integrated, but not all small: 7 to 10 cores, twice that for each step up.
    let apple = [("Ultra", 64), ("Max", 32), ("Pro", 16), ("Apple M", 10)];
    let apple = apple.iter().find(|(name, _)| info.name.contains(name)).map(|(_, units)| *units);
    match info.device_type {
        wgpu::DeviceType::IntegratedGpu if info.name.contains("Apple") => apple.unwrap_or(6),
        wgpu::DeviceType::IntegratedGpu => 16,
        _ => 80,
    }
}

/// The variant that each op uses, by op and class of shape. Ops without an entry use their first variant.
///
/// A [`Tuner`](crate::Tuner) measures them; apply them with [`Gpu::with_choices`](crate::Gpu::with_choices).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choices(Arc<BTreeMap<String, String>>);

impl Choices {
    /// Sets the variant of all ops with this [`key`](crate::plan::variants::key).
    pub fn set(&mut self, key: String, variant: String) {
        Arc::make_mut(&mut self.0).insert(key, variant);
    }

    /// Whether there are no choices.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The variant set for a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }
}
