//! What one process reads of another's recorder, whose format `recorder` describes: everything that is whole at that moment

use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::fence;

use super::memory::Words;
use super::places::PLACES;
use super::recorder::{
    Clock, FIRST_PLACE, GROUP, GROUPS, HEAD, MAGIC, NAME, Outcome, PLACE, RECORD, RECORDS, STEP_BITS,
    WAITED_FOR, group, head, nanos,
};
use crate::operation::Signature;

/// A record as it was read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawRecord {
    pub(crate) number: u64,
    pub(crate) group: u64,
    pub(crate) step: u64,
    /// The number of its place; 0 for none.
    pub(crate) place: usize,
    pub(crate) signature: Option<Signature>,
    /// Nanoseconds before now.
    pub(crate) begun: u64,
    pub(crate) ended: Option<(u64, Outcome)>,
}

/// A group's line as it was read.
#[derive(Clone, Debug)]
pub(crate) struct RawGroup {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) size: usize,
    pub(crate) step: u64,
    /// The step of the first call that has not ended; `step` if all have.
    pub(crate) at: u64,
    /// The number of the call under way.
    pub(crate) running: Option<u64>,
    pub(crate) waits_for: Vec<usize>,
}

/// A recorder's content at one moment.
#[derive(Clone, Debug)]
pub(crate) struct Raw {
    pub(crate) nonce: u64,
    pub(crate) rank: usize,
    pub(crate) world: usize,
    pub(crate) pid: u32,
    pub(crate) groups: Vec<RawGroup>,
    /// In the order of their numbers.
    pub(crate) records: Vec<RawRecord>,
    /// The places, the first of which has the number 1.
    pub(crate) places: Vec<String>,
}

/// Reads all that is whole. `None` if this is no recorder of this version.
pub(crate) fn read(words: &impl Words) -> Option<Raw> {
    if words.load(head::MAGIC, Acquire) != MAGIC {
        return None;
    }
    let word = |place| words.load(place, Relaxed);
    let clock = if word(head::CLOCK) == Clock::Cycles as u64 { Clock::Cycles } else { Clock::Nanos };
    let age = Age::new(clock, word(head::CYCLES), word(head::NANOS));
    let records = (0..RECORDS).filter_map(|place| read_record(words, place, &age));
    let mut records: Vec<RawRecord> = records.collect();
    records.sort_unstable_by_key(|record| record.number);
    Some(Raw {
        nonce: word(head::NONCE),
        rank: word(head::RANK) as usize,
        world: word(head::WORLD) as usize,
        pid: word(head::PID) as u32,
        groups: (0..GROUPS).filter_map(|line| read_group(words, line, &records)).collect(),
        records,
        places: (0..PLACES).map(|place| read_place(words, place)).collect(),
    })
}

fn read_place(words: &impl Words, place: usize) -> String {
    let base = FIRST_PLACE + place * PLACE;
    let length = words.load(base, Acquire) as usize;
    let bytes = (1..PLACE).flat_map(|word| words.load(base + word, Relaxed).to_le_bytes());
    let bytes: Vec<u8> = bytes.take(length).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// How long ago a recorder's time was.
struct Age {
    now: u64,
    nanos_per_tick: f64,
}

impl Age {
    fn new(clock: Clock, ticks_then: u64, nanos_then: u64) -> Self {
        let (now, nanos_now) = (clock.now(), nanos());
        let ticks = now.saturating_sub(ticks_then).max(1) as f64;
        let nanos_per_tick = match clock {
            Clock::Nanos => 1.0,
            Clock::Cycles => nanos_now.saturating_sub(nanos_then) as f64 / ticks,
        };
        Age { now, nanos_per_tick }
    }

    fn of(&self, ticks: u64) -> u64 {
        (self.now.saturating_sub(ticks) as f64 * self.nanos_per_tick) as u64
    }
}

fn read_record(words: &impl Words, place: usize, age: &Age) -> Option<RawRecord> {
    let base = HEAD + GROUPS * GROUP + place * RECORD;
    let stamp = words.load(base, Acquire);
    let mut found = [0; RECORD];
    found.iter_mut().enumerate().for_each(|(i, word)| *word = words.load(base + i, Relaxed));
    fence(Acquire);
    if stamp == 0 || stamp % 2 == 1 || words.load(base, Relaxed) != stamp {
        return None;
    }
    let number = stamp / 2 - 1;
    let outcome = |end: u64| match end & 3 {
        1 => Some((age.of(end >> 2), Outcome::Done)),
        2 => Some((age.of(end >> 2), Outcome::Failed)),
        _ => None,
    };
    (number as usize % RECORDS == place).then(|| RawRecord {
        number,
        group: found[1],
        step: found[2] & ((1 << STEP_BITS) - 1),
        place: (found[2] >> STEP_BITS) as usize,
        signature: Signature::decode([found[3], found[4], found[5]]),
        begun: age.of(found[6]),
        ended: outcome(found[7]),
    })
}

/// `records` were read before.
fn read_group(words: &impl Words, line: usize, records: &[RawRecord]) -> Option<RawGroup> {
    let base = HEAD + line * GROUP;
    let mut found = [0u64; GROUP];
    // In this order: of a call whose beginning was read and whose end was not, it is certain that it had not ended.
    found.iter_mut().enumerate().for_each(|(i, word)| *word = words.load(base + i, Acquire));
    fence(Acquire);
    let stamp = found[group::STAMP];
    let waits = words.load(base + group::WAITS, Relaxed);
    if stamp % 2 == 1 || words.load(base, Relaxed) != stamp || found[group::ID] == 0 {
        return None;
    }
    let running = found[group::ENDED] < found[group::BEGUN];
    let name: Vec<u8> = found[group::NAME..][..NAME / 8].iter().flat_map(|word| word.to_le_bytes()).collect();
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(NAME);
    let mut waits_for = Vec::new();
    if running && waits >> 8 == found[group::BEGUN] && waits == found[group::WAITS] {
        let count = (found[group::WAITED_FOR] as usize).min(WAITED_FOR);
        let rank = |place: usize| (found[group::RANKS + place / 2] >> (32 * (place % 2))) as u32 as usize;
        waits_for.extend((0..count).map(rank));
    }
    // Messages are no steps: the first call that has not ended may have the step of one that has.
    let (id, ended) = (found[group::ID], found[group::ENDED]);
    let all_known = records.first().is_some_and(|first| first.number <= ended);
    let under_way = records.iter().find(|record| record.group == id && record.number >= ended);
    let at = match under_way.filter(|_| all_known && running) {
        Some(call) => call.step,
        None if running => (found[group::DONE] + 1).min(found[group::STEP]),
        None => found[group::STEP],
    };
    Some(RawGroup {
        id: found[group::ID],
        name: String::from_utf8_lossy(&name[..end]).into_owned(),
        size: found[group::SIZE] as usize,
        step: found[group::STEP],
        at,
        running: running.then(|| found[group::BEGUN].saturating_sub(1)),
        waits_for,
    })
}
