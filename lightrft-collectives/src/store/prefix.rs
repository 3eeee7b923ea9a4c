//! A part of a store: every key gets a prefix in front, as torch's PrefixStore writes it

use std::sync::Arc;
use std::time::Duration;

use super::Store;
use crate::error::Result;

/// A [`Store`] within another: its key `key` is the key `prefix/key` there. Prefixes nest.
///
/// ```
/// use std::sync::Arc;
/// use lightrft_collectives::store::{MemoryStore, PrefixStore, Store};
///
/// let store = Arc::new(MemoryStore::new());
/// let engine = PrefixStore::new("engine", store.clone());
/// engine.set("version", b"3")?;
/// assert!(store.check(&["engine/version"])?);
/// assert_eq!(engine.list_keys()?, ["version"]);
/// # Ok::<_, lightrft_collectives::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PrefixStore {
    prefix: String,
    store: Arc<dyn Store>,
}

impl PrefixStore {
    /// The part of `store` under `prefix`.
    pub fn new(prefix: impl Into<String>, store: Arc<dyn Store>) -> Self {
        PrefixStore { prefix: prefix.into(), store }
    }

    /// The store that this is a part of.
    pub fn inner(&self) -> &Arc<dyn Store> {
        &self.store
    }

    fn key(&self, key: &str) -> String {
        format!("{}/{key}", self.prefix)
    }

    /// Calls `call` with the keys as the inner store knows them.
    fn with_keys<R>(&self, keys: &[&str], call: impl FnOnce(&[&str]) -> R) -> R {
        let keys: Vec<String> = keys.iter().map(|key| self.key(key)).collect();
        call(&keys.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

impl Store for PrefixStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.store.set(&self.key(key), value)
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        self.store.get(&self.key(key), timeout)
    }

    fn add(&self, key: &str, delta: i64) -> Result<i64> {
        self.store.add(&self.key(key), delta)
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        self.store.compare_set(&self.key(key), expected, desired)
    }

    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        self.store.append(&self.key(key), value)
    }

    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        self.with_keys(keys, |keys| self.store.wait(keys, timeout))
    }

    fn check(&self, keys: &[&str]) -> Result<bool> {
        self.with_keys(keys, |keys| self.store.check(keys))
    }

    fn delete(&self, key: &str) -> Result<bool> {
        self.store.delete(&self.key(key))
    }

    /// Counts the keys under the prefix alone, where torch's counts those of the whole store.
    fn num_keys(&self) -> Result<usize> {
        self.list_keys().map(|keys| keys.len())
    }

    fn list_keys(&self) -> Result<Vec<String>> {
        let own = self.key("");
        let all = self.store.list_keys()?;
        Ok(all.into_iter().filter_map(|key| key.strip_prefix(&own).map(str::to_owned)).collect())
    }

    fn multi_get(&self, keys: &[&str], timeout: Duration) -> Result<Vec<Vec<u8>>> {
        self.with_keys(keys, |keys| self.store.multi_get(keys, timeout))
    }

    fn multi_set(&self, pairs: &[(&str, &[u8])]) -> Result<()> {
        let pairs: Vec<(String, &[u8])> = pairs.iter().map(|(key, value)| (self.key(key), *value)).collect();
        self.store.multi_set(&pairs.iter().map(|(key, value)| (key.as_str(), *value)).collect::<Vec<_>>())
    }

    fn queue_push(&self, queue: &str, value: &[u8]) -> Result<()> {
        self.store.queue_push(&self.key(queue), value)
    }

    fn queue_pop(&self, queue: &str, timeout: Duration) -> Result<Vec<u8>> {
        self.store.queue_pop(&self.key(queue), timeout)
    }

    fn queue_len(&self, queue: &str) -> Result<usize> {
        self.store.queue_len(&self.key(queue))
    }

    fn barrier(&self, name: &str, world_size: usize, timeout: Duration) -> Result<()> {
        self.store.barrier(&self.key(name), world_size, timeout)
    }
}
