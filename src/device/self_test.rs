//! A small test that a device runs on itself: whether what its driver says about subgroups and cooperative matrices is
//! so. Kernels that rely on either would otherwise give wrong results without a word.

use super::findings::{self, Capability, SelfTest};
use super::gpu::Gpu;
use super::readback::Readback;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::profile::Cooperative;
use crate::tensor::TensorType;

const SUBGROUPS: &str = concat!(
    include_str!("../../shaders/common/subgroups.wgsl"),
    include_str!("../../shaders/self_test/subgroups.wgsl"),
);
const MATRICES: &str =
    concat!("enable wgpu_cooperative_matrix;\n", include_str!("../../shaders/self_test/matrices.wgsl"));
const MATRICES_F16: &str =
    concat!("enable wgpu_cooperative_matrix;\nenable f16;\n", include_str!("../../shaders/self_test/matrices.wgsl"));

impl Gpu {
    /// Runs a small test on the device, and returns a handle whose plans use only what works as specified: whether
    /// subgroups have the size that the driver says, number their lanes in order and pass values as they should, and
    /// whether cooperative matrices multiply. [`tested`](Self::tested) has what was found.
    ///
    /// [`headless`](Self::headless) does it by itself. In an app, call it once, on the way to the first plan:
    /// `Gpu::from_device(device, queue).self_test().await?`. It takes two small kernels and one submit, and on Metal
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
        let mut encoder = self.encoder("self-test");
        let width = profile.max_invocations.min(256);
        let subgroups = profile.subgroups.map(|advertised| {
            let kernel = Kernel::new("self_test", SUBGROUPS, "subgroups").knob("WIDTH", width);
            let ty = TensorType::u32([width as usize, findings::ROW]);
            (advertised, attempt(self.dispatch(&mut encoder, &kernel, ty)))
        });
        let lanes = profile.subgroups.map_or(32, |[_, max]| max);
        let matrices = profile.cooperative.map(|kind| {
            let [m, n, _] = findings::product_shape(kind);
            (kind, attempt(self.dispatch(&mut encoder, &product(kind, lanes), TensorType::f32([m, n]))))
        });
        if subgroups.is_some() || matrices.is_some() {
            self.submit(encoder)?;
        }
        if let Some((advertised, attempted)) = subgroups {
            let size = match attempted? {
                Ok(readback) => findings::subgroup_size(&readback.take::<u32>().await?, advertised),
                Err(message) => Err(message),
            };
            match size {
                Ok(size) => (test.subgroup_size, test.compiles_only) = (size, size.is_none()),
                Err(reason) => test.drop(Capability::Subgroups, reason),
            }
        }
        if let Some((kind, attempted)) = matrices {
            let problem = match attempted? {
                Ok(readback) => findings::product_problem(&readback.take::<f32>().await?, kind),
                Err(message) => Some(message),
            };
            let without = || "they need subgroup operations".to_string();
            let problem = if test.dropped.is_empty() { problem } else { Some(problem.unwrap_or_else(without)) };
            if let Some(reason) = problem.filter(|_| !test.compiles_only) {
                test.drop(Capability::CooperativeMatrices, reason);
            }
        }
        let profile = test.corrected(&profile, self.info().backend);
        Ok(self.with_test(profile, test))
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

/// The kernel that multiplies matrices of this kind, by subgroups of at most so many lanes.
fn product(kind: Cooperative, lanes: u32) -> Kernel {
    let source = if kind.is_f16() { MATRICES_F16 } else { MATRICES };
    let kernel = Kernel::new("self_test", source, "matrices").knob("COOPERATING", lanes);
    kind.knobs().into_iter().fold(kernel, |kernel, (name, value)| kernel.knob(name, value.as_str()))
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

    #[test]
    fn kernels_are_as_specified_for_every_kind() {
        for kind in Cooperative::ALL {
            let kernel = product(kind, 32);
            assert_eq!(kernel.features(), kind.features());
            let wgsl = kernel.wgsl().unwrap();
            assert!(wgsl.contains(&format!("const SIZE: u32 = {}u;", kind.size())), "{wgsl}");
        }
        let kernel = Kernel::new("self_test", SUBGROUPS, "subgroups").knob("WIDTH", 64u32);
        assert_eq!(kernel.features(), wgpu::Features::SUBGROUP);
    }
}
