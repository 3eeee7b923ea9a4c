//! Any bytes at `fuzzing::store_requests`
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| lightrft_collectives::fuzzing::store_requests(bytes));
