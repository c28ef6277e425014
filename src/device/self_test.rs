//! A small test that a device runs on itself: whether what its driver says about subgroups and cooperative matrices is
//! so. Kernels that rely on either would otherwise give wrong results without a word.

use super::findings::{self, Capability, SelfTest};
use super::gpu::Gpu;
use super::readback::Readback;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::profile::{Cooperative, Profile};
use crate::tensor::TensorType;

const SUBGROUPS: &str = concat!(
    include_str!("../../shaders/common/subgroups.wgsl"),
    include_str!("../../shaders/self_test/subgroups.wgsl"),
);
const MATRICES: &str = concat!(
    "enable wgpu_cooperative_matrix;\n",
    include_str!("../../shaders/common/matrices.wgsl"),
    include_str!("../../shaders/self_test/matrices.wgsl"),
);
const MATRICES_F16: &str = concat!(
    "enable wgpu_cooperative_matrix;\nenable f16;\n",
    include_str!("../../shaders/common/matrices.wgsl"),
    include_str!("../../shaders/self_test/matrices.wgsl"),
);

impl Gpu {
    /// Runs a small test on the device, and returns a handle whose plans use only what works as specified: whether
    /// subgroups have the size that the driver says, number their lanes in order and pass values as they should, and
    /// whether cooperative matrices multiply. [`tested`](Self::tested) has what was found.
    ///
    /// [`headless`](Self::headless) does it by itself. In an app, call it once, on the way to the first plan:
    /// `Gpu::from_device(device, queue).self_test().await?`. It takes a small kernel and a submit, two more kernels and a
    /// submit on devices opened with cooperative matrices, and on Metal
    /// also makes plans faster, since what they know of subgroups there before is only that they have 4 to 64 lanes.
    /// Plans made before run on the new handle too, unless they use what it lacks.
    ///
    /// Resolves once the device has been polled, which every submit does; where nothing does, use
    /// [`self_test_blocking`](Self::self_test_blocking).
    ///
    /// # Errors
    ///
    /// If the device is lost or has no memory left. What fails the test is no error.
    pub async fn self_test(self) -> Result<Gpu> {
        let (mut test, profile) = (SelfTest::default(), self.profile().clone());
        if let Some(advertised) = profile.subgroups {
            match self.subgroup_size(advertised).await? {
                Ok(size) => (test.subgroup_size, test.compiles_only) = (size, size.is_none()),
                Err(reason) => test.drop(Capability::Subgroups, reason),
            }
        }
        // How matrices are used depends on the size of subgroups.
        let measured = test.corrected(&profile, self.info().backend);
        if let Some(kind) = profile.cooperative.filter(|_| !test.compiles_only) {
            let problem = match test.dropped.is_empty() {
                true => self.matrix_problem(kind, &measured).await?,
                false => Some("they need subgroup operations".into()),
            };
            if let Some(reason) = problem {
                test.drop(Capability::CooperativeMatrices, reason);
            }
        }
        let profile = test.corrected(&profile, self.info().backend);
        Ok(self.with_test(profile, test))
    }

    /// The size of subgroups, `None` if nothing runs, or how they differ from what is specified.
    async fn subgroup_size(&self, advertised: [u32; 2]) -> Result<Result<Option<u32>, String>> {
        match self.start_subgroups()? {
            Ok(readback) => Ok(findings::subgroup_size(&readback.take::<u32>().await?, advertised)),
            Err(message) => Ok(Err(message)),
        }
    }

    /// How products of matrices differ from what they should be, in either orientation.
    async fn matrix_problem(&self, kind: Cooperative, profile: &Profile) -> Result<Option<String>> {
        let subgroups = if profile.cooperating().1 { 2 } else { 1 };
        let readbacks = match self.start_matrices(kind, subgroups, profile)? {
            Ok(readbacks) => readbacks,
            Err(message) => return Ok(Some(message)),
        };
        for readback in readbacks {
            let problem = findings::product_problem(&readback.take::<f32>().await?, kind, subgroups);
            if problem.is_some() {
                return Ok(problem);
            }
        }
        Ok(None)
    }

    fn start_subgroups(&self) -> Result<Result<Readback, String>> {
        let width = self.profile().max_invocations.min(256);
        let kernel = Kernel::new("self_test", SUBGROUPS, "subgroups").knob("WIDTH", width);
        let ty = TensorType::u32([width as usize, findings::ROW]);
        let mut encoder = self.encoder("self-test");
        let readback = attempt(self.dispatch(&mut encoder, &kernel, ty))?;
        self.submit(encoder)?;
        Ok(readback)
    }

    fn start_matrices(
        &self,
        kind: Cooperative,
        subgroups: usize,
        profile: &Profile,
    ) -> Result<Result<Vec<Readback>, String>> {
        let [m, n, _] = findings::product_shape(kind, subgroups);
        let mut encoder = self.encoder("self-test");
        let kernels = products(kind, subgroups, profile);
        let recorded = kernels.iter().map(|kernel| self.dispatch(&mut encoder, kernel, TensorType::f32([m, n])));
        let readbacks = attempt(recorded.collect())?;
        self.submit(encoder)?;
        Ok(readbacks)
    }

    /// [`self_test`](Self::self_test), waiting for the GPU.
    pub fn self_test_blocking(self) -> Result<Gpu> {
        let gpu = self.clone();
        gpu.run_blocking(self.self_test())
    }

    /// The same on a device that nobody else can poll yet. Browsers poll by themselves.
    pub(super) async fn self_test_unpolled(self) -> Result<Gpu> {
        if cfg!(target_arch = "wasm32") { self.self_test().await } else { self.self_test_blocking() }
    }

    /// Records a kernel of one workgroup and one binding, which fills a tensor of this type.
    fn dispatch(&self, encoder: &mut wgpu::CommandEncoder, kernel: &Kernel, ty: TensorType) -> Result<Readback> {
        let pipeline = self.pipeline(kernel)?;
        let buffer = self.storage_buffer("self-test", ty.storage_bytes() as u64)?;
        self.guarded(|| {
            let group = self.device().create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("throughline self-test"),
                layout: &pipeline.get_bind_group_layout(0),
                entries: &[wgpu::BindGroupEntry { binding: 1, resource: buffer.as_entire_binding() }],
            });
            let label = Some("throughline self-test");
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor { label, timestamp_writes: None });
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups(1, 1, 1);
            Ok(())
        })?;
        Ok(Readback::record(self, encoder, Ok((&buffer, 0)), ty))
    }
}

/// The kernels that multiply matrices of this kind, by workgroups of so many subgroups along m and along n: with the
/// second factor in memory along k, and along n.
fn products(kind: Cooperative, subgroups: usize, profile: &Profile) -> [Kernel; 2] {
    let source = if kind.is_f16() { MATRICES_F16 } else { MATRICES };
    let [along_m, along_n] = [subgroups as u32; 2];
    [false, true].map(|b_along_n| {
        let kernel = Kernel::new("self_test", source, "matrices")
            .knob("COOPERATING", profile.cooperating().0)
            .knob("SUBGROUPS_M", along_m)
            .knob("SUBGROUPS_N", along_n)
            .knob("PAD", if kind.is_f16() { 8u32 } else { 4 })
            .knob("BUFFERS", if kind.is_f16() && subgroups > 1 { 2u32 } else { 1 })
            .knob("B_ALONG_N", b_along_n);
        kind.knobs().into_iter().fold(kernel, |kernel, (name, value)| kernel.knob(name, value.as_str()))
    })
}

/// A failure that says something about the driver is a result.
fn attempt<T>(result: Result<T>) -> Result<Result<T, String>> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(e @ (Error::Kernel { .. } | Error::Device(_))) => Ok(Err(e.to_string())),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::AdapterClass;

    #[test]
    fn kernels_are_as_specified_for_every_kind() {
        let profile = |sizes| Profile { subgroups: Some(sizes), ..Profile::portable(AdapterClass::Gpu) };
        for kind in Cooperative::ALL {
            for (sizes, subgroups) in [([32, 32], 2), ([32, 64], 1)] {
                for kernel in products(kind, subgroups, &profile(sizes)) {
                    assert_eq!(kernel.features(), kind.features());
                    assert!(kernel.workgroup_bytes().is_some_and(|bytes| bytes <= 16 << 10));
                    let wgsl = kernel.wgsl().unwrap();
                    assert!(wgsl.contains(&format!("const SIZE: u32 = {}u;", kind.size())), "{wgsl}");
                }
            }
        }
        let kernel = Kernel::new("self_test", SUBGROUPS, "subgroups").knob("WIDTH", 64u32);
        assert_eq!(kernel.features(), wgpu::Features::SUBGROUP);
    }
}
