//! Several copies of one text in one module.

use std::collections::HashSet;

use super::wgsl::{Kind, Module};

/// The text with a suffix behind every name that it declares at the top level, so that it can be in a module several
/// times.
///
/// Names of locals that hide such names change with them. Members of structures must not have such names.
pub(crate) fn suffixed(text: &str, suffix: &str) -> String {
    let module = Module::parse(text);
    let names: HashSet<&str> = module
        .items
        .iter()
        .filter_map(|item| match &item.kind {
            Kind::Function(name) | Kind::Named { name, .. } | Kind::Uniform { name } => Some(*name),
            Kind::Storage { name, .. } | Kind::Workgroup { name, .. } => Some(*name),
            Kind::Other => declared(&module, item.tokens.start),
        })
        .collect();
    let (mut out, mut from) = (String::with_capacity(text.len() + 256), 0);
    for (i, token) in module.tokens.iter().enumerate() {
        if names.contains(token.text) && module.is_name(i) {
            out.push_str(&text[from..token.end()]);
            out.push_str(suffix);
            from = token.end();
        }
    }
    out.push_str(&text[from..]);
    out
}

/// The name of a structure or private variable.
fn declared<'a>(module: &Module<'a>, first: usize) -> Option<&'a str> {
    match (module.word(first), module.word(first + 1)) {
        ("struct", name) => Some(name),
        ("var", "<") => Some(module.word(first + 4)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_text_declares_is_numbered_and_nothing_else() {
        let text = "
            const N: u32 = 4u; // N of them
            alias E = vec4<f32>;
            struct Block { at: u32 }
            var<private> kept: E;
            fn helper(v: Block) -> u32 { return v.at + N + x_quad(0u); }
            fn share(col: u32) -> E { var w: Block; w.at = helper(w); kept = E(); return kept; }";
        let numbered = suffixed(text, "_1");
        for part in [
            "const N_1: u32 = 4u; // N of them",
            "alias E_1 = vec4<f32>;",
            "struct Block_1 { at: u32 }",
            "var<private> kept_1: E_1;",
            "fn helper_1(v: Block_1) -> u32 { return v.at + N_1 + x_quad(0u); }",
            "{ var w: Block_1; w.at = helper_1(w); kept_1 = E_1(); return kept_1; }",
        ] {
            assert!(numbered.contains(part), "{part} in {numbered}");
        }
        assert_eq!(suffixed("fn f() -> f32 { return g(); }", "_0"), "fn f_0() -> f32 { return g(); }");
    }
}
