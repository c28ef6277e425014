//! Kernels: WGSL files with const knobs, specialised by text.
//!
//! A kernel's text is one file under `shaders/`, or several, one after another; `ops::TABLE` lists them. Lines of the
//! form `const NAME: T = v;` or `alias NAME = T;` are *knobs*: a launch may replace the right-hand side. Knobs are text
//! because `override` constants cannot size a function-local array, which is the register tile that a matmul tunes.
//!
//! A loop with the comment `// unroll` after its `{` is written out in plans for GPUs: one block for each iteration, in
//! which the loop's variable is a constant. Mark loops whose variable is an index into an array of the function, or into
//! a vector or matrix. Compilers keep these in registers only if indices are constants, and DX12's FXC rejects some that
//! are not.

use std::any::TypeId;
use std::borrow::Cow;

use super::halves::{self, Halves};
use super::merge::{self, Bound};
use super::unroll::{is_marked, unroll};
use super::wgsl::Module;
use crate::error::{Error, Result};
use crate::profile::{AdapterClass, Cooperative};

/// A kernel before compilation: an entry point of a WGSL file, with settings for its knobs.
///
/// An op's [`launch`](crate::ops::Op::launch) returns kernels, and the device compiles each distinct one once.
///
/// ```
/// # use throughline::kernel::Kernel;
/// let k = Kernel::new("demo", "const TILE: u32 = 8u;\n", "forward").knob("TILE", 16u32);
/// assert_eq!(k.wgsl().unwrap(), "const TILE: u32 = 16u;\n");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Name for debuggers, plans and errors: the stem of the op's file.
    pub label: &'static str,
    /// The text. Text made at run time will do, too; static text is not copied, and plans know it by its address.
    pub source: Cow<'static, str>,
    /// The entry point.
    pub entry: &'static str,
    /// Knobs to set: names and new right-hand sides.
    pub knobs: Vec<(&'static str, String)>,
    /// What becomes of the file's storage bindings 1, 2, ...; empty if they stay as they are.
    pub merged: Vec<Bound>,
    trust: Trust,
    /// Which of the file's storage bindings are tensors of f16.
    halves: Halves,
    /// Whether marked loops are written out.
    unrolled: bool,
}

/// Who answers for a kernel's indices and loops. Each step towards [`Planned`](Trust::Planned) is this crate's to make:
/// the field is private, so code outside can neither set it nor take it over from another kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Trust {
    /// Nobody: the driver checks them.
    Checked,
    /// The table's op of this type, once a planner has asked it for its program.
    MadeBy(TypeId),
    /// The planner has: such an op made this kernel for shapes that its `infer` accepts.
    Planned,
}

impl Kernel {
    /// A kernel with the knobs as written in the file and all checks on.
    pub fn new(label: &'static str, source: impl Into<Cow<'static, str>>, entry: &'static str) -> Self {
        let (knobs, merged, halves) = Default::default();
        Kernel { label, source: source.into(), entry, knobs, merged, trust: Trust::Checked, halves, unrolled: false }
    }

    /// Whether it runs without injected bounds checks and loop bounds. Only a [plan](crate::Plan) has such kernels, and
    /// only for ops of the [table](crate::ops::TABLE). A kernel of an op of your own keeps all checks, and so does one
    /// that your op gets by calling `launch` of an op of the table, with shapes that nobody has checked.
    ///
    /// ```
    /// # #![forbid(unsafe_code)]
    /// use throughline::kernel::Kernel;
    /// let kernel = Kernel::new("mine", "@compute @workgroup_size(1) fn main() {}", "main");
    /// assert!(!kernel.is_trusted());
    /// ```
    ///
    /// Code outside this crate cannot set it:
    ///
    /// ```compile_fail,E0451
    /// # #![forbid(unsafe_code)]
    /// use throughline::kernel::Kernel;
    /// let kernel = Kernel::new("mine", "@compute @workgroup_size(1) fn main() {}", "main");
    /// let kernel = Kernel { label: "trusted", ..kernel };
    /// ```
    pub fn is_trusted(&self) -> bool {
        self.trust == Trust::Planned
    }

    /// A kernel that an op of this type may run unchecked.
    pub(crate) fn made_by(mut self, op: TypeId) -> Self {
        self.trust = Trust::MadeBy(op);
        self
    }

    /// As it runs in a plan, for a node whose op is of this type and accepts the shapes. Whatever an op returns, only
    /// what it has made itself is trusted: not even a kernel that was in a plan before.
    pub(crate) fn planned_for(mut self, op: TypeId) -> Self {
        self.trust = if self.trust == Trust::MadeBy(op) { Trust::Planned } else { Trust::Checked };
        self
    }

    /// As it runs on this class of adapters. Software adapters unroll loops themselves where it pays, and a longer text
    /// takes them longer to compile.
    pub fn on(mut self, class: AdapterClass) -> Self {
        self.unrolled = class == AdapterClass::Gpu && is_marked(&self.source);
        self
    }

    /// With these of its storage bindings as tensors of f16.
    pub(crate) fn with_halves(mut self, halves: Halves) -> Self {
        self.halves = halves;
        self
    }

    /// Whether an op of this crate made it.
    pub(crate) fn is_of_table(&self) -> bool {
        self.trust != Trust::Checked
    }

    /// Whether some of its storage bindings are tensors of f16.
    #[cfg(feature = "check")]
    pub(crate) fn has_halves(&self) -> bool {
        !self.halves.bindings.is_empty()
    }

    /// Sets a knob. A knob that the file does not declare is an error of [`wgsl`](Self::wgsl).
    pub fn knob(mut self, name: &'static str, value: impl KnobValue) -> Self {
        self.knobs.push((name, value.wgsl()));
        self
    }

    /// The final WGSL.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] names a knob that the file does not declare, a loop that cannot be unrolled, or the part of the
    /// text that keeps bindings from being merged or stored in f16.
    pub fn wgsl(&self) -> Result<String> {
        let mut text = self.as_stored()?;
        if self.unrolled {
            text = unroll(&text).map_err(|message| self.error(message))?;
        }
        if self.merged.is_empty() {
            return Ok(text);
        }
        merge::rewrite(&text, self.entry, &self.merged, self.is_trusted()).map_err(|message| self.error(message))
    }

    pub(crate) fn error(&self, message: String) -> Error {
        Error::Kernel { kernel: self.label.into(), message }
    }

    /// The WGSL with knobs set, and with bindings of the types that tensors are stored in.
    pub(crate) fn as_stored(&self) -> Result<String> {
        let text = self.with_knobs()?;
        match self.halves.bindings[..] {
            [] => Ok(text),
            _ => halves::rewrite(&text, self.entry, &self.halves).map_err(|message| self.error(message)),
        }
    }

    /// The WGSL with knobs set, and with the file's own bindings.
    pub(crate) fn with_knobs(&self) -> Result<String> {
        let mut text = self.source.to_string();
        for (name, value) in &self.knobs {
            text = replace_knob(&text, name, value).ok_or_else(|| {
                self.error(format!("no line `const {name}: ... = ...;` or `alias {name} = ...;` in its WGSL"))
            })?;
        }
        Ok(text)
    }

    /// What a device must be opened with to compile the text: subgroup operations, cooperative matrices, f16. All of
    /// the text counts, not only what the entry point reaches: a device without a feature rejects a whole module.
    pub fn features(&self) -> wgpu::Features {
        let module = Module::parse(&self.source);
        let mut features = wgpu::Features::empty();
        if module.uses_subgroups() {
            features |= wgpu::Features::SUBGROUP;
        }
        if module.enables("wgpu_cooperative_matrix") {
            features |= Cooperative::F32.features();
        }
        if module.enables("f16") || !self.halves.bindings.is_empty() && !self.halves.in_words {
            features |= wgpu::Features::SHADER_F16;
        }
        features
    }

    /// The kernel in the form `label.entry[KNOB=value ...]`, for plans and profiles. What became of merged bindings
    /// follows a `|`, and what is stored in f16 an `f16:`.
    pub fn describe(&self) -> String {
        let bound = |b: &Bound| match b {
            Bound::Alone(n) => n.to_string(),
            Bound::Part(n) => format!("in {n}"),
            Bound::Zero => "none".into(),
        };
        let mut all: Vec<String> = self.knobs.iter().map(|(n, v)| format!("{n}={v}")).collect();
        if !self.halves.bindings.is_empty() {
            let numbers = self.halves.bindings.iter().map(u32::to_string).collect::<Vec<_>>();
            all.push(format!("f16: {}", numbers.join(", ")));
        }
        if !self.merged.is_empty() {
            all.push(format!("| {}", self.merged.iter().map(bound).collect::<Vec<_>>().join(", ")));
        }
        match all.is_empty() {
            true => format!("{}.{}", self.label, self.entry),
            false => format!("{}.{}[{}]", self.label, self.entry, all.join(" ")),
        }
    }

    /// Bytes of workgroup memory that the kernel uses. `None` if its WGSL declares them in a way that this crate does
    /// not understand.
    pub fn workgroup_bytes(&self) -> Option<u32> {
        let text = self.with_knobs().ok()?;
        Module::parse(&text).workgroup_bytes(self.entry).and_then(|n| n.try_into().ok())
    }
}

fn replace_knob(text: &str, name: &str, value: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len() + value.len());
    let mut found = false;
    for line in text.split_inclusive('\n') {
        let declares = ["const ", "alias "].iter().any(|kw| {
            line.strip_prefix(kw)
                .and_then(|rest| rest.strip_prefix(name))
                .is_some_and(|rest| rest.starts_with([':', ' ', '=']))
        });
        match (declares, line.find('='), line.find(';')) {
            (true, Some(eq), Some(semi)) if eq < semi => {
                found = true;
                out.push_str(&line[..=eq]);
                out.push(' ');
                out.push_str(value);
                out.push_str(&line[semi..]);
            }
            _ => out.push_str(line),
        }
    }
    found.then_some(out)
}

/// Values that a knob can be set to.
pub trait KnobValue {
    /// The value as a WGSL expression or type.
    fn wgsl(&self) -> String;
}

impl KnobValue for u32 {
    fn wgsl(&self) -> String {
        format!("{self}u")
    }
}

impl KnobValue for bool {
    fn wgsl(&self) -> String {
        self.to_string()
    }
}

impl KnobValue for &str {
    fn wgsl(&self) -> String {
        self.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knobs_replace_only_their_own_line() {
        let source = "const A: u32 = 1u; // why\nconst AB: u32 = 2u;\nalias E = f32;\n";
        let k = Kernel::new("t", source, "forward").knob("A", 7u32).knob("E", "vec4<f32>");
        assert_eq!(k.wgsl().unwrap(), "const A: u32 = 7u; // why\nconst AB: u32 = 2u;\nalias E = vec4<f32>;\n");
    }

    #[test]
    fn features_are_read_from_code_and_not_from_comments() {
        let features = |source: &'static str| Kernel::new("t", source, "f").features();
        let (none, subgroup) = (wgpu::Features::empty(), wgpu::Features::SUBGROUP);
        assert_eq!(features("// subgroupShuffleXor(v, 1u), @builtin(subgroup_size)\nfn f() { let x = 1; }"), none);
        assert_eq!(features("/* enable f16; /* subgroupAdd(x) */ */ fn f() { let subgroup_size = 1; }"), none);
        assert_eq!(features("fn subgroups() {} fn f() { subgroups(); }"), none);
        assert_eq!(features("fn f() { let x = subgroupAdd ( 1.0 ); }"), subgroup);
        assert_eq!(features("fn f(@builtin( subgroup_invocation_id ) i: u32) {}"), subgroup);
        assert_eq!(features("enable /* half */ f16;\nfn f() {}"), wgpu::Features::SHADER_F16);
        let cooperative = features("enable f16, wgpu_cooperative_matrix;\nfn f() {}");
        assert_eq!(cooperative, Cooperative::F16.features());
    }

    #[test]
    fn an_absent_knob_is_an_error_that_names_it() {
        let err = Kernel::new("t", "const A: u32 = 1u;\n", "f").knob("B", true).wgsl().unwrap_err();
        assert!(err.to_string().contains("const B"), "{err}");
    }
}
