//! Units on GPUs do what units on the host do: `cargo xtask gpu test [N]` runs these on N GPUs
//!
//! A test named `gpus_…` or `two_gpus_…` starts this program once per GPU, with the name of the test below it that is the
//! rank's part. On a machine with too few GPUs they fail: a GPU test that is skipped has tested nothing.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod chain;
mod memory;
mod order;
mod refusals;
mod support;
mod training;
