//! Servers for tests of drivers: what they are asked is remembered, what they answer can be changed.

pub(crate) mod http;
pub(crate) mod vllm;
