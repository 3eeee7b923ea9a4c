//! Any bytes at `fuzzing::json_lines`
#![no_main]

#[path = "../../tests/fuzzing/mod.rs"]
#[allow(dead_code)]
mod fuzzing;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::json_lines(bytes));
