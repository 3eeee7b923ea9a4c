//! Any bytes at `fuzzing::signature`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lightrft_collectives::fuzzing::signature(bytes));
