//! Numbers for the places where a program makes its calls: found by address, in a nanosecond or two
//!
//! The compiler keeps a place as a constant; its address is its name here. A table of open addresses is filled under a
//! lock and read without one. A program with more places than the table has room for has some that are not recorded.

use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::sync::{Mutex, PoisonError};

use crate::site::Site;

/// Places that are kept.
pub(crate) const PLACES: usize = 256;

/// Entries that are looked at for one place.
const PROBES: usize = 8;

/// Which places have which numbers. Entry `n` is the place with the number `n + 1`.
#[derive(Debug)]
pub(crate) struct Places {
    addresses: [AtomicUsize; PLACES],
    filling: Mutex<()>,
}

impl Places {
    pub(crate) fn new() -> Self {
        Places { addresses: [const { AtomicUsize::new(0) }; PLACES], filling: Mutex::new(()) }
    }

    /// The number of a place, from 1; 0 if there is no room for it. A new one is given to `write`, with its entry, before
    /// anybody gets its number.
    #[inline]
    pub(crate) fn number(&self, site: Site, write: impl FnOnce(usize)) -> u64 {
        let address = std::ptr::from_ref(site).addr();
        for entry in probes(address) {
            match self.addresses[entry].load(Acquire) {
                known if known == address => return entry as u64 + 1,
                0 => return self.add(address, write),
                _ => {}
            }
        }
        0
    }

    #[cold]
    fn add(&self, address: usize, write: impl FnOnce(usize)) -> u64 {
        let _filling = self.filling.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have added it, or taken the room.
        for entry in probes(address) {
            match self.addresses[entry].load(Acquire) {
                known if known == address => return entry as u64 + 1,
                0 => {
                    write(entry);
                    self.addresses[entry].store(address, Release);
                    return entry as u64 + 1;
                }
                _ => {}
            }
        }
        0
    }
}

/// Where a place may be. Constants lie at multiples of their alignment, close together.
#[inline]
fn probes(address: usize) -> impl Iterator<Item = usize> {
    let first = (address as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    (0..PROBES).map(move |step| (first as usize + step) % PLACES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::Location;

    #[test]
    fn a_place_keeps_its_number_and_is_written_once() {
        let places = Places::new();
        let mut written = Vec::new();
        let sites = [Location::caller(), other(), other()];
        let numbers: Vec<u64> =
            sites.iter().map(|site| places.number(site, |entry| written.push(entry as u64 + 1))).collect();
        assert_eq!(written, numbers);
        for (site, number) in sites.iter().zip(&numbers) {
            assert_eq!(places.number(site, |_| panic!("written again")), *number);
        }
    }

    #[test]
    fn a_program_with_too_many_places_has_some_without_a_number() {
        let places = Places::new();
        let sites: Vec<Location<'static>> = (0..2 * PLACES).map(|_| *Location::caller()).collect();
        let sites: &'static [Location<'static>] = sites.leak();
        let numbers: Vec<u64> = sites.iter().map(|site| places.number(site, |_| ())).collect();
        let mut kept: Vec<u64> = numbers.iter().copied().filter(|number| *number > 0).collect();
        kept.sort_unstable();
        kept.dedup();
        assert_eq!(
            kept.len(),
            numbers.iter().filter(|number| **number > 0).count(),
            "a number was given twice"
        );
        assert!((PLACES * 3 / 4..=PLACES).contains(&kept.len()), "{}", kept.len());
    }

    #[track_caller]
    fn other() -> Site {
        Location::caller()
    }
}
