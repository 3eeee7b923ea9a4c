//! The store through which ranks find each other: a small key-value service with waiting
//!
//! [`TcpStore`] speaks the wire protocol of torch's TCPStore, both ways: torch's clients may use [`StoreServer`],
//! and ranks started by `torchrun` use the store of its agent. [`MemoryStore`] serves the threads of one process.
//! [`PrefixStore`] is a part of another store, for one of several users.

mod client;
mod connection;
#[cfg(feature = "testing")]
pub(crate) mod fuzzing;
mod memory;
mod prefix;
mod server;
mod session;
mod strict;
mod table;
mod wire;

use std::fmt;
use std::time::Duration;

pub use self::client::TcpStore;
pub use self::memory::MemoryStore;
pub use self::prefix::PrefixStore;
pub use self::server::StoreServer;
use crate::error::Result;

/// A key-value service shared by all ranks of a job.
///
/// Keys are text, values bytes. A key once set stays until deleted. What a call has changed when it returns, every later
/// call of any rank sees. Queues have names of their own, but [`wait`](Store::wait) and [`check`](Store::check) take a
/// queue that holds something for a key that is set.
///
/// # Errors
///
/// [`Error::StoreTimeout`] at the end of a call's `timeout`. [`Error::Store`] for a key of more than 8 KiB, a value of
/// more than 8 MiB or a list of more than 131072 keys, which are torch's limits; and for [`TcpStore`] if the server does
/// not answer within 30 s, or not in its protocol.
///
/// [`Error::StoreTimeout`]: crate::Error::StoreTimeout
/// [`Error::Store`]: crate::Error::Store
#[allow(clippy::missing_errors_doc)] // Above, once for all.
pub trait Store: fmt::Debug + Send + Sync {
    /// Sets a key, replacing its value.
    fn set(&self, key: &str, value: &[u8]) -> Result<()>;

    /// The value of a key, waiting until it is set.
    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>>;

    /// Adds to a key that holds a number as decimal text (a missing key, or other text, counts as 0) and returns the sum.
    fn add(&self, key: &str, delta: i64) -> Result<i64>;

    /// Sets a key to `desired` if it holds `expected`, or if it is missing and `expected` is empty. Returns what the key
    /// holds now; for a key that stays missing, `expected`.
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>>;

    /// Appends to the value of a key.
    fn append(&self, key: &str, value: &[u8]) -> Result<()>;

    /// Waits until all keys are set.
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()>;

    /// Whether all keys are set now.
    fn check(&self, keys: &[&str]) -> Result<bool>;

    /// Deletes a key; whether it was there.
    fn delete(&self, key: &str) -> Result<bool>;

    /// Number of keys. A torch server counts one more once clients have counted themselves with it.
    fn num_keys(&self) -> Result<usize>;

    /// All keys, in the order of their bytes. Queues are not among them.
    fn list_keys(&self) -> Result<Vec<String>>;

    /// The values of several keys, waiting until all are set.
    fn multi_get(&self, keys: &[&str], timeout: Duration) -> Result<Vec<Vec<u8>>>;

    /// Sets several keys at once: nobody sees some of them set and others not.
    fn multi_set(&self, pairs: &[(&str, &[u8])]) -> Result<()>;

    /// Puts a value at the end of a queue, which is made if it does not exist.
    fn queue_push(&self, queue: &str, value: &[u8]) -> Result<()>;

    /// Takes the value at the head of a queue, waiting for one. A `timeout` of zero takes what is there now.
    fn queue_pop(&self, queue: &str, timeout: Duration) -> Result<Vec<u8>>;

    /// Number of values in a queue; 0 if it does not exist.
    fn queue_len(&self, queue: &str) -> Result<usize>;

    /// Waits until `world_size` callers have come to the barrier of this name, which can then be used again.
    fn barrier(&self, name: &str, world_size: usize, timeout: Duration) -> Result<()>;
}
