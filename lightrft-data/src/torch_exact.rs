//! `torch.randperm` on the CPU, bit for bit, as a table.
//!
//! torch shuffles `0..len` by Fisher and Yates with a Mersenne Twister, in one of two ways: up to
//! [`WIDE_DRAWS_FROM`] samples by 32-bit draws from the front, above by 64-bit draws inside out. Both swap an element
//! with one at a random place, which in a table of 10^8 is in no cache; all of the time goes there. The places do not
//! depend on what lies at them, so they are drawn [`AHEAD`] at a time and read once before the swaps: the processor
//! then waits for many of them at once instead of one after the other.

use std::hint::black_box;
use std::ops::BitXor;

use bytemuck::Pod;
use memmap2::MmapMut;

use crate::Error;
use crate::mt19937::Mt19937;

/// From this length on torch draws 64 bits a step: (2^32 - 1) / 20, the length up to which it takes the bias of
/// `u32 % n` for harmless.
const WIDE_DRAWS_FROM: usize = 214_748_364;

/// Places that are drawn before the first of them is used.
const AHEAD: usize = 256;

/// From this size on a table is memory of its own, in bytes: that of one large page.
const OWN_MEMORY_FROM: usize = 2 << 20;

/// An order as a table of `u32` or `u64`.
///
/// A large one asks for large pages, which halves the time to fill it: with pages of 4 KiB nearly every swap also has
/// to look up where its page is.
#[derive(Debug)]
pub(crate) enum Table<T> {
    Small(Vec<T>),
    Large(MmapMut),
}

impl<T: Pod> Table<T> {
    /// `len` zeros.
    fn zeros(len: usize) -> Result<Self, Error> {
        let bytes = len.saturating_mul(size_of::<T>());
        if bytes < OWN_MEMORY_FROM {
            return Ok(Self::Small(vec![T::zeroed(); len]));
        }
        let map = MmapMut::map_anon(bytes).map_err(|_| Error::TooLarge {
            what: "the table of a torch-exact order",
            len,
            needed: bytes,
        })?;
        // A wish: a system without large pages is slower and no less right.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self::Large(map))
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        match self {
            Table::Small(vec) => vec,
            Table::Large(map) => bytemuck::cast_slice(&map[..]),
        }
    }

    fn as_mut_slice(&mut self) -> &mut [T] {
        match self {
            Table::Small(vec) => vec,
            Table::Large(map) => bytemuck::cast_slice_mut(&mut map[..]),
        }
    }
}

/// The table of an order. `narrow` turns an index into the table's element; every index is below `len`, for which the
/// element was chosen.
pub(crate) fn table<T>(len: usize, seed: u32, narrow: impl Fn(usize) -> T) -> Result<Table<T>, Error>
where
    T: Pod + BitXor<Output = T>,
{
    let mut whole = Table::zeros(len)?;
    let table = whole.as_mut_slice();
    for (index, place) in table.iter_mut().enumerate() {
        *place = narrow(index);
    }
    let mut generator = Mt19937::new(seed);
    if len < WIDE_DRAWS_FROM {
        shuffle(table, len.saturating_sub(1), |i| {
            // The divisor is below 2^28, and a 32-bit division takes half as long as a 64-bit one.
            i + (generator.next_u32() % (len - i) as u32) as usize
        });
    } else {
        // The remainder is at most `i`, so it fits a usize.
        shuffle(table, len, |i| (generator.next_u64() % (i as u64 + 1)) as usize);
    }
    Ok(whole)
}

/// Swaps each of the first `steps` elements in turn with the one at the place drawn for it.
fn shuffle<T>(table: &mut [T], steps: usize, mut draw: impl FnMut(usize) -> usize)
where
    T: Pod + BitXor<Output = T>,
{
    let mut places = [0; AHEAD];
    for begin in (0..steps).step_by(AHEAD) {
        let end = steps.min(begin + AHEAD);
        for (i, place) in (begin..end).zip(&mut places) {
            *place = draw(i);
        }
        let places = &places[..end - begin];
        // Only to bring them into the cache: none of these reads waits for another.
        black_box(places.iter().fold(T::zeroed(), |all, &place| all ^ table[place]));
        for (i, &place) in (begin..end).zip(places) {
            table.swap(i, place);
        }
    }
}
