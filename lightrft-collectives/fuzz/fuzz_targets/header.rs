//! Any bytes at `fuzzing::header`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lightrft_collectives::fuzzing::header(bytes));
