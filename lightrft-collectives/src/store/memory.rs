//! A store for the threads of one process

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Store;
use super::table::Table;
use crate::error::{Error, Result};

/// A [`Store`] in this process's memory.
#[derive(Debug, Default)]
pub struct MemoryStore {
    table: Mutex<Table>,
    changed: Condvar,
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the table and wakes whoever waits.
    fn change<R>(&self, change: impl FnOnce(&mut Table) -> R) -> Result<R> {
        let result = change(&mut self.table());
        self.changed.notify_all();
        Ok(result)
    }

    fn wait_for(&self, keys: &[&str], timeout: Duration) -> Result<MutexGuard<'_, Table>> {
        let begin = Instant::now();
        let mut table = self.table();
        while !table.has_all(keys) {
            let rest = timeout.saturating_sub(begin.elapsed());
            if rest.is_zero() {
                let keys = keys.iter().map(ToString::to_string).collect();
                return Err(Error::StoreTimeout { store: "memory".into(), keys, waited: timeout });
            }
            table = self.changed.wait_timeout(table, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(table)
    }
}

impl Store for MemoryStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.change(|table| table.set(key.as_bytes(), value))
    }

    fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        let table = self.wait_for(&[key], timeout)?;
        Ok(table.value(key.as_bytes()).unwrap_or_default().to_vec())
    }

    fn add(&self, key: &str, delta: i64) -> Result<i64> {
        self.change(|table| table.add(key.as_bytes(), delta))
    }

    fn compare_set(&self, key: &str, expected: &[u8], desired: &[u8]) -> Result<Vec<u8>> {
        self.change(|table| table.compare_set(key.as_bytes(), expected, desired))
    }

    fn append(&self, key: &str, value: &[u8]) -> Result<()> {
        self.change(|table| table.append(key.as_bytes(), value))
    }

    fn wait(&self, keys: &[&str], timeout: Duration) -> Result<()> {
        self.wait_for(keys, timeout).map(drop)
    }

    fn check(&self, keys: &[&str]) -> Result<bool> {
        Ok(self.table().has_all(keys))
    }

    fn delete(&self, key: &str) -> Result<bool> {
        self.change(|table| table.delete(key.as_bytes()))
    }
}
