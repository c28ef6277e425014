//! Looks for a GPU adapter, and installs a software driver if there is none.

use crate::{Outcome, cargo, install, run};

/// Makes sure that `Gpu::headless` finds an adapter. `profile` are cargo's flags for the profile of the command that
/// follows, so that the library is built only once.
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
        return Err("no GPU adapter found; install the graphics driver for this machine".into());
    }
    println!("No GPU adapter found. Installing Mesa's software driver.");
    install::software_driver()?;
    match present() {
        true => Ok(()),
        false => Err("the software driver is installed, but there is still no adapter; \
                      `vulkaninfo --summary` (package vulkan-tools) may show why"
            .into()),
    }
}
