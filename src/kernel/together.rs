//! Several dispatches that do not depend on each other as one.

use std::collections::HashMap;
use std::fmt::Write;
use std::ops::Range;

use super::knobs::Kernel;
use super::numbered::suffixed;
use super::program::{Bind, Dispatch};
use super::text::{filled, line};
use super::wgsl::{Item, Kind, Module};
use crate::error::Result;
use crate::profile::Profile;

/// The text around the parts.
pub(crate) const SKELETON: &str = include_str!("../../shaders/together.wgsl");

/// Bytes of a uniform that every adapter allows.
const MAX_UNIFORM: usize = 16 << 10;

/// One dispatch that does the work of these: its kernel calls each of theirs in workgroups of its own. A binding that
/// several only read is bound once.
///
/// `None` if they cannot be one: their workgroups differ in size or share memory, or a text has something that cannot
/// be in another's module.
pub(crate) fn together(dispatches: &[Dispatch], profile: &Profile) -> Result<Option<Dispatch>> {
    let mut text = Text::default();
    for (k, dispatch) in dispatches.iter().enumerate() {
        if text.add(k, dispatch)?.is_none() {
            return Ok(None);
        }
    }
    Ok(text.finish(profile))
}

/// What replaces the lines of the skeleton, and what is launched.
#[derive(Default)]
struct Text {
    /// Invocations of a workgroup.
    size: Option<i64>,
    fields: String,
    bindings: Vec<Binding>,
    parts: String,
    calls: Vec<String>,
    grids: Vec<[u32; 4]>,
    words: Vec<u32>,
    /// Workgroups so far.
    groups: u32,
}

/// A storage binding, at most one for each that is only read.
struct Binding {
    bind: Bind,
    name: String,
    ty: String,
    writes: bool,
}

/// Names of a part, and what they are in the whole.
type Renamed<'a> = HashMap<&'a str, String>;

impl Text {
    fn add(&mut self, k: usize, dispatch: &Dispatch) -> Result<Option<()>> {
        let text = suffixed(&dispatch.kernel.with_knobs()?, &format!("_{k}"));
        Ok(self.add_text(k, dispatch, &Module::parse(&text)))
    }

    fn add_text(&mut self, k: usize, dispatch: &Dispatch, module: &Module<'_>) -> Option<()> {
        let entry = format!("{}_{k}", dispatch.kernel.entry);
        let size = module.workgroup_size(&entry)?;
        // What a part calls `launch` would hide the uniform.
        if *self.size.get_or_insert(size) != size || module.tokens.iter().any(|t| t.text == "launch") {
            return None;
        }
        let functions = module.reachable(&entry);
        let renamed = self.add_globals(k, dispatch, module, &functions)?;
        for (i, item) in module.items.iter().enumerate() {
            match item.kind {
                Kind::Function(name) if name == entry => self.add_entry(k, module, item, &renamed)?,
                Kind::Function(_) if !functions.contains(&i) => {}
                Kind::Function(_) | Kind::Named { .. } | Kind::Other => {
                    copy(module, item.tokens.clone(), &renamed, &mut self.parts);
                }
                _ => {}
            }
        }
        let [x, y, z] = dispatch.workgroups;
        self.grids.push([x, y, z, self.groups]);
        self.groups = x.checked_mul(y)?.checked_mul(z)?.checked_add(self.groups)?;
        Some(())
    }

    /// Adds the bindings and the uniform that a part uses.
    fn add_globals<'a>(
        &mut self,
        k: usize,
        dispatch: &Dispatch,
        module: &Module<'a>,
        functions: &[usize],
    ) -> Option<Renamed<'a>> {
        let items = || functions.iter().map(|&f| &module.items[f]);
        let mentioned = |name: &str| items().any(|item| module.mentions(item, name).next().is_some());
        let mut renamed = Renamed::new();
        for item in &module.items {
            match item.kind {
                Kind::Storage { name, binding, writes, ref ty } if mentioned(name) => {
                    let number: usize = module.word(binding).trim_end_matches(['u', 'i']).parse().ok()?;
                    let bind = *dispatch.binds.get(number.checked_sub(1)?)?;
                    let ty = module.type_of(ty.clone()).0;
                    // What a launch does not have may be anything.
                    let read = |b: &Binding| !writes && !b.writes && b.ty == ty;
                    let same = |b: &&Binding| read(b) && (b.bind == bind || bind == Bind::Null);
                    match self.bindings.iter().find(same) {
                        Some(b) => {
                            renamed.insert(name, b.name.clone());
                        }
                        None => self.bindings.push(Binding { bind, name: name.into(), ty, writes }),
                    }
                }
                Kind::Uniform { name } if mentioned(name) => {
                    // A local of this name would become a member.
                    if items().any(|item| module.declares(item, name)) {
                        return None;
                    }
                    renamed.insert(name, format!("launch.part_{k}"));
                    self.add_field(k, module, item, name, &dispatch.words);
                }
                Kind::Workgroup { name, .. } if mentioned(name) => return None,
                Kind::Other if module.word(item.tokens.start) != "struct" => return None,
                _ => {}
            }
        }
        Some(renamed)
    }

    /// Adds a part's uniform as a field, whose size is that of its words: one that is larger would not compile.
    fn add_field(&mut self, k: usize, module: &Module<'_>, item: &Item<'_>, name: &str, words: &[u32]) {
        let colon = item.tokens.clone().find(|&i| module.word(i) == name).map_or(item.tokens.end, |i| i + 1);
        let ty = (colon + 1..item.tokens.end.saturating_sub(1)).map(|i| module.word(i)).collect::<String>();
        let padded = words.len().next_multiple_of(4);
        line!(self.fields, "    @align(16) @size({}) part_{k}: {ty},", 4 * padded);
        self.words.extend(words);
        self.words.resize(self.words.len() + padded - words.len(), 0);
    }

    /// Adds an entry point as a function, and the call of it.
    fn add_entry(&mut self, k: usize, module: &Module<'_>, item: &Item<'_>, renamed: &Renamed<'_>) -> Option<()> {
        let start = item.tokens.clone().find(|&i| module.word(i) == "fn")?;
        let (name, open) = (module.word(start + 1), start + 2);
        let close = module.closing(open)?;
        let (mut parameters, mut arguments) = (vec![], vec![]);
        let mut at = open + 1;
        while at < close {
            let end = (at..close).find(|&i| module.word(i) == ",").unwrap_or(close);
            let words: Vec<&str> = (at..end).map(|i| module.word(i)).collect();
            let ["@", "builtin", "(", builtin, ")", parameter @ ..] = &words[..] else { return None };
            parameters.push(parameter.concat());
            arguments.push(match *builtin {
                "workgroup_id" => "place_in(grid, group)",
                "num_workgroups" => "grid.xyz",
                "local_invocation_index" => "lid",
                "local_invocation_id" => "vec3<u32>(lid, 0u, 0u)",
                _ => return None,
            });
            at = end + 1;
        }
        let _ = write!(self.parts, "fn {name}({}) ", parameters.join(", "));
        copy(module, close + 1..item.tokens.end, renamed, &mut self.parts);
        self.calls.push(format!(
            "{{\n        let grid = launch.grids[{k}];\n        {name}({});\n    }}",
            arguments.join(", ")
        ));
        Some(())
    }

    fn finish(self, profile: &Profile) -> Option<Dispatch> {
        let words: Vec<u32> =
            self.grids.iter().copied().chain([[0, 0, 0, self.groups]]).flatten().chain(self.words).collect();
        if 4 * words.len() > MAX_UNIFORM {
            return None;
        }
        let (mut bindings, mut calls) = (String::new(), String::new());
        for (i, Binding { name, ty, writes, .. }) in self.bindings.iter().enumerate() {
            let access = if *writes { "read_write" } else { "read" };
            line!(bindings, "@group(0) @binding({}) var<storage, {access}> {name}: {ty};", i + 1);
        }
        let parts = self.calls.len();
        for (k, call) in self.calls.iter().enumerate() {
            let before = if k == 0 { "    " } else { " else " };
            let condition = match k + 1 == parts {
                true => String::new(),
                false => format!("if (group < launch.grids[{}].w) ", k + 1),
            };
            let _ = write!(calls, "{before}{condition}{call}");
        }
        calls.push('\n');
        let lines: [(&str, &str); 4] = [
            ("    //: fields\n", &self.fields),
            ("//: bindings\n", &bindings),
            ("//: parts\n", &self.parts),
            ("    //: calls\n", &calls),
        ];
        let text = filled(SKELETON, &lines);
        let size = u32::try_from(self.size?).ok()?;
        let kernel = Kernel::new("together", text, "forward").knob("GROUP", size).knob("PARTS", parts as u32);
        let binds = self.bindings.iter().map(|b| b.bind).collect();
        Some(Dispatch { kernel, binds, words, workgroups: profile.grid(self.groups as usize) })
    }
}

/// Appends these tokens, and what is between them, with names replaced.
fn copy(module: &Module<'_>, tokens: Range<usize>, renamed: &Renamed<'_>, out: &mut String) {
    let Some(first) = module.tokens.get(tokens.start) else { return };
    let mut from = first.at;
    for i in tokens {
        let token = &module.tokens[i];
        if let Some(new) = renamed.get(token.text).filter(|_| module.is_name(i)) {
            out.push_str(&module.text[from..token.at]);
            out.push_str(new);
        } else {
            out.push_str(&module.text[from..token.end()]);
        }
        from = token.end();
    }
    out.push('\n');
}
