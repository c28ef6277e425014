//! Is there an adapter? If not, can one be had?

use crate::{Outcome, cargo, install, run};

/// Makes sure that `Gpu::headless` finds an adapter. `profile` is cargo's, so that what is built to
/// find out is built once.
pub fn ensure(profile: &[&str]) -> Outcome {
    run(cargo(&["build", "--quiet", "--example", "adapters"]).args(profile))?;
    let present = || {
        let status = cargo(&["run", "--quiet", "--example", "adapters"]).args(profile).status();
        status.is_ok_and(|s| s.success())
    };
    if present() {
        return Ok(());
    }
    if !cfg!(target_os = "linux") {
        return Err("no GPU adapter was found; install the graphics driver of this machine".into());
    }
    println!("No GPU adapter was found: installing Mesa's software driver.");
    install::software_driver()?;
    match present() {
        true => Ok(()),
        false => Err("the software driver is installed, and still there is no adapter. \
                      `vulkaninfo --summary` (package vulkan-tools) may tell why"
            .into()),
    }
}
