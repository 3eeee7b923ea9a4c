//! Rules for one Rust file: its first line, unsafe code, unfinished code, tests that never run.

use super::Problem;
use crate::source::{code_only, lines_with_word};

/// The only places where `unsafe` may appear; a name that ends with `/` is a folder. Each is small, each block in it
/// says why it is sound, and whoever adds a place here has to defend it.
const UNSAFE_FENCES: [&str; 15] = [
    "lightrft-collectives/src/device.rs",
    "lightrft-collectives/src/flight/memory.rs",
    "lightrft-collectives/src/host/segment.rs",
    "lightrft-collectives/src/launch/child.rs",
    "lightrft-collectives/src/host/shm/",
    "lightrft-collectives/src/nccl/",
    "lightrft-collectives/src/reduce/simd.rs",
    "lightrft-engine/src/embedded/cpu/simd/",
    // Kernels and foreign calls over the GPU's memory.
    "lightrft-engine/src/embedded/gpu/",
    "lightrft-engine/src/shared/mapping.rs",
    "lightrft-sharding/src/optim/simd.rs",
    "lightrft-sharding/src/cuda/",
    // Tests that count what the allocator hands out.
    "lightrft-ckpt/tests/export_memory.rs",
    "lightrft-sharding/tests/memory.rs",
    // A model for tests that launches kernels.
    "lightrft-sharding/tests/gpu_units/chain.rs",
];

/// Checks one file; `path` is relative to the root.
pub(crate) fn check(path: &str, text: &str) -> Vec<Problem> {
    let code = code_only(text);
    let mut problems = Vec::new();
    if !text.starts_with("//! ") {
        problems.push(Problem::new(path, 1, "the first line must be `//! ` and say what the file is for"));
    }
    if !is_fenced(path) {
        problems.extend(lines_with_word(&code, "unsafe").into_iter().map(|line| {
            Problem::new(path, line, "`unsafe` outside the fenced files (the list is in xtask's tidy)")
        }));
    }
    problems.extend(unfinished(path, text, &code));
    problems.extend(ignored_without_reason(path, text, &code));
    problems
}

fn is_fenced(path: &str) -> bool {
    UNSAFE_FENCES.iter().any(|fence| path == *fence || fence.ends_with('/') && path.starts_with(fence))
}

/// What is not done is an issue in the tracker, not a panic in a user's run.
fn unfinished(path: &str, text: &str, code: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    for name in ["todo", "unimplemented"] {
        for line in lines_with_word(code, name) {
            // The lints of the same names are settings, not calls.
            if code.lines().nth(line - 1).is_some_and(|l| l.contains(&format!("{name}!"))) {
                problems.push(Problem::new(
                    path,
                    line,
                    format!("`{name}!`: a user would meet it as a panic"),
                ));
            }
        }
    }
    // In two parts, so that this file does not break its own rule.
    for mark in [concat!("FIX", "ME"), concat!("TO", "DO"), concat!("XX", "X")] {
        for line in lines_with_word(text, mark) {
            problems.push(Problem::new(path, line, format!("a note `{mark}`: do it, or open an issue")));
        }
    }
    problems
}

/// A test that is switched off says why, or nobody will ever switch it on again.
fn ignored_without_reason(path: &str, text: &str, code: &str) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (at, _) in code.match_indices("ignore") {
        let before = code[..at].trim_end();
        let line_start = before.rfind('\n').map_or(0, |n| n + 1);
        let in_cfg_attr = before.ends_with(',') && before[line_start..].contains("cfg_attr");
        if !(before.ends_with("#[") || in_cfg_attr) {
            continue;
        }
        let after = text[at + "ignore".len()..].trim_start();
        let reason = after.strip_prefix('=').map(str::trim_start).and_then(|r| r.strip_prefix('"'));
        if !reason.is_some_and(|r| !r.trim_start().is_empty() && !r.starts_with('"')) {
            let line = code[..at].matches('\n').count() + 1;
            problems.push(Problem::new(
                path,
                line,
                "an ignored test must give its reason: #[ignore = \"…\"]",
            ));
        }
    }
    problems
}

/// The text before the file's unit tests, which stand at its end.
pub(crate) fn without_unit_tests(text: &str) -> &str {
    let start = text.match_indices("#[cfg(test)]").find(|(at, mark)| {
        let next = text[at + mark.len()..].trim_start();
        next.starts_with("mod ") && next.lines().next().is_some_and(|line| line.contains('{'))
    });
    start.map_or(text, |(at, _)| &text[..at])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<(usize, String)> {
        let found = check("lightrft-data/src/a.rs", text);
        found.into_iter().map(|problem| (problem.line, problem.what)).collect()
    }

    #[track_caller]
    fn one_problem_at(line: usize, text: &str) {
        let found = problems(text);
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        assert_eq!(found[0].0, line, "{text}: {found:?}");
    }

    #[track_caller]
    fn no_problem(text: &str) {
        let found = problems(text);
        assert!(found.is_empty(), "{text}: {found:?}");
    }

    #[test]
    fn a_file_begins_by_saying_what_it_is_for() {
        no_problem("//! What it is for.\n");
        one_problem_at(1, "use std::fs;\n");
        one_problem_at(1, "//!\n//! Late.\n");
        one_problem_at(1, "");
    }

    #[test]
    fn unsafe_code_stays_inside_its_fences() {
        let text = "//! A.\nlet x = unsafe { f() };";
        one_problem_at(2, text);
        no_problem("//! A.\n#![deny(unsafe_code)]\n// unsafe\nlet x = \"unsafe\";");
        assert!(check("lightrft-collectives/src/nccl/raw.rs", text).is_empty());
        assert!(check("lightrft-collectives/src/host/segment.rs", text).is_empty());
        assert!(!check("lightrft-collectives/src/host/shm_other.rs", text).is_empty());
        assert!(!check("lightrft-collectives/src/host/segment.rs/x.rs", text).is_empty());
    }

    #[test]
    fn unfinished_code_is_refused() {
        one_problem_at(2, concat!("//! A.\nto", "do!()"));
        one_problem_at(2, concat!("//! A.\nunimpl", "emented!(\"later\")"));
        one_problem_at(2, concat!("//! A.\n// FIX", "ME: later"));
        one_problem_at(2, concat!("//! A.\n// TO", "DO later"));
        no_problem(concat!("//! A.\n#![warn(clippy::to", "do)] // to", "do!() is text here"));
    }

    #[test]
    fn an_ignored_test_gives_its_reason() {
        one_problem_at(3, "//! A.\n#[test]\n#[ignore]\nfn t() {}");
        one_problem_at(2, "//! A.\n#[ignore = \"\"]");
        one_problem_at(2, "//! A.\n#[cfg_attr(debug_assertions, ignore)]");
        no_problem("//! A.\n#[ignore = \"takes an hour\"]\n#[cfg_attr(miri, ignore = \"too slow\")]");
        no_problem("//! A.\nlet ignore = f(ignore);\n// #[ignore]");
    }

    #[test]
    fn unit_tests_are_cut_off_at_their_module() {
        assert_eq!(without_unit_tests("a\n#[cfg(test)]\nmod tests {\n}\n"), "a\n");
        let text = "a\n#[cfg(test)]\nuse b;\n#[cfg(test)]\nmod elsewhere;\nc";
        assert_eq!(without_unit_tests(text), text);
    }
}
