//! Reads the HLSL and MSL that naga makes of a kernel, for what keeps a compiler from holding variables in registers: an
//! index, into a variable of a function, that is no literal. FXC does not compile stores to a component of a vector or
//! matrix with such an index unless it can unroll the loop around them, and puts arrays into memory; so does Metal. (To
//! read a component of one vector is fine: compilers select it.)

use std::collections::HashSet;
use std::ops::Range;

use throughline::kernel::Kernel;
use wgpu::naga;
use wgpu::naga::back::{hlsl, msl};
use wgpu::naga::valid::{Capabilities, ValidationFlags, Validator};

/// Such indices, each with the function that has it.
pub fn varying_indices(kernel: &Kernel) -> Vec<String> {
    let wgsl = kernel.wgsl().unwrap();
    let module = naga::front::wgsl::parse_str(&wgsl).unwrap();
    let info = Validator::new(ValidationFlags::all(), Capabilities::all()).validate(&module).unwrap();
    let entry = Some((naga::ShaderStage::Compute, kernel.entry.to_string()));

    // As wgpu writes kernels that run without checks.
    let (mut text, mut found) = (String::new(), vec![]);
    let options = hlsl::Options {
        shader_model: hlsl::ShaderModel::V5_1, // FXC's last
        fake_missing_bindings: true,
        restrict_indexing: false,
        force_loop_bounding: false,
        ..hlsl::Options::default()
    };
    // No version of DX12 that wgpu uses has cooperative matrices.
    if !wgsl.starts_with("enable wgpu_cooperative_matrix") {
        let options_of_pipeline = hlsl::PipelineOptions { entry_point: entry.clone() };
        hlsl::Writer::new(&mut text, &options, &options_of_pipeline).write(&module, &info, None).unwrap();
        found.extend(Text::new(&text).varying_indices().into_iter().map(|index| format!("HLSL: {index}")));
    }
    let options = msl::Options {
        lang_version: (2, 4),
        fake_missing_bindings: true,
        force_loop_bounding: false,
        ..msl::Options::default()
    };
    let options_of_pipeline = msl::PipelineOptions { entry_point: entry, ..msl::PipelineOptions::default() };
    let (text, _) = msl::write_string(&module, &info, &options, &options_of_pipeline).unwrap();
    found.extend(Text::new(&text).varying_indices().into_iter().map(|index| format!("MSL: {index}")));
    found
}

/// A text in HLSL or MSL.
struct Text<'a> {
    /// Words and punctuation characters.
    tokens: Vec<&'a str>,
    /// Names of what lies in memory anyway: all that is declared outside of functions, and in MSL their parameters in
    /// an address space.
    memory: HashSet<&'a str>,
}

impl<'a> Text<'a> {
    fn new(text: &'a str) -> Self {
        let tokens: Vec<&str> = text.lines().flat_map(|line| tokens(line.split("//").next().unwrap())).collect();
        let mut memory = HashSet::new();
        let (mut braces, mut parentheses) = (0, 0);
        for (i, &token) in tokens.iter().enumerate() {
            match token {
                "{" => braces += 1,
                "}" => braces -= 1,
                "(" => parentheses += 1,
                ")" => parentheses -= 1,
                "threadgroup" | "device" | "constant" => {
                    let end = (i..tokens.len()).find(|&i| [",", ")", "[", "=", ";"].contains(&tokens[i])).unwrap();
                    memory.insert(tokens[end - 1]);
                }
                name if braces == 0 && parentheses == 0 && is_word(name) => drop(memory.insert(name)),
                _ => {}
            }
        }
        Text { tokens, memory }
    }

    fn varying_indices(&self) -> Vec<String> {
        let (mut found, mut function, mut vectors) = (vec![], "", HashSet::new());
        let (mut braces, mut parentheses) = (0, 0);
        for i in 1..self.tokens.len() {
            let (before, token) = (self.tokens[i - 1], self.tokens[i]);
            match token {
                "{" => braces += 1,
                "}" => braces -= 1,
                "(" => parentheses += 1,
                ")" => parentheses -= 1,
                _ => {}
            }
            if braces == 0 && parentheses == 1 && token == "(" {
                (function, vectors) = (before, HashSet::new());
            }
            if is_vector(before) && self.tokens[i + 1] != "[" {
                vectors.insert(token);
            }
            if braces == 0 || before == "." || !(is_word(token) || token == ")") || self.memory.contains(token) {
                continue;
            }
            let (end, indices) = self.chain(i);
            let varying = indices.iter().any(|index| index.len() != 1 || !is_number(self.tokens[index.start]));
            let store = self.tokens[end] == "=" && self.tokens[end + 1] != "=";
            let component = vectors.contains(token) && !store;
            if varying && !component {
                let store = if store { " =" } else { "" };
                found.push(format!("`{}{store}` in `{function}`", self.tokens[i..end].concat()));
            }
        }
        found
    }

    /// Where an expression such as `a.b[i][0]` ends that starts at token `i`, and its indices.
    fn chain(&self, i: usize) -> (usize, Vec<Range<usize>>) {
        let (mut at, mut indices) = (i + 1, vec![]);
        loop {
            match self.tokens.get(at) {
                Some(&".") => at += 2,
                Some(&"[") => {
                    let close = self.closing(at);
                    indices.push(at + 1..close);
                    at = close + 1;
                }
                _ => return (at, indices),
            }
        }
    }

    fn closing(&self, open: usize) -> usize {
        let mut depth = 0;
        let closes = |&i: &usize| {
            depth += i32::from(self.tokens[i] == "[") - i32::from(self.tokens[i] == "]");
            depth == 0
        };
        (open..self.tokens.len()).find(closes).unwrap()
    }
}

fn tokens(line: &str) -> impl Iterator<Item = &str> {
    let mut rest = line.trim_start();
    std::iter::from_fn(move || {
        let first = rest.chars().next()?;
        let word = |c: char| c.is_alphanumeric() || c == '_';
        let end = if word(first) { rest.find(|c| !word(c)).unwrap_or(rest.len()) } else { first.len_utf8() };
        let (token, after) = rest.split_at(end);
        rest = after.trim_start();
        Some(token)
    })
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Whether it is a type such as `float4` and `uint2`.
fn is_vector(token: &str) -> bool {
    ["float", "half", "uint", "int", "bool"].iter().any(|scalar| {
        let lanes = token.strip_prefix(scalar);
        lanes.is_some_and(|lanes| ["2", "3", "4"].contains(&lanes))
    })
}

fn is_number(token: &str) -> bool {
    token.trim_end_matches('u').parse::<u32>().is_ok()
}
