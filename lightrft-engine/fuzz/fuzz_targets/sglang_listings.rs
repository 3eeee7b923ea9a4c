//! Any bytes at `fuzzing::sglang_listings`
#![no_main]

#[path = "../../tests/fuzzing/mod.rs"]
mod fuzzing;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::sglang_listings(bytes));
