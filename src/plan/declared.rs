//! What a kernel's WGSL declares, against what a launch binds. Where the two disagree, planning fails with the name of
//! the node: otherwise the driver would report it without one, or the kernel would overwrite an input in silence.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use crate::graph::Op;
use crate::kernel::wgsl::{Kind, Module};
use crate::kernel::{Bind, Dispatch, Kernel, Launch, Program};

/// Checks a launch of `op`: every index that it binds exists, its dispatches bind what their entry points declare, and
/// every output is written or starts as an input.
pub(crate) fn check(op: &dyn Op, cx: &Launch<'_>, program: &Program) -> Result<(), String> {
    let counts = Counts { inputs: cx.inputs.len(), outputs: cx.outputs.len(), scratch: program.scratch.len() };
    for dispatch in &program.dispatches {
        let name = format_args!("{}.{}", dispatch.kernel.label, dispatch.kernel.entry);
        dispatch.binds.iter().try_for_each(|bind| counts.check(*bind)).map_err(|e| format!("`{name}` {e}"))?;
        check_dispatch(dispatch).map_err(|e| format!("`{name}` {e}"))?;
    }
    let written = |i: usize| program.dispatches.iter().any(|d| d.binds.contains(&Bind::Out(i)));
    match (0..cx.outputs.len()).find(|&i| !written(i) && op.starts_as(i).is_none()) {
        Some(i) => Err(format!("no dispatch writes output {i}: one must bind it as `Bind::Out({i})`")),
        None => Ok(()),
    }
}

/// How many tensors of each kind a launch can bind.
struct Counts {
    inputs: usize,
    outputs: usize,
    scratch: usize,
}

impl Counts {
    fn check(&self, bind: Bind) -> Result<(), String> {
        let (what, index, count) = match bind {
            Bind::In(i) => ("input", i, self.inputs),
            Bind::Out(i) | Bind::OutIn(i) => ("output", i, self.outputs),
            Bind::Scratch(i) | Bind::ScratchIn(i) => ("scratch tensor", i, self.scratch),
            Bind::Null => return Ok(()),
        };
        match index < count {
            true => Ok(()),
            false => Err(format!("binds {what} {index}, but there are only {count}, numbered from 0")),
        }
    }
}

fn check_dispatch(dispatch: &Dispatch) -> Result<(), String> {
    let declared = Declared::of(&dispatch.kernel);
    let Some(storage) = &declared.storage else {
        return Err("does not exist: the kernel's WGSL has no function of this name".into());
    };
    // Numbers that are no literals are left to the driver.
    if storage.iter().any(|s| s.number.is_none()) {
        return Ok(());
    }
    let binds = &dispatch.binds;
    let over = |s: &&Storage| s.certain && s.number.is_none_or(|n| n == 0 || n > binds.len());
    if let Some(s) = storage.iter().find(over) {
        let number = s.number.unwrap_or(0);
        let uniform = if number == 0 { "; binding 0 is the uniform's" } else { "" };
        let (name, last) = (&s.name, binds.len());
        return Err(format!("uses `{name}` at binding {number}, but its launch binds 1 to {last}{uniform}"));
    }
    for (i, bind) in binds.iter().enumerate() {
        let number = i + 1;
        let mut found = storage.iter().filter(|s| s.number == Some(number));
        let Some(s) = found.next() else {
            return Err(format!("uses no storage at binding {number}, but its launch has {bind:?} there"));
        };
        if found.next().is_some() {
            continue; // the driver knows which of them is used
        }
        let launch_writes = matches!(bind, Bind::Out(_) | Bind::Scratch(_));
        if launch_writes != s.writes {
            let access = |writes| if writes { "`read_write`" } else { "`read`" };
            return Err(format!(
                "declares `{}` at binding {number} as {}, but its launch has {bind:?} there, which is {}",
                s.name,
                access(s.writes),
                access(launch_writes)
            ));
        }
    }
    match (declared.uniform, dispatch.words.is_empty()) {
        (Some(true), true) => Err("reads a uniform at binding 0, but its launch has no words for it".into()),
        (None, false) => {
            Err(format!("reads no uniform at binding 0, but its launch has {} words for one", dispatch.words.len()))
        }
        _ => Ok(()),
    }
}

/// A storage variable that an entry point may use.
#[derive(Debug)]
struct Storage {
    name: String,
    /// Its binding, if that is a literal.
    number: Option<usize>,
    writes: bool,
    /// False where a local variable of the same name may hide it.
    certain: bool,
}

/// What an entry point declares.
#[derive(Debug)]
struct Declared {
    /// `None` if there is no such entry point.
    storage: Option<Vec<Storage>>,
    /// Whether there is a uniform that it may use, and whether it does so for certain.
    uniform: Option<bool>,
}

/// A kernel's text and entry point. Static text is known by its address, so that plans need not hash it. Knobs change
/// no binding's number or access.
#[derive(PartialEq, Eq, Hash)]
enum Key {
    Static { address: usize, len: usize, entry: &'static str },
    Owned { text: String, entry: &'static str },
}

/// More than any app has at a time; apps that go on generating text must not fill the memory with it.
const MAX_KNOWN: usize = 4096;

impl Declared {
    /// What a kernel declares: parsed once, then remembered.
    fn of(kernel: &Kernel) -> Arc<Declared> {
        static KNOWN: LazyLock<Mutex<HashMap<Key, Arc<Declared>>>> = LazyLock::new(Mutex::default);
        let entry = kernel.entry;
        let key = match &kernel.source {
            Cow::Borrowed(text) => Key::Static { address: text.as_ptr().addr(), len: text.len(), entry },
            Cow::Owned(text) => Key::Owned { text: text.clone(), entry },
        };
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN && !known.contains_key(&key) {
            known.clear();
        }
        known.entry(key).or_insert_with(|| Arc::new(Declared::parse(&kernel.source, entry))).clone()
    }

    fn parse(text: &str, entry: &str) -> Declared {
        let module = Module::parse(text);
        let functions = module.reachable(entry);
        if functions.is_empty() {
            return Declared { storage: None, uniform: None };
        }
        let names = module.names(&functions);
        let items = || functions.iter().map(|&f| &module.items[f]);
        let mentioned = |name: &str| items().any(|item| module.mentions(item, name).next().is_some());
        let number = |token: usize| module.word(token).trim_end_matches(['u', 'i']).parse().ok();
        let mut declared = Declared { storage: Some(vec![]), uniform: None };
        for item in &module.items {
            match item.kind {
                Kind::Storage { name, binding, writes, .. } if mentioned(name) => {
                    let (name, number, certain) = (name.to_string(), number(binding), names.contains(name));
                    declared.storage.get_or_insert_default().push(Storage { name, number, writes, certain });
                }
                Kind::Uniform { name } if mentioned(name) => {
                    declared.uniform = Some(names.contains(name) || declared.uniform == Some(true));
                }
                _ => {}
            }
        }
        declared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WGSL: &str = "
        @group(0) @binding(0) var<uniform> n: u32;
        @group(0) @binding(1) var<storage, read> x: array<f32>; // @binding(9) in a comment
        @group(0) @binding(2) var<storage, read_write> y: array<f32>;
        @group(0) @binding(2u) var<storage> z: array<f32>;
        fn double(i: u32) -> f32 { return 2.0 * x[i]; }
        @compute @workgroup_size(1) fn main() { y[0] = double(n); }
        @compute @workgroup_size(1) fn other() { y[0] = x[0] + z[0]; }
        @compute @workgroup_size(1) fn hides() { let y = x[0]; }";

    fn dispatch(text: &'static str, entry: &'static str, binds: &[Bind], words: &[u32]) -> Result<(), String> {
        let kernel = Kernel::new("t", text, entry);
        check_dispatch(&Dispatch { kernel, binds: binds.to_vec(), words: words.to_vec(), workgroups: [1; 3] })
    }

    #[test]
    fn launches_must_bind_what_the_entry_point_uses() {
        let main = |binds: &[Bind], words: &[u32]| dispatch(WGSL, "main", binds, words).unwrap_err();
        assert_eq!(dispatch(WGSL, "main", &[Bind::In(0), Bind::Out(0)], &[1]), Ok(()));
        assert_eq!(dispatch(WGSL, "main", &[Bind::ScratchIn(0), Bind::Scratch(1)], &[1]), Ok(()));
        let swapped = main(&[Bind::Out(0), Bind::In(0)], &[1]);
        assert!(swapped.contains("`x`") && swapped.contains("Out(0)"), "{swapped}");
        let read_only = main(&[Bind::In(0), Bind::In(1)], &[1]);
        assert!(read_only.contains("`y`") && read_only.contains("In(1)"), "{read_only}");
        assert!(main(&[Bind::In(0)], &[1]).contains("`y` at binding 2"));
        assert!(main(&[Bind::In(0), Bind::Out(0), Bind::Out(1)], &[1]).contains("no storage at binding 3"));
        assert!(main(&[Bind::In(0), Bind::Out(0)], &[]).contains("no words"));
        assert!(dispatch(WGSL, "absent", &[], &[]).unwrap_err().contains("no function"));
        assert!(dispatch(WGSL, "other", &[Bind::In(0), Bind::Out(0)], &[1]).unwrap_err().contains("no uniform"));
    }

    /// Two variables at one binding, or a local one that may hide a global: neither is called wrong.
    #[test]
    fn what_only_the_driver_can_know_is_left_to_it() {
        for binds in [[Bind::In(0), Bind::Out(0)], [Bind::In(0), Bind::In(1)]] {
            assert_eq!(dispatch(WGSL, "other", &binds, &[]), Ok(()));
        }
        assert_eq!(dispatch(WGSL, "hides", &[Bind::In(0)], &[]), Ok(()));
        assert_eq!(dispatch(WGSL, "hides", &[Bind::In(0), Bind::Out(0)], &[]), Ok(()));
        const NAMED: &str = "
            const AT: u32 = 1;
            @group(0) @binding(AT) var<storage, read> x: array<f32>;
            @compute @workgroup_size(1) fn main() { _ = x[0]; }";
        assert_eq!(dispatch(NAMED, "main", &[Bind::Out(0), Bind::Out(1)], &[]), Ok(()));
    }
}
