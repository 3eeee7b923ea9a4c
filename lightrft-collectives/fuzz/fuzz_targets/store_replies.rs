//! Any bytes at `fuzzing::store_replies`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lightrft_collectives::fuzzing::store_replies(bytes));
