//! The store through which ranks find each other: a small key-value service with waiting
//!
//! [`TcpStore`] speaks the wire protocol of torch's TCPStore, both ways: torch's clients may use [`StoreServer`],
//! and ranks started by `torchrun` use the store of its agent. [`MemoryStore`] serves the threads of one process.

mod client;
mod memory;
mod server;
mod table;
mod wire;

use std::fmt;
use std::time::Duration;

pub use self::client::TcpStore;
pub use self::memory::MemoryStore;
pub use self::server::StoreServer;
use crate::error::Result;

/// A key-value service shared by all ranks of a job.
///
/// Keys are text, values bytes. A key once set stays until deleted. [`Error::StoreTimeout`](crate::Error::StoreTimeout)
/// and, for [`TcpStore`], [`Error::Store`](crate::Error::Store) are the only errors.
pub trait Store: fmt::Debug + Send + Sync {
    /// Sets a key, replacing its value.
    ///
    /// # Errors
    /// See [`Store`].
    fn set(&self, key: &str, value: &[u8]) -> Result<()>;

    /// The value of a key, waiting until it is set.
    ///
    /// # Errors
    /// See [`Store`].
    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>>;

    /// Adds to a key that holds a number as decimal text (a missing key holds 0) and returns the sum.
    ///
    /// # Errors
    /// See [`Store`].
    fn add(&self, key: &str, delta: i64) -> Result<i64>;

    /// Sets a key to `desired` if it holds `expected`, or if it is missing and `expected` is empty. Returns what the key
    /// holds now; for a key that stays missing, `expected`.
    ///
    /// # Errors
    /// See [`Store`].
    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>>;

    /// Appends to the value of a key.
    ///
    /// # Errors
    /// See [`Store`].
    fn append(&self, key: &str, value: &[u8]) -> Result<()>;

    /// Waits until all keys are set.
    ///
    /// # Errors
    /// See [`Store`].
    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()>;

    /// Whether all keys are set now.
    ///
    /// # Errors
    /// See [`Store`].
    fn check(&self, keys: &[&str]) -> Result<bool>;

    /// Deletes a key; whether it was there.
    ///
    /// # Errors
    /// See [`Store`].
    fn delete(&self, key: &str) -> Result<bool>;
}
