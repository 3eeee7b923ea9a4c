//! The recorder's format: a ring of a rank's last calls and a line per group, written by one process, read by others
//!
//! ```text
//! | head: 16 words | 64 groups of 32 words | 1024 records of 8 words | 256 places of 16 words |
//! ```
//! A record is one cache line: stamp, group, step and place, three words of signature, begin, end. The stamp is odd while the
//! record is being written, and else twice the number of the call, plus 2: a reader that finds the same even stamp before
//! and after has read one call and not two halves. `end` is written later, as one word, with the outcome in its low bits.
//! A place is a file and a line of the user's program as text, written once, before the first record that names it.
//! Nothing here makes a kernel call, takes a lock or allocates while calls are recorded, but for the first call from each
//! place.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Mutex;
use std::sync::atomic::Ordering::{Relaxed, Release};
use std::sync::atomic::fence;

use rustix::time::{ClockId, clock_gettime};

use super::memory::{Words, Written, cycles};
use super::places::{PLACES, Places};
use crate::operation::Call;
use crate::site::Site;

/// Calls that are kept.
pub(crate) const RECORDS: usize = 1024;
/// Groups that are kept apart by name. Calls of more are recorded without one.
pub(crate) const GROUPS: usize = 64;
/// Ranks that a waiting call names.
pub(super) const WAITED_FOR: usize = 16;
/// Bytes of a group's name.
pub(super) const NAME: usize = 96;

pub(super) const HEAD: usize = 16;
pub(super) const GROUP: usize = 32;
pub(super) const RECORD: usize = 8;
/// Words of a place: the length of its text, and the text.
pub(super) const PLACE: usize = 16;
pub(super) const FIRST_PLACE: usize = HEAD + GROUPS * GROUP + RECORDS * RECORD;
pub(crate) const WORDS: usize = FIRST_PLACE + PLACES * PLACE;

/// Bits of the word that a record's step and place share that are the step's.
pub(super) const STEP_BITS: u32 = 48;

/// First word; its last byte is the version of this format.
pub(super) const MAGIC: u64 = u64::from_le_bytes(*b"LRFTFLY\x02");
/// The name of the memory file, by which a process's recorders are found.
pub(crate) const FILE: &str = "lightrft-flight";

/// Words of the head.
pub(super) mod head {
    pub(in crate::flight) const MAGIC: usize = 0;
    pub(in crate::flight) const NONCE: usize = 1;
    pub(in crate::flight) const RANK: usize = 2;
    pub(in crate::flight) const WORLD: usize = 3;
    pub(in crate::flight) const PID: usize = 4;
    pub(in crate::flight) const CLOCK: usize = 5;
    pub(in crate::flight) const CYCLES: usize = 6;
    pub(in crate::flight) const NANOS: usize = 7;
    /// Calls recorded. On a cache line of its own.
    pub(in crate::flight) const NEXT: usize = 8;
}

/// Words of a group.
pub(super) mod group {
    /// Odd while the group is being entered or left.
    pub(in crate::flight) const STAMP: usize = 0;
    pub(in crate::flight) const ID: usize = 1;
    pub(in crate::flight) const SIZE: usize = 2;
    /// Collective calls begun.
    pub(in crate::flight) const STEP: usize = 3;
    /// The number of the last call begun, plus 1, and of the last that ended.
    pub(in crate::flight) const BEGUN: usize = 4;
    pub(in crate::flight) const ENDED: usize = 5;
    /// The number, plus 1, of the call that waits for the ranks that follow, above 8 bits that change with them; and how
    /// many they are.
    pub(in crate::flight) const WAITS: usize = 6;
    pub(in crate::flight) const WAITED_FOR: usize = 7;
    pub(in crate::flight) const RANKS: usize = 8;
    pub(in crate::flight) const NAME: usize = 16;
    /// The step of the last call that ended.
    pub(in crate::flight) const DONE: usize = 28;
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done = 1,
    Failed = 2,
}

/// What time a recorder's words are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clock {
    /// Nanoseconds since the machine started.
    Nanos = 0,
    /// Cycles of its processors.
    Cycles = 1,
}

pub(super) fn nanos() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

impl Clock {
    /// Cycles where the kernel trusts them: reading them takes half the time.
    fn best() -> Self {
        let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
        let trusted = std::fs::read_to_string(source).is_ok_and(|name| name.trim() == "tsc");
        if trusted && cfg!(target_arch = "x86_64") { Clock::Cycles } else { Clock::Nanos }
    }

    pub(super) fn now(self) -> u64 {
        match self {
            Clock::Nanos => nanos(),
            Clock::Cycles => cycles(),
        }
    }
}

/// A rank's recorder.
#[derive(Debug)]
pub(crate) struct Recorder {
    words: Written,
    file: OwnedFd,
    clock: Clock,
    /// Which groups' lines are taken.
    taken: Mutex<[bool; GROUPS]>,
    places: Places,
}

/// A group's line in a recorder; `None` if there was no line left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    id: u64,
    line: Option<usize>,
}

/// A call that is being recorded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    slot: Slot,
    number: u64,
    step: u64,
}

impl Ticket {
    /// Collective calls begun on the group, with this one; 0 if the group has no line.
    pub(crate) fn step(&self) -> u64 {
        self.step
    }
}

impl Recorder {
    pub(crate) fn new(nonce: u64, rank: usize, world: usize) -> io::Result<Self> {
        let (words, file) = Written::new(FILE, WORDS)?;
        let clock = Clock::best();
        let pid = u64::from(std::process::id());
        for (place, value) in [
            (head::NONCE, nonce),
            (head::RANK, rank as u64),
            (head::WORLD, world as u64),
            (head::PID, pid),
            (head::CLOCK, clock as u64),
            (head::CYCLES, clock.now()),
            (head::NANOS, nanos()),
        ] {
            words[place].store(value, Relaxed);
        }
        words[head::MAGIC].store(MAGIC, Release);
        let (taken, places) = (Mutex::new([false; GROUPS]), Places::new());
        Ok(Recorder { words, file, clock, taken, places })
    }

    /// The descriptor by which other processes open this one's recorder.
    pub(crate) fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The words, to read them.
    pub(crate) fn words(&self) -> &impl Words {
        &self.words
    }

    /// Takes a line for a group.
    pub(crate) fn enter(&self, id: u64, name: &str, size: usize) -> Slot {
        let mut taken = self.taken.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let line = taken.iter().position(|taken| !taken);
        if let Some(line) = line {
            taken[line] = true;
            self.write_line(line, id, name, size);
        }
        Slot { id, line }
    }

    /// Gives a group's line back.
    pub(crate) fn leave(&self, slot: Slot) {
        let mut taken = self.taken.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(line) = slot.line {
            self.write_line(line, 0, "", 0);
            taken[line] = false;
        }
    }

    fn write_line(&self, line: usize, id: u64, name: &str, size: usize) {
        let words = &self.words[HEAD + line * GROUP..][..GROUP];
        let stamp = words[group::STAMP].load(Relaxed);
        words[group::STAMP].store(stamp + 1, Relaxed);
        fence(Release);
        words[1..].iter().for_each(|word| word.store(0, Relaxed));
        words[group::ID].store(id, Relaxed);
        words[group::SIZE].store(size as u64, Relaxed);
        let mut bytes = [0u8; NAME];
        // The end of a long name tells more than its beginning.
        let name = name.as_bytes();
        let name = &name[name.len().saturating_sub(NAME)..];
        bytes[..name.len()].copy_from_slice(name);
        for (place, part) in words[group::NAME..].iter().zip(bytes.as_chunks::<8>().0) {
            place.store(u64::from_le_bytes(*part), Relaxed);
        }
        words[group::STAMP].store(stamp + 2, Release);
    }

    /// Records that a call begins, made at `site` if that is known. Calls on one group begin one after the other.
    #[inline]
    pub(crate) fn begin(&self, slot: Slot, call: Call, signature: [u64; 3], site: Option<Site>) -> Ticket {
        let number = self.words[head::NEXT].fetch_add(1, Relaxed);
        let mut step = 0;
        if let Some(line) = slot.line {
            let line = &self.words[HEAD + line * GROUP..][..GROUP];
            step = line[group::STEP].load(Relaxed) + u64::from(is_step(call));
            line[group::STEP].store(step, Relaxed);
            line[group::BEGUN].store(number + 1, Relaxed);
        }
        let place = site.map_or(0, |site| self.places.number(site, |place| self.write_place(place, site)));
        let record = self.record(number);
        record[0].store(2 * number + 1, Relaxed);
        fence(Release);
        record[1].store(slot.id, Relaxed);
        record[2].store(step | (place << STEP_BITS), Relaxed);
        record[3].store(signature[0], Relaxed);
        record[4].store(signature[1], Relaxed);
        record[5].store(signature[2], Relaxed);
        record[6].store(self.clock.now(), Relaxed);
        record[7].store(0, Relaxed);
        record[0].store(2 * number + 2, Release);
        Ticket { slot, number, step }
    }

    /// Records how a call ended.
    #[inline]
    pub(crate) fn end(&self, ticket: Ticket, outcome: Outcome) {
        let record = self.record(ticket.number);
        // While this call waited, so many others may have been made that its record is another's.
        if record[0].load(Relaxed) == 2 * ticket.number + 2 {
            record[7].store((self.clock.now() << 2) | outcome as u64, Release);
        }
        if let Some(line) = ticket.slot.line {
            let line = &self.words[HEAD + line * GROUP..][..GROUP];
            line[group::DONE].store(ticket.step, Relaxed);
            line[group::ENDED].store(ticket.number + 1, Release);
        }
    }

    /// Records for whom a call waits: ranks of the world.
    pub(crate) fn waits_for(&self, ticket: Ticket, ranks: &[usize]) {
        let Some(line) = ticket.slot.line else { return };
        let line = &self.words[HEAD + line * GROUP..][..GROUP];
        let version = (line[group::WAITS].load(Relaxed) + 1) & 0xff;
        line[group::WAITS].store(0, Relaxed);
        fence(Release);
        line[group::WAITED_FOR].store(ranks.len() as u64, Relaxed);
        let mut packed = [0u64; WAITED_FOR / 2];
        for (place, rank) in ranks.iter().take(WAITED_FOR).enumerate() {
            packed[place / 2] |= (*rank as u64 & 0xffff_ffff) << (32 * (place % 2));
        }
        packed.iter().zip(&line[group::RANKS..]).for_each(|(word, place)| place.store(*word, Relaxed));
        line[group::WAITS].store(((ticket.number + 1) << 8) | version, Release);
    }

    /// The collective calls begun on a group; 0 if it is not known.
    pub(crate) fn step_of(&self, id: u64) -> u64 {
        let line = |line: usize| &self.words[HEAD + line * GROUP..][..GROUP];
        let known = (0..GROUPS).map(line).find(|line| line[group::ID].load(Relaxed) == id);
        known.map_or(0, |line| line[group::STEP].load(Relaxed))
    }

    /// Whether this rank is in a call on a group.
    pub(crate) fn is_in_call_on(&self, id: u64) -> bool {
        let line = |line: usize| &self.words[HEAD + line * GROUP..][..GROUP];
        let known = (0..GROUPS).map(line).find(|line| line[group::ID].load(Relaxed) == id);
        known.is_some_and(|line| line[group::BEGUN].load(Relaxed) != line[group::ENDED].load(Relaxed))
    }

    /// Writes a place down for others. The end of a long path tells more than its beginning.
    #[cold]
    fn write_place(&self, place: usize, site: Site) {
        let text = format!("{}:{}", site.file(), site.line());
        let text = &text.as_bytes()[text.len().saturating_sub(8 * (PLACE - 1))..];
        let words = &self.words[FIRST_PLACE + place * PLACE..][..PLACE];
        let mut bytes = [0u8; 8 * (PLACE - 1)];
        bytes[..text.len()].copy_from_slice(text);
        for (word, part) in words[1..].iter().zip(bytes.as_chunks::<8>().0) {
            word.store(u64::from_le_bytes(*part), Relaxed);
        }
        words[0].store(text.len() as u64, Release);
    }

    fn record(&self, number: u64) -> &[std::sync::atomic::AtomicU64] {
        &self.words[HEAD + GROUPS * GROUP + number as usize % RECORDS * RECORD..][..RECORD]
    }
}

/// Whether all members make this call together.
pub(crate) fn is_step(call: Call) -> bool {
    !matches!(call, Call::Send | Call::Recv)
}

#[cfg(test)]
mod tests {
    use super::super::raw::read;
    use super::*;
    use crate::op::Dtype;
    use crate::operation::Signature;

    fn signature(count: u64) -> Signature {
        // Every word tells the count, so that halves of two calls would be seen.
        let root = Some(count as u32);
        Signature { dtype: Some(Dtype::F32), root, count, digest: count, ..Signature::bare(Call::Broadcast) }
    }

    #[test]
    fn the_last_calls_are_kept_with_their_groups() {
        let recorder = Recorder::new(1, 3, 4).unwrap();
        let (one, two) = (recorder.enter(11, "world", 4), recorder.enter(12, "world/1", 2));
        for count in 0..RECORDS as u64 + 10 {
            let ticket = recorder.begin(one, Call::Broadcast, signature(count).encode(), None);
            recorder.end(ticket, Outcome::Done);
        }
        let failed = recorder.begin(two, Call::Barrier, Signature::bare(Call::Barrier).encode(), None);
        recorder.end(failed, Outcome::Failed);
        let waits = recorder.begin(two, Call::Recv, signature(7).encode(), None);
        recorder.waits_for(waits, &[2, 70_000]);

        let raw = read(recorder.words()).unwrap();
        assert_eq!((raw.nonce, raw.rank, raw.world, raw.pid), (1, 3, 4, std::process::id()));
        assert_eq!(raw.records.len(), RECORDS);
        let [.., last, failed, running] = &raw.records[..] else { panic!() };
        assert_eq!((last.group, last.step, last.signature), (11, 1034, Some(signature(1033))));
        assert!(matches!(last.ended, Some((_, Outcome::Done))) && last.begun >= last.ended.unwrap().0);
        assert!(matches!(failed.ended, Some((_, Outcome::Failed))) && failed.step == 1);
        // A message between two ranks is no step of the group.
        assert!(running.ended.is_none() && running.step == 1);
        let [world, part] = &raw.groups[..] else { panic!("{:?}", raw.groups) };
        assert_eq!((&*world.name, world.step, world.running, world.size), ("world", 1034, None, 4));
        assert_eq!((&*part.name, part.running), ("world/1", Some(running.number)));
        assert_eq!(part.waits_for, [2, 70_000]);

        recorder.end(waits, Outcome::Done);
        recorder.leave(one);
        let raw = read(recorder.words()).unwrap();
        assert_eq!(raw.groups.len(), 1);
        assert!(raw.groups[0].running.is_none() && raw.groups[0].waits_for.is_empty());
    }

    #[test]
    fn of_enqueued_calls_the_oldest_that_has_not_ended_is_under_way_be_it_a_message() {
        let recorder = Recorder::new(1, 0, 2).unwrap();
        let slot = recorder.enter(11, "world on GPUs", 2);
        let begin = |call| recorder.begin(slot, call, Signature::bare(call).encode(), None);
        let reduction = begin(Call::AllReduce);
        let message = begin(Call::Send);
        begin(Call::Broadcast);
        recorder.end(reduction, Outcome::Done);
        let status = crate::flight::Flight::of(recorder.words()).unwrap().status();
        let doing = status.doing.iter().map(|doing| (doing.step, doing.call.map(|call| call.call)));
        assert_eq!(doing.collect::<Vec<_>>(), [(1, Some(Call::Send))]);
        recorder.end(message, Outcome::Done);
        let status = crate::flight::Flight::of(recorder.words()).unwrap().status();
        assert_eq!(
            (status.doing[0].step, status.doing[0].call.map(|call| call.call)),
            (2, Some(Call::Broadcast))
        );
    }

    #[test]
    fn more_groups_than_lines_are_recorded_without_a_name() {
        let recorder = Recorder::new(1, 0, 1).unwrap();
        let slots: Vec<Slot> =
            (0..=GROUPS as u64).map(|id| recorder.enter(id + 1, "a group with a name", 1)).collect();
        let ticket =
            recorder.begin(slots[GROUPS], Call::Barrier, Signature::bare(Call::Barrier).encode(), None);
        recorder.waits_for(ticket, &[1]);
        let raw = read(recorder.words()).unwrap();
        assert_eq!((raw.groups.len(), raw.records[0].group), (GROUPS, GROUPS as u64 + 1));
        slots.into_iter().for_each(|slot| recorder.leave(slot));
        assert!(read(recorder.words()).unwrap().groups.is_empty());
    }

    #[test]
    fn a_call_is_read_with_the_place_where_it_was_made() {
        let recorder = Recorder::new(1, 0, 1).unwrap();
        let slot = recorder.enter(11, "world", 4);
        let here = std::panic::Location::caller();
        for site in [None, Some(here), Some(here)] {
            let ticket = recorder.begin(slot, Call::Broadcast, signature(1).encode(), site);
            recorder.end(ticket, Outcome::Done);
        }
        let raw = read(recorder.words()).unwrap();
        let [none, one, other] = &raw.records[..] else { panic!() };
        assert_eq!((none.place, one.place, [none.step, one.step, other.step]), (0, other.place, [1, 2, 3]));
        let text = format!("{}:{}", here.file(), here.line());
        assert_eq!(raw.places[one.place - 1], text);
        assert_eq!(raw.places.iter().filter(|place| !place.is_empty()).count(), 1);
    }

    /// `cargo test --release -p lightrft-collectives --lib -- --ignored --nocapture what_recording`
    #[test]
    #[ignore = "a measurement"]
    fn what_recording_a_call_costs() {
        #[track_caller]
        fn call(recorder: &Recorder, slot: Slot, signature: &Signature) {
            let _mark = crate::site::mark();
            let site = crate::site::current();
            let ticket = recorder.begin(slot, signature.call, signature.encode(), site);
            recorder.end(ticket, Outcome::Done);
        }
        const CALLS: u32 = 100_000;
        let recorder = Recorder::new(1, 0, 1).unwrap();
        let (slot, signature) = (recorder.enter(11, "world", 4), signature(1));
        let mut rounds: Vec<f64> = (0..50)
            .map(|_| {
                let begin = std::time::Instant::now();
                for _ in 0..CALLS {
                    call(&recorder, slot, std::hint::black_box(&signature));
                }
                begin.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS)
            })
            .collect();
        rounds.sort_by(f64::total_cmp);
        println!("{:?}: {:.1} ns a call (median), {:.1} (best)", recorder.clock, rounds[25], rounds[0]);
    }

    #[test]
    fn a_reader_never_sees_halves_of_two_calls() {
        let recorder = Recorder::new(1, 0, 1).unwrap();
        let slot = recorder.enter(11, "world", 4);
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for count in 0..300_000 {
                    let ticket = recorder.begin(slot, Call::Broadcast, signature(count).encode(), None);
                    recorder.end(ticket, Outcome::Done);
                }
                done.store(true, Relaxed);
            });
            let mut seen = 0;
            while !done.load(Relaxed) || seen == 0 {
                for record in read(recorder.words()).unwrap().records {
                    assert_eq!(record.signature, Some(signature(record.number)), "{record:?}");
                    assert_eq!(record.step, record.number + 1);
                    seen += 1;
                }
            }
        });
    }
}
