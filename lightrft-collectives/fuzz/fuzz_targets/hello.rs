//! Any bytes at `fuzzing::hello`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lightrft_collectives::fuzzing::hello(bytes));
