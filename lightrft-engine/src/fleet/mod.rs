//! Data-parallel engines: replicas of one model behind one handle, which is an engine itself.
//!
//! ```text
//! requests ─► cut and dealt by length ─► replica 0 ─┐
//!                                      ► replica 1 ─┼─► completions in the order of requests and samples
//!                                      ► replica 2 ✝│   what a dead one leaves is dealt again to the living
//!                                           │
//! weights  ─► every bucket to every replica ┘ restarted before the next update, or before the next call of generate
//!                                             where its weights can be had
//! ```
//!
//! | file | what is in it |
//! |---|---|
//! | `deal.rs` | which replica takes which samples: numbers alone |
//! | `engine.rs` | the handle, and the seam's calls but the next two |
//! | `generate.rs` | rounds of generation, until every sample is there |
//! | `update.rs` | one update of all replicas |
//! | `replica.rs` | a replica and its record, its state among others', its restart |
//! | `threads.rs` | one call on every replica at once, panics caught |

mod deal;
mod engine;
mod generate;
mod replica;
mod threads;
mod update;

pub use engine::DataParallel;
pub use replica::{Replica, ReplicaEvent, Restarts, Service};
