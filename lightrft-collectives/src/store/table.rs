//! What a store holds and what each operation does to it; pure, shared by the memory store and the server

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::wire::MAX_VALUE;

/// Keys and queues.
#[derive(Debug, Default)]
pub(super) struct Table {
    values: BTreeMap<Vec<u8>, Vec<u8>>,
    queues: HashMap<Vec<u8>, VecDeque<Vec<u8>>>,
}

impl Table {
    pub(super) fn set(&mut self, key: &[u8], value: &[u8]) {
        self.values.insert(key.to_vec(), value.to_vec());
    }

    pub(super) fn value(&self, key: &[u8]) -> Option<&[u8]> {
        self.values.get(key).map(Vec::as_slice)
    }

    /// Text that is no number counts as 0, and a sum that does not fit wraps around: neither may stop a server.
    pub(super) fn add(&mut self, key: &[u8], delta: i64) -> i64 {
        let text = self.values.get(key).and_then(|v| std::str::from_utf8(v).ok());
        let sum = text.and_then(|t| t.trim().parse::<i64>().ok()).unwrap_or(0).wrapping_add(delta);
        self.set(key, sum.to_string().as_bytes());
        sum
    }

    /// What the key holds afterwards (`expected` if it stays missing).
    pub(super) fn compare_set(&mut self, key: &[u8], expected: &[u8], desired: &[u8]) -> Vec<u8> {
        match self.values.get(key) {
            None if !expected.is_empty() => return expected.to_vec(),
            Some(held) if held != expected => return held.clone(),
            _ => self.set(key, desired),
        }
        desired.to_vec()
    }

    /// Whether the value is then still one that can be read; if not, nothing was appended.
    pub(super) fn append(&mut self, key: &[u8], value: &[u8]) -> bool {
        let held = self.values.get(key).map_or(0, Vec::len);
        let fits = held + value.len() <= MAX_VALUE;
        if fits {
            self.values.entry(key.to_vec()).or_default().extend_from_slice(value);
        }
        fits
    }

    pub(super) fn delete(&mut self, key: &[u8]) -> bool {
        self.values.remove(key).is_some()
    }

    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &[u8]> {
        self.values.keys().map(Vec::as_slice)
    }

    /// A queue with something in it counts as a key that is set.
    pub(super) fn has_all<K: AsRef<[u8]>>(&self, keys: &[K]) -> bool {
        keys.iter().all(|key| self.values.contains_key(key.as_ref()) || self.queue_len(key.as_ref()) > 0)
    }

    pub(super) fn queue_len(&self, key: &[u8]) -> usize {
        self.queues.get(key).map_or(0, VecDeque::len)
    }

    pub(super) fn queue_push(&mut self, key: &[u8], value: &[u8]) {
        self.queues.entry(key.to_vec()).or_default().push_back(value.to_vec());
    }

    pub(super) fn queue_pop(&mut self, key: &[u8]) -> Option<Vec<u8>> {
        let queue = self.queues.get_mut(key)?;
        let value = queue.pop_front();
        if queue.is_empty() {
            self.queues.remove(key);
        }
        value
    }
}
