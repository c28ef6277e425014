//! The Vulkan calls: open the one device that the environment leaves visible, compile, ask what came
//! out. The only module with unsafe code: every call is on handles that this module made and that
//! live in [`Device`], with structures that outlive the call.

use std::collections::BTreeMap;
use std::ffi::CStr;

use anyhow::{Context, Result, bail};
use ash::{ext, khr, vk};
use serde::{Deserialize, Serialize};

use crate::spirv::{Binding, Shader};

/// The driver's report on a compiled shader.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Compiled {
    /// Its statistics, by the driver's names.
    pub statistics: BTreeMap<String, u64>,
    /// Invocations of a subgroup.
    pub subgroup_size: u32,
    /// The final disassembly, and the driver's name for it, where the driver has one.
    pub assembly: Option<(String, String)>,
}

/// A device to compile for.
pub struct Device {
    // Dropped last: the rest is code that this has loaded.
    _entry: ash::Entry,
    instance: ash::Instance,
    device: ash::Device,
    executables: khr::pipeline_executable_properties::Device,
    /// Names of the device and driver.
    pub name: String,
    /// Whether it has cooperative matrices.
    matrices: bool,
}

impl Device {
    /// Opens the first device, with the features that wgpu turns on and that matter to code
    /// generation, and with cooperative matrices if it has them.
    pub fn open() -> Result<Device> {
        // SAFETY: loading the system's Vulkan loader runs its initialisers, which are sound.
        let entry =
            unsafe { ash::Entry::load() }.context("cannot load the Vulkan loader (package libvulkan1 on Debian)")?;
        let app = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
        let info = vk::InstanceCreateInfo::default().application_info(&app);
        // SAFETY: `info` and what it points to outlive the call.
        let instance = unsafe { entry.create_instance(&info, None) }.context("creating a Vulkan instance")?;
        // SAFETY: the instance is alive.
        let physical = unsafe { instance.enumerate_physical_devices() }.context("listing devices")?;
        let Some(&physical) = physical.first() else { bail!("the driver shows no device") };
        let extensions = extensions(&instance, physical)?;
        if !extensions.contains(&khr::pipeline_executable_properties::NAME) {
            bail!("the driver lacks {:?}", khr::pipeline_executable_properties::NAME);
        }
        let device = create_device(&instance, physical, &extensions)?;
        let executables = khr::pipeline_executable_properties::Device::new(&instance, &device);
        let name = describe(&instance, physical);
        let matrices = extensions.contains(&khr::cooperative_matrix::NAME);
        Ok(Device { _entry: entry, instance, device, executables, name, matrices })
    }

    /// Compiles a shader.
    pub fn compile(&self, shader: &Shader) -> Result<Compiled> {
        if shader.matrices && !self.matrices {
            bail!("the card has no cooperative matrices");
        }
        let layouts = self.layouts(&shader.bindings)?;
        let pipeline = self.pipeline(shader, layouts.1);
        let result = pipeline.and_then(|pipeline| {
            let result = self.inspect(pipeline);
            // SAFETY: made above, and used no more.
            unsafe { self.device.destroy_pipeline(pipeline, None) };
            result
        });
        // SAFETY: made above, and used no more.
        unsafe {
            self.device.destroy_pipeline_layout(layouts.1, None);
            self.device.destroy_descriptor_set_layout(layouts.0, None);
        }
        result
    }

    fn layouts(&self, bindings: &[Binding]) -> Result<(vk::DescriptorSetLayout, vk::PipelineLayout)> {
        let bindings: Vec<_> = bindings.iter().map(layout_binding).collect();
        let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&bindings);
        // SAFETY: the device is alive and the structures outlive the calls.
        unsafe {
            let set = self.device.create_descriptor_set_layout(&info, None).context("a descriptor set layout")?;
            let sets = [set];
            let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&sets);
            let layout = self.device.create_pipeline_layout(&info, None).context("a pipeline layout")?;
            Ok((set, layout))
        }
    }

    fn pipeline(&self, shader: &Shader, layout: vk::PipelineLayout) -> Result<vk::Pipeline> {
        let entry = std::ffi::CString::new(shader.entry.as_str()).context("the entry point's name")?;
        let info = vk::ShaderModuleCreateInfo::default().code(&shader.words);
        // SAFETY: naga validated the module, and the structures outlive the calls.
        unsafe {
            let module = self.device.create_shader_module(&info, None).context("a shader module")?;
            // As wgpu has it for devices with subgroup operations: the compiler picks the size.
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .flags(vk::PipelineShaderStageCreateFlags::ALLOW_VARYING_SUBGROUP_SIZE)
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(module)
                .name(&entry);
            let flags = vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR
                | vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR;
            let info = vk::ComputePipelineCreateInfo::default().flags(flags).stage(stage).layout(layout);
            let result = self.device.create_compute_pipelines(vk::PipelineCache::null(), &[info], None);
            self.device.destroy_shader_module(module, None);
            match result {
                Ok(pipelines) => pipelines.first().copied().context("no pipeline came"),
                Err((_, e)) => Err(e).context("creating the pipeline"),
            }
        }
    }

    fn inspect(&self, pipeline: vk::Pipeline) -> Result<Compiled> {
        let info = vk::PipelineInfoKHR::default().pipeline(pipeline);
        let executable = vk::PipelineExecutableInfoKHR::default().pipeline(pipeline).executable_index(0);
        // SAFETY: the pipeline is alive and was created with both capture flags.
        let (properties, statistics) = unsafe {
            let properties = self.executables.get_pipeline_executable_properties(&info).context("properties")?;
            let statistics = self.executables.get_pipeline_executable_statistics(&executable).context("statistics")?;
            (properties, statistics)
        };
        let [properties] = &properties[..] else { bail!("expected one executable, got {}", properties.len()) };
        let statistics = statistics.iter().map(|s| (text(&s.name), value(s))).collect();
        let assembly = self.assembly(&executable)?;
        Ok(Compiled { statistics, subgroup_size: properties.subgroup_size, assembly })
    }

    fn assembly(&self, executable: &vk::PipelineExecutableInfoKHR<'_>) -> Result<Option<(String, String)>> {
        let (get, device) =
            (self.executables.fp().get_pipeline_executable_internal_representations_khr, self.device.handle());
        // The sizes first, then the texts into buffers of these sizes: ash's own wrapper asks once.
        let mut count = 0;
        // SAFETY: the executable is of a live pipeline; `count` entries are valid, of which each
        // points to `data_size` bytes or to none.
        unsafe {
            get(device, executable, &mut count, std::ptr::null_mut()).result().context("representations")?;
            let mut found = vec![vk::PipelineExecutableInternalRepresentationKHR::default(); count as usize];
            get(device, executable, &mut count, found.as_mut_ptr()).result().context("representations")?;
            let mut texts: Vec<Vec<u8>> = found.iter().map(|f| vec![0; f.data_size]).collect();
            for (f, text) in found.iter_mut().zip(&mut texts) {
                f.p_data = text.as_mut_ptr().cast();
            }
            get(device, executable, &mut count, found.as_mut_ptr()).result().context("representations")?;
            // `Assembly`, `NAK assembly`, `IR3 Assembly`; the others are what it was made from.
            let mut named = found.iter().map(|f| text(&f.name)).zip(&texts);
            let assembly = named.find(|(name, _)| name.to_lowercase().ends_with("assembly"));
            Ok(assembly.map(|(name, bytes)| {
                let bytes = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
                (name, String::from_utf8_lossy(bytes).into_owned())
            }))
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: everything made from these is gone.
        unsafe {
            self.device.destroy_device(None);
            self.instance.destroy_instance(None);
        }
    }
}

fn extensions(instance: &ash::Instance, physical: vk::PhysicalDevice) -> Result<Vec<&'static CStr>> {
    // SAFETY: the instance is alive, and `physical` is one of its devices.
    let found = unsafe { instance.enumerate_device_extension_properties(physical) }.context("listing extensions")?;
    let mut wanted = vec![
        khr::pipeline_executable_properties::NAME,
        ext::robustness2::NAME,
        // With what naga declares beside matrices.
        khr::cooperative_matrix::NAME,
    ];
    wanted.retain(|name| found.iter().any(|f| f.extension_name_as_c_str() == Ok(name)));
    Ok(wanted)
}

fn create_device(instance: &ash::Instance, physical: vk::PhysicalDevice, names: &[&CStr]) -> Result<ash::Device> {
    let has = |name: &CStr| names.contains(&name);
    let pointers: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
    let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
    let robust = vk::PhysicalDeviceFeatures::default().robust_buffer_access(true);
    let mut executables =
        vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default().pipeline_executable_info(true);
    let mut robustness2 = vk::PhysicalDeviceRobustness2FeaturesEXT::default().robust_buffer_access2(true);
    let mut sizes = vk::PhysicalDeviceSubgroupSizeControlFeatures::default().subgroup_size_control(true);
    let mut matrices = vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default().cooperative_matrix(true);
    let mut model = vk::PhysicalDeviceVulkanMemoryModelFeatures::default()
        .vulkan_memory_model(true)
        .vulkan_memory_model_device_scope(true);
    let mut f16 = vk::PhysicalDeviceShaderFloat16Int8Features::default().shader_float16(true);
    let mut f16_in_memory = vk::PhysicalDevice16BitStorageFeatures::default().storage_buffer16_bit_access(true);
    let mut info = vk::DeviceCreateInfo::default()
        .queue_create_infos(&queues)
        .enabled_extension_names(&pointers)
        .enabled_features(&robust)
        .push_next(&mut executables)
        .push_next(&mut sizes);
    if has(ext::robustness2::NAME) {
        info = info.push_next(&mut robustness2);
    }
    if has(khr::cooperative_matrix::NAME) {
        info = info.push_next(&mut matrices).push_next(&mut model).push_next(&mut f16).push_next(&mut f16_in_memory);
    }
    // SAFETY: `physical` is one of the instance's devices, and the structures outlive the call.
    unsafe { instance.create_device(physical, &info, None) }.context("opening the device")
}

fn describe(instance: &ash::Instance, physical: vk::PhysicalDevice) -> String {
    let mut driver = vk::PhysicalDeviceDriverProperties::default();
    let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut driver);
    // SAFETY: `physical` is one of the instance's devices, and the structures outlive the call.
    unsafe { instance.get_physical_device_properties2(physical, &mut properties) };
    let name = text(&properties.properties.device_name);
    format!("{}, {}", name.trim(), text(&driver.driver_info))
}

fn layout_binding(binding: &Binding) -> vk::DescriptorSetLayoutBinding<'static> {
    let ty = match binding.uniform {
        true => vk::DescriptorType::UNIFORM_BUFFER,
        false => vk::DescriptorType::STORAGE_BUFFER,
    };
    vk::DescriptorSetLayoutBinding::default()
        .binding(binding.number)
        .descriptor_type(ty)
        .descriptor_count(1)
        .stage_flags(vk::ShaderStageFlags::COMPUTE)
}

fn value(statistic: &vk::PipelineExecutableStatisticKHR<'_>) -> u64 {
    // SAFETY: the driver says which field it filled.
    unsafe {
        match statistic.format {
            vk::PipelineExecutableStatisticFormatKHR::FLOAT64 => statistic.value.f64 as u64,
            vk::PipelineExecutableStatisticFormatKHR::INT64 => statistic.value.i64.max(0) as u64,
            _ => statistic.value.u64,
        }
    }
}

/// A fixed-size name as text.
fn text(name: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = name.iter().take_while(|&&c| c != 0).map(|&c| c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
