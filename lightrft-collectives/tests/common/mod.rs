//! What the heavy tests share: schedules drawn from a seed, their oracle, and ranks as processes
#![allow(dead_code)] // Each test binary takes a part of it.

pub(crate) mod faults;
pub(crate) mod oracle;
pub(crate) mod perform;
pub(crate) mod place;
pub(crate) mod processes;
pub(crate) mod random;
pub(crate) mod schedule;
