//! Any bytes at `fuzzing::vllm_listings`
#![no_main]

#[path = "../../tests/fuzzing/mod.rs"]
mod fuzzing;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::vllm_listings(bytes));
