//! A Vulkan device as wgpu opens it, less `robustBufferAccess`, and what lavapipe needs to run kernels on it that the
//! layer has changed.

use anyhow::{Context, Result, bail};
use ash::vk;
use throughline::wgpu::{self, hal};
use throughline::{Cooperative, Gpu};

/// The device, with its subgroup operations and cooperative matrices.
pub fn open() -> Result<Gpu> {
    map_page_zero()?;
    let backends = wgpu::Backends::VULKAN;
    // With flags for debugging, wgpu would receive the layer's messages.
    let flags = wgpu::InstanceFlags::empty();
    let default = wgpu::InstanceDescriptor::new_without_display_handle();
    let descriptor = wgpu::InstanceDescriptor { backends, flags, ..default };
    let instance = wgpu::Instance::new(descriptor);
    let adapter = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))?;
    let properties = adapter.cooperative_matrix_properties();
    let kind = Cooperative::ALL.into_iter().find(|kind| kind.is_in(&properties));
    let wanted = Gpu::USEFUL_FEATURES | kind.map_or(wgpu::Features::empty(), Cooperative::features);
    let features = adapter.features() & wanted;
    let experimental_features = match kind {
        // SAFETY: the token states that its holder knows of bugs of experimental features. Looking for some is what
        // this program is for.
        Some(_) => unsafe { wgpu::ExperimentalFeatures::enabled() },
        None => wgpu::ExperimentalFeatures::disabled(),
    };
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("validate"),
        required_features: features,
        required_limits: adapter.limits(),
        experimental_features,
        ..Default::default()
    };
    // SAFETY: the device is of this adapter and has these features. What wgpu promises of shaders' accesses does not
    // hold on it, and should not: an access that is out of range would be hidden. The process runs nothing but kernels
    // to be tested, and ends.
    let (device, queue) = unsafe { adapter.create_device_from_hal(fragile(&adapter, features)?, &descriptor)? };
    Ok(match kind {
        Some(kind) => Gpu::from_device_cooperative(device, queue, &properties, kind)?,
        None => Gpu::from_device(device, queue),
    })
}

/// Makes zeros readable at address 0.
///
/// At the end of a loop, Mesa's lavapipe goes through its body once more with all lanes off. Loads from buffers then
/// come from none, and are zero. The layer's own tables are behind an address in such a buffer, and what is at an
/// address lavapipe loads all the same, if it is one address for all lanes: here, at one of the first few.
#[cfg(unix)]
fn map_page_zero() -> Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: nothing of the process is in that page.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, flags, -1, 0) };
    if page == libc::MAP_FAILED {
        let error = std::io::Error::last_os_error();
        bail!("no memory at address 0 ({error}): this needs root, or `sysctl vm.mmap_min_addr=0`");
    }
    Ok(())
}

#[cfg(not(unix))]
fn map_page_zero() -> Result<()> {
    bail!("this needs Linux")
}

/// wgpu's device for these features, but for `robustBufferAccess` and what needs it.
///
/// # Safety
///
/// Shaders that access memory out of range have undefined behaviour on it.
unsafe fn fragile(from: &wgpu::Adapter, features: wgpu::Features) -> Result<hal::OpenDevice<hal::api::Vulkan>> {
    // SAFETY: the handle is used within this function, and destroys nothing.
    let adapter = unsafe { from.as_hal::<hal::api::Vulkan>() }.context("not a Vulkan adapter")?;
    let mut extensions = adapter.required_device_extensions(features);
    extensions.retain(|&name| name != ash::ext::robustness2::NAME);
    let names: Vec<_> = extensions.iter().map(|name| name.as_ptr()).collect();
    let queues = [vk::DeviceQueueCreateInfo::default().queue_family_index(0).queue_priorities(&[1.0])];
    let mut enabled = adapter.physical_device_features(&extensions, features);
    let info = vk::DeviceCreateInfo::default().queue_create_infos(&queues).enabled_extension_names(&names);
    let info = enabled.add_to_device_create(info);
    // SAFETY: the pointer is to the features in `enabled`, which lives until the end.
    let core = unsafe { info.p_enabled_features.as_ref() }.copied().context("no features")?;
    // A device has a feature that is in either list, but the layer looks into the first alone.
    let without = vk::PhysicalDeviceFeatures { robust_buffer_access: vk::FALSE, ..core };
    let mut with = vk::PhysicalDeviceFeatures2::default().features(core);
    let info = info.enabled_features(&without).push_next(&mut with);
    // SAFETY: extensions and features are those of this adapter, and all pointers live until the end.
    let device =
        unsafe { adapter.shared_instance().raw_instance().create_device(adapter.raw_physical_device(), &info, None) }?;
    // SAFETY: the device was made from this adapter, with one queue of family 0.
    let opened = unsafe {
        adapter.device_from_raw(
            device,
            None,
            &extensions,
            features,
            &from.limits(),
            &wgpu::MemoryHints::default(),
            0,
            0,
        )
    };
    Ok(opened?)
}
