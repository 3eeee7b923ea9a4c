//! How a rank waits for another: spin while each has a core, then give the core away, then sleep

use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
use std::time::{Duration, Instant};

use rustix::thread::{futex, sched_yield};

use crate::host::exchange::Fault;
use crate::host::fate::{Alarm, Fate};
use crate::host::segment::{Cell, Segment};
use crate::host::vigil::Vigil;
use crate::operation::Signature;

/// How long to spin, if every rank has a core, before giving the core away.
const SPIN: Duration = Duration::from_micros(50);

/// Looks before the clock is asked for the first time.
const QUICK: usize = 64;

/// Times to give the core away before sleeping.
const YIELDS: usize = 30;

/// The longest sleep before looking whether somebody died. Whoever comes wakes the sleeper at once.
const NAP: Duration = Duration::from_millis(5);

/// Words of a set of processors.
const SET: usize = 16;

/// The processors that a rank may run on, and how many at once. Ranks are often pinned to one each: only together do
/// they tell how many the group has.
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(in crate::host) struct Cores {
    set: [u64; SET],
    /// What a control group allows, if less than there are.
    quota: u64,
}

impl Cores {
    /// Of the calling thread.
    pub(in crate::host) fn mine() -> Self {
        let mut cores = Cores::default();
        let allowed = rustix::thread::sched_getaffinity(None).unwrap_or_default();
        for cpu in (0..SET * 64).filter(|cpu| allowed.is_set(*cpu)) {
            cores.set[cpu / 64] |= 1 << (cpu % 64);
        }
        let in_set: u32 = cores.set.iter().map(|word| word.count_ones()).sum();
        let at_once = std::thread::available_parallelism().map_or(1, usize::from) as u64;
        cores.quota = if at_once < u64::from(in_set) { at_once } else { u64::MAX };
        cores
    }

    /// For a message to the other ranks; [`from_words`](Cores::from_words) reads them back.
    pub(in crate::host) fn to_words(self) -> Vec<u64> {
        bytemuck::cast_slice(&[self]).to_vec()
    }

    /// One core, whichever it is, if these are not the words of [`to_words`](Cores::to_words).
    pub(in crate::host) fn from_words(words: &[u64]) -> Self {
        let one = Cores { quota: 1, ..Cores::default() };
        bytemuck::try_cast_slice(words).ok().and_then(|all| all.first().copied()).unwrap_or(one)
    }

    /// How many the ranks have together.
    pub(in crate::host) fn of_all(all: &[Cores]) -> usize {
        let in_set: u32 =
            (0..SET).map(|i| all.iter().fold(0, |set, cores| set | cores.set[i]).count_ones()).sum();
        let quota = all.iter().map(|cores| cores.quota).min().unwrap_or(1);
        quota.min(in_set.into()) as usize
    }
}

/// How the ranks of a group wait, decided once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Policy {
    spin: Duration,
}

impl Policy {
    /// Spinning with more ranks than cores would keep from running who is waited for.
    pub(super) fn of(ranks: usize, cores: usize) -> Self {
        Policy { spin: if ranks <= cores { SPIN } else { Duration::ZERO } }
    }
}

/// What a wait must watch.
pub(in crate::host) struct Watch<'a> {
    pub(in crate::host) alarm: &'a Alarm,
    pub(in crate::host) fate: &'a Fate,
    pub(in crate::host) vigil: &'a Vigil<'a>,
    pub(in crate::host) group: u64,
    /// Ranks of the world, by rank in the group.
    pub(in crate::host) ranks: &'a [usize],
    pub(in crate::host) timeout: Duration,
}

/// One step of a call, as this rank shows it and expects it of the others.
pub(super) struct Step<'a> {
    pub(super) number: u32,
    pub(super) signature: [u64; 3],
    pub(super) policy: Policy,
    pub(super) watch: &'a Watch<'a>,
}

impl Step<'_> {
    /// Shows the others that this rank has come, with `payload`.
    #[inline]
    pub(super) fn publish(&self, segment: &Segment, payload: &[u64]) {
        let mine = segment.cell(segment.rank(), self.number);
        for (place, word) in mine.signature.iter().zip(self.signature) {
            place.store(word, Relaxed);
        }
        for (place, word) in mine.payload.iter().zip(payload) {
            place.store(*word, Relaxed);
        }
        // The order of this store and the load of `sleepers` matters, as does that of their counterparts in `sleep`:
        // either the sleeper is seen here, or it sees the step.
        mine.step.store(self.number, SeqCst);
        if mine.sleepers.load(SeqCst) != 0 {
            let _ = futex::wake(&mine.step, futex::Flags::empty(), i32::MAX as u32);
        }
    }

    /// Waits until all others have come, and checks that they make the same call.
    #[inline]
    pub(super) fn meet(&self, segment: &Segment) -> Result<(), Fault> {
        let (rank, world) = (segment.rank(), segment.world());
        for peer in (rank + 1..world).chain(0..rank) {
            self.wait_for(segment, peer)?;
            let theirs = &segment.cell(peer, self.number).signature;
            let theirs = [theirs[0].load(Relaxed), theirs[1].load(Relaxed), theirs[2].load(Relaxed)];
            if theirs != self.signature {
                return Err(Fault::Mismatch(peer, Signature::decode(theirs)));
            }
        }
        Ok(())
    }

    fn has_come(&self, cell: &Cell) -> bool {
        cell.step.load(Acquire) == self.number
    }

    #[inline]
    fn wait_for(&self, segment: &Segment, peer: usize) -> Result<(), Fault> {
        let cell = segment.cell(peer, self.number);
        if self.has_come(cell) {
            return Ok(());
        }
        self.wait_longer(segment, peer, cell)
    }

    #[inline(never)]
    fn wait_longer(&self, segment: &Segment, peer: usize, cell: &Cell) -> Result<(), Fault> {
        if !self.policy.spin.is_zero() {
            for _ in 0..QUICK {
                std::hint::spin_loop();
                if self.has_come(cell) {
                    return Ok(());
                }
            }
            let begin = Instant::now();
            while begin.elapsed() < self.policy.spin {
                for _ in 0..32 {
                    if self.has_come(cell) {
                        return Ok(());
                    }
                    std::hint::spin_loop();
                }
            }
        }
        for _ in 0..YIELDS {
            sched_yield();
            if self.has_come(cell) {
                return Ok(());
            }
        }
        self.wait_asleep(segment, peer, cell)
    }

    fn wait_asleep(&self, segment: &Segment, peer: usize, cell: &Cell) -> Result<(), Fault> {
        let (begin, watch) = (Instant::now(), self.watch);
        loop {
            // Looked at before the step: what a rank published before it left or died counts.
            let rung = watch.alarm.is_rung();
            let left = watch.fate.has_left(watch.ranks[peer], watch.group);
            if self.has_come(cell) {
                return Ok(());
            }
            if rung {
                return Err(Fault::Alarm);
            }
            if left {
                return Err(Fault::Lost(peer));
            }
            let missing = || {
                let others = (0..segment.world()).filter(|r| *r != segment.rank());
                others.filter(|r| !self.has_come(segment.cell(*r, self.number))).collect()
            };
            let waited = begin.elapsed();
            if waited >= watch.timeout {
                let come = |r: &usize| self.has_come(segment.cell(*r, self.number));
                let come = (0..segment.world()).filter(come).collect();
                return Err(Fault::Deadline { waited, missing: missing(), come });
            }
            watch.vigil.still_waiting(waited, missing);
            self.sleep(cell, NAP.min(watch.timeout));
        }
    }

    fn sleep(&self, cell: &Cell, time: Duration) {
        cell.sleepers.fetch_add(1, SeqCst);
        let seen = cell.step.load(SeqCst);
        if seen != self.number {
            let time = futex::Timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
            // Woken, timed out, changed before sleeping or interrupted: the caller looks again in any case. No
            // private flag: the futex is shared between processes.
            let _ = futex::wait(&cell.step, futex::Flags::empty(), seen, Some(&time));
        }
        cell.sleepers.fetch_sub(1, SeqCst);
    }
}
