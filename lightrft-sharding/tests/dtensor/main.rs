//! Distributed tensors: torch's shapes and offsets, laws of layouts and of redistribution, views of units, refusals.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod golden;
mod layouts;
mod partial;
mod redistribute;
mod refusals;
mod support;
mod views;
