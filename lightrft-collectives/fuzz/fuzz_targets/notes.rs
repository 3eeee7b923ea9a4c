//! Any bytes at `fuzzing::notes`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lightrft_collectives::fuzzing::notes(bytes));
