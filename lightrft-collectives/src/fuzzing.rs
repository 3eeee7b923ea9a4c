//! Readers of bytes that come from outside this process, for the fuzz targets and the inputs that they have found
//!
//! Each function takes any bytes. It panics if a reader breaks its word; a reader that panics, or takes memory or time without
//! bound, is found by whoever calls.

pub use crate::host::fuzzing::{header, hello, notes, signature};
pub use crate::store::fuzzing::{store_replies, store_requests};
