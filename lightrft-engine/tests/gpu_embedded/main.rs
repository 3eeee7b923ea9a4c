//! The embedded engine on a GPU does what it does on the CPU: `cargo xtask gpu test`
//!
//! On a machine without GPUs these tests fail: a GPU test that is skipped has tested nothing.
#![cfg(all(feature = "cuda", feature = "embedded"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod memory;
mod same;
mod speed;
mod support;

use lightrft_engine::Error;
use lightrft_engine::embedded::{Device, EmbeddedEngine, Settings};

#[test]
fn without_a_driver_or_such_a_device_there_is_an_error_that_says_so() {
    let settings = Settings { device: Device::Cuda(4096), ..Settings::default() };
    let error = EmbeddedEngine::without_weights(support::config(), settings).unwrap_err();
    assert!(matches!(error, Error::Gpu { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("driver") && text.contains("Device::Cpu"), "{text}");
}
