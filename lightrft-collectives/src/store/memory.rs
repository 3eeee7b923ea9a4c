//! A store for the threads of one process

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Store;
use super::table::Table;
use super::wire::{MAX_KEY, MAX_KEYS, MAX_VALUE, check_length};
use crate::error::{Error, Result};

/// A [`Store`] in this process's memory.
#[derive(Debug, Default)]
pub struct MemoryStore {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    table: Table,
    /// Those that somebody waits at.
    barriers: HashMap<String, Arc<Barrier>>,
}

/// Looked at under the store's lock alone.
#[derive(Debug, Default)]
struct Barrier {
    arrived: AtomicUsize,
    passed: AtomicBool,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the table and wakes whoever waits.
    fn change<R>(&self, change: impl FnOnce(&mut Table) -> R) -> R {
        let result = change(&mut self.lock().table);
        self.changed.notify_all();
        result
    }

    /// Waits until `done` gives something. At the deadline it is asked once more, with nobody in between.
    fn wait_until<R>(
        &self,
        mut inner: MutexGuard<'_, Inner>,
        keys: &[&str],
        timeout: Duration,
        mut done: impl FnMut(&mut Inner) -> Option<R>,
    ) -> Result<R> {
        let begin = Instant::now();
        loop {
            if let Some(result) = done(&mut inner) {
                return Ok(result);
            }
            let rest = timeout.saturating_sub(begin.elapsed());
            if rest.is_zero() {
                let keys = keys.iter().map(ToString::to_string).collect();
                return Err(Error::StoreTimeout { store: "memory".into(), keys, waited: timeout });
            }
            inner = self.changed.wait_timeout(inner, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn refused(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Store { store: "memory".into(), doing, source: Arc::new(source) }
}

/// The limits of a server: what works here works there.
fn check(doing: &'static str, keys: &[&str], values: &[&[u8]]) -> Result<()> {
    let all = || {
        check_length("list of keys", keys.len(), MAX_KEYS)?;
        keys.iter().try_for_each(|key| check_length("key", key.len() + 1, MAX_KEY))?;
        values.iter().try_for_each(|value| check_length("value", value.len(), MAX_VALUE))
    };
    all().map_err(refused(doing))
}

impl Store for MemoryStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        check("set", &[key], &[value])?;
        self.change(|table| table.set(key.as_bytes(), value));
        Ok(())
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        let values = self.multi_get(&[key], timeout)?;
        Ok(values.into_iter().next().unwrap_or_default())
    }

    fn add(&self, key: &str, delta: i64) -> Result<i64> {
        check("add", &[key], &[])?;
        Ok(self.change(|table| table.add(key.as_bytes(), delta)))
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        check("compare_set", &[key], &[expected, desired])?;
        Ok(self.change(|table| table.compare_set(key.as_bytes(), expected, desired)))
    }

    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        check("append", &[key], &[value])?;
        if self.change(|table| table.append(key.as_bytes(), value)) {
            return Ok(());
        }
        let longer = format!("`{key}` would be longer than {MAX_VALUE} bytes");
        Err(refused("append")(io::Error::new(io::ErrorKind::InvalidInput, longer)))
    }

    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        check("wait", keys, &[])?;
        self.wait_until(self.lock(), keys, timeout, |inner| inner.table.has_all(keys).then_some(()))
    }

    fn check(&self, keys: &[&str]) -> Result<bool> {
        check("check", keys, &[])?;
        Ok(self.lock().table.has_all(keys))
    }

    fn delete(&self, key: &str) -> Result<bool> {
        check("delete", &[key], &[])?;
        Ok(self.change(|table| table.delete(key.as_bytes())))
    }

    fn num_keys(&self) -> Result<usize> {
        Ok(self.lock().table.len())
    }

    fn list_keys(&self) -> Result<Vec<String>> {
        Ok(self.lock().table.keys().map(|key| String::from_utf8_lossy(key).into()).collect())
    }

    fn multi_get(&self, keys: &[&str], timeout: Duration) -> Result<Vec<Vec<u8>>> {
        check("get", keys, &[])?;
        self.wait_until(self.lock(), keys, timeout, |inner| {
            let table = &inner.table;
            let value = |key: &&str| table.value(key.as_bytes()).unwrap_or_default().to_vec();
            table.has_all(keys).then(|| keys.iter().map(value).collect())
        })
    }

    fn multi_set(&self, pairs: &[(&str, &[u8])]) -> Result<()> {
        let (keys, values): (Vec<&str>, Vec<&[u8]>) = pairs.iter().copied().unzip();
        check("multi_set", &keys, &values)?;
        self.change(|table| pairs.iter().for_each(|(key, value)| table.set(key.as_bytes(), value)));
        Ok(())
    }

    fn queue_push(&self, queue: &str, value: &[u8]) -> Result<()> {
        check("queue_push", &[queue], &[value])?;
        self.change(|table| table.queue_push(queue.as_bytes(), value));
        Ok(())
    }

    fn queue_pop(&self, queue: &str, timeout: Duration) -> Result<Vec<u8>> {
        check("queue_pop", &[queue], &[])?;
        self.wait_until(self.lock(), &[queue], timeout, |inner| inner.table.queue_pop(queue.as_bytes()))
    }

    fn queue_len(&self, queue: &str) -> Result<usize> {
        check("queue_len", &[queue], &[])?;
        Ok(self.lock().table.queue_len(queue.as_bytes()))
    }

    fn barrier(&self, name: &str, world_size: usize, timeout: Duration) -> Result<()> {
        check("barrier", &[name], &[])?;
        let mut inner = self.lock();
        let barrier = inner.barriers.entry(name.to_owned()).or_default().clone();
        if barrier.arrived.fetch_add(1, Relaxed) + 1 >= world_size {
            barrier.passed.store(true, Relaxed);
            // Who comes next comes to a new one.
            inner.barriers.remove(name);
            self.changed.notify_all();
            return Ok(());
        }
        let result = self.wait_until(inner, &[name], timeout, |_| barrier.passed.load(Relaxed).then_some(()));
        if result.is_err() {
            let mut inner = self.lock();
            // It may have been passed since.
            if barrier.passed.load(Relaxed) {
                return Ok(());
            }
            // Who gave up does not count for those who still wait, or come later.
            if barrier.arrived.fetch_sub(1, Relaxed) == 1 {
                inner.barriers.remove(name);
            }
        }
        result
    }
}
