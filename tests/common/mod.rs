//! What the integration tests share.
#![allow(dead_code)] // each test binary uses a part

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use throughline::ops::Case;
use throughline::plan::variants;
use throughline::reference::{self, Array};
use throughline::{AdapterClass, Cooperative, DType, ExecOptions, Executable, Gpu, Graph, Plan, Profile, Value};

/// One device for all tests of a binary. Without an adapter every test fails, and says so.
pub fn gpu() -> &'static Gpu {
    static GPU: OnceLock<Gpu> = OnceLock::new();
    let open = || Gpu::headless_cooperative_blocking(Cooperative::F32).or_else(|_| Gpu::headless_blocking());
    GPU.get_or_init(|| match open() {
        Ok(gpu) => gpu,
        Err(e) => panic!("these tests need a GPU adapter, a software one will do: {e}"),
    })
}

/// The adapter's profile with each class of kernels in turn, with its subgroups and without, so that
/// all that can run here are tested here; and with its cooperative matrices, if it has any.
pub fn profiles() -> Vec<Profile> {
    let here = gpu().profile();
    let mut profiles = vec![];
    for class in [AdapterClass::Cpu, AdapterClass::Gpu] {
        for subgroups in [None, here.subgroups] {
            profiles.push(Profile { class, subgroups, cooperative: None, ..here.clone() });
        }
    }
    profiles.push(Profile { class: AdapterClass::Gpu, ..here.clone() });
    profiles.dedup();
    profiles
}

/// `profile` once for each variant of the ops in a graph: the second has the second variant of each op
/// that has one, and so on.
pub fn with_variants(profile: Profile, graph: &Graph, wanted: &[Value]) -> Vec<Profile> {
    let tunables = variants::tunables(&Plan::new(graph, wanted, &profile).unwrap(), &profile);
    let most = tunables.iter().map(|t| t.variants.len()).max().unwrap_or(1);
    let nth = |n: usize| {
        let mut profile = profile.clone();
        for t in &tunables {
            profile.choices.set(t.key.clone(), t.variants[n.min(t.variants.len() - 1)].clone());
        }
        profile
    };
    (0..most).map(nth).collect()
}

/// A case's op in a graph with loss = sum of dot(random dy, y) over its main outputs, and the
/// gradients of all inputs that have one.
pub struct Harness {
    pub graph: Graph,
    pub given: HashMap<Value, Array>,
    pub outputs: Vec<Value>,
    pub loss: Option<Value>,
    /// Index of the input, input, gradient.
    pub grads: Vec<(usize, Value, Value)>,
}

impl Harness {
    pub fn new(case: &Case, seed: u64) -> Harness {
        let (mut graph, inputs, outputs) = case.graph().unwrap();
        let data = case.data(seed);
        let mut given: HashMap<Value, Array> = inputs.iter().copied().zip(data).collect();
        let mut loss = None;
        for (i, &y) in outputs.iter().take(case.main_outputs).enumerate() {
            let ty = graph.ty(y).clone();
            let dy = graph.input(&format!("dy{i}"), ty.clone()).unwrap();
            given.insert(dy, throughline::ops::random_array(&ty.shape, seed + 100 + i as u64));
            let product = graph.mul(&format!("loss{i}"), y, dy).unwrap();
            let part = graph.sum(&format!("loss{i}.sum"), product).unwrap();
            loss = Some(match loss {
                None => part,
                Some(l) => graph.residual_add("loss", l, part).unwrap(),
            });
        }
        let wanted: Vec<(usize, Value)> =
            inputs.iter().copied().enumerate().filter(|(i, _)| case.inputs[*i].grad).collect();
        let mut grads = vec![];
        if let Some(loss) = loss {
            let wrt: Vec<Value> = wanted.iter().map(|(_, v)| *v).collect();
            let got = graph.gradients(loss, &wrt).unwrap_or_else(|e| panic!("{}: {e}", case.name));
            grads = wanted.iter().zip(got).map(|(&(i, v), g)| (i, v, g)).collect();
        }
        Harness { graph, given, outputs, loss, grads }
    }

    /// Outputs and gradients, in that order.
    pub fn wanted(&self) -> Vec<Value> {
        self.outputs.iter().copied().chain(self.grads.iter().map(|g| g.2)).collect()
    }

    /// Every profile that can run here, with every variant, and which variant that is.
    pub fn profiles(&self) -> Vec<(usize, Profile)> {
        let variants = |p| with_variants(p, &self.graph, &self.wanted()).into_iter().enumerate();
        profiles().into_iter().flat_map(variants).collect()
    }

    pub fn reference(&self) -> Vec<Array> {
        reference::run(&self.graph, &self.given, &self.wanted()).unwrap()
    }

    pub fn executable(&self, profile: &Profile, guard_bytes: usize) -> Executable {
        self.guarded(Plan::new(&self.graph, &self.wanted(), profile).unwrap(), guard_bytes)
    }

    /// Runs a plan of this graph, or a part of one.
    pub fn executable_of(&self, plan: Plan) -> Executable {
        self.guarded(plan, 0)
    }

    fn guarded(&self, plan: Plan, guard_bytes: usize) -> Executable {
        let options = ExecOptions { guard_bytes, ..Default::default() };
        let exec = Executable::new_blocking(gpu(), Arc::new(plan), options).unwrap();
        for external in &exec.plan().externals.clone() {
            write(&exec, external.value, &self.given[&external.value]);
        }
        exec
    }

    pub fn read(&self, exec: &Executable) -> Vec<Vec<f32>> {
        self.wanted().iter().map(|&v| read(exec, &self.graph, v)).collect()
    }
}

/// Writes an f64 array to an external, in its type.
pub fn write(exec: &Executable, value: Value, array: &Array) {
    let tensor = exec.tensor(value).unwrap();
    match tensor.ty().dtype {
        DType::F32 => exec.write(value, &array.data.iter().map(|&x| x as f32).collect::<Vec<_>>()),
        DType::U32 => exec.write(value, &array.data.iter().map(|&x| x as u32).collect::<Vec<_>>()),
        other => panic!("{other}"),
    }
    .unwrap();
}

/// Reads a value as f32, integers too.
pub fn read(exec: &Executable, graph: &Graph, value: Value) -> Vec<f32> {
    match graph.ty(value).dtype {
        DType::F32 => exec.read_blocking(value).unwrap(),
        DType::U32 => exec.read_blocking::<u32>(value).unwrap().iter().map(|&x| x as f32).collect(),
        other => panic!("{other}"),
    }
}

/// A folder of tests/data/hf: a tiny model of Hugging Face's, with what PyTorch made of it.
pub fn hf_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hf").join(name)
}

/// An expected tensor of such a folder.
pub fn hf_expected<T: bytemuck::Pod>(name: &str, tensor: &str) -> Vec<T> {
    let bytes = std::fs::read(hf_folder(name).join("expected.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    bytemuck::pod_collect_to_vec(file.tensor(tensor).unwrap().data())
}

/// The largest difference between two arrays.
pub fn worst(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Two devices of the adapter, opened alike but for the range that a binding may cover.
pub fn whole_and_split(max_binding: u64) -> [Gpu; 2] {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env());
    let adapter = pollster::block_on(wgpu::util::initialize_adapter_from_env_or_default(&instance, None)).unwrap();
    [adapter.limits().max_storage_buffer_binding_size, max_binding].map(|max_storage_buffer_binding_size| {
        let descriptor = wgpu::DeviceDescriptor {
            required_features: adapter.features() & Gpu::USEFUL_FEATURES,
            required_limits: wgpu::Limits { max_storage_buffer_binding_size, ..adapter.limits() },
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
        Gpu::from_device(device, queue)
    })
}
