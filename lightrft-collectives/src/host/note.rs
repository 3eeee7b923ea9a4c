//! Notes: what the ranks of a world tell each other on their control connections
//!
//! A note is a length as `u32`, little-endian, and MessagePack.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::agreement::{Agreed, Word};
use super::world::Card;
use crate::error::{Error, Loss};
use crate::flight::Status;
use crate::operation::{Call, Signature};

/// Why a group is dead, as the ranks tell each other. Ranks are those of the world.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Cause {
    /// Two ranks made different calls.
    Mismatch { rank: usize, mine: Signature, other: usize, theirs: Signature },
    /// A rank is gone, from the world or from this group.
    Lost { rank: usize, how: Loss },
    /// Ranks had not come at the deadline.
    Timeout(Lateness),
}

/// Who waited for whom when a deadline passed, by all members' testimony.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lateness {
    pub(super) waited: Duration,
    /// The step that was waited in; 0 for a call between two ranks, which is no step of the group.
    pub(super) step: u64,
    /// Whom those that waited had not heard from.
    pub(super) missing: BTreeSet<usize>,
    /// Who says to have come to this step, or was seen there.
    pub(super) present: BTreeSet<usize>,
    /// The rank that wrote `report`.
    pub(super) reporter: usize,
    /// What those that had not come were doing.
    pub(super) report: String,
}

impl Lateness {
    fn join(&mut self, other: &Self) {
        if (other.reporter, &other.report) < (self.reporter, &self.report) {
            (self.reporter, self.report) = (other.reporter, other.report.clone());
        }
        self.waited = self.waited.max(other.waited);
        if other.step > self.step {
            self.step = other.step;
            (self.missing, self.present) = (other.missing.clone(), other.present.clone());
        } else if other.step == self.step {
            self.missing.extend(&other.missing);
            self.present.extend(&other.present);
        }
    }

    /// The members that had not come. What a rank says of itself counts for more than that another did not hear from
    /// it: a call that goes through several ranks is held up behind the one that is missing.
    pub(super) fn absent(&self, members: &[usize]) -> Vec<usize> {
        let silent = members.iter().copied().filter(|rank| self.step > 0 && !self.present.contains(rank));
        let silent: Vec<usize> = silent.collect();
        if silent.is_empty() { self.missing.iter().copied().collect() } else { silent }
    }
}

impl Cause {
    /// Which of several causes that nobody can put in order of time is the one: the smallest. Mistakes come first, then
    /// deaths, then whoever left, since each may follow from those before; of equal ones, that of the lowest rank. No two
    /// causes have one place, but for delays, which are joined: else members would keep different ones.
    fn place(&self) -> [u64; 9] {
        match self {
            Cause::Mismatch { rank, mine, other, theirs } => {
                let ([a, b, c], [d, e, f]) = (mine.encode(), theirs.encode());
                [0, *rank as u64, *other as u64, a, b, c, d, e, f]
            }
            Cause::Lost { rank, how } => {
                let (order, after) = match how {
                    Loss::Died => (0, 0),
                    Loss::Silent => (1, 0),
                    Loss::Failed => (2, 0),
                    Loss::LeftAfter { lost } => (3, *lost as u64),
                    Loss::Left => (4, 0),
                };
                [1, order, *rank as u64, after, 0, 0, 0, 0, 0]
            }
            Cause::Timeout(_) => [2, 0, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    /// The error that a call on `group` returns.
    pub(super) fn error(&self, call: Call, group: &str, members: &[usize], cards: &[Card]) -> Error {
        let group = group.to_owned();
        match self.clone() {
            Cause::Lost { rank, how } => {
                let (pid, host) =
                    cards.get(rank).map_or((0, String::new()), |card| (card.pid, card.node.clone()));
                Error::PeerLost { call, group, rank, pid, host, how }
            }
            Cause::Mismatch { rank, mine, other, theirs } => {
                let (mine, theirs) = (Box::new(mine), Box::new(theirs));
                Error::Mismatch { group, rank, mine, other, theirs }
            }
            Cause::Timeout(late) => Error::Timeout {
                call,
                group,
                waited: late.waited,
                missing: late.absent(members),
                report: late.report,
            },
        }
    }
}

impl Agreed for Cause {
    fn join(&mut self, other: &Self) {
        if let (Cause::Timeout(mine), Cause::Timeout(theirs)) = (&mut *self, other) {
            mine.join(theirs);
        } else if other.place() < self.place() {
            *self = other.clone();
        }
    }

    /// The group was dead before this loss.
    fn lose(&mut self, _member: usize) {}
}

/// Who does not come along into the group that takes the place of a dead one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Absent(pub(super) BTreeSet<usize>);

impl Agreed for Absent {
    fn join(&mut self, other: &Self) {
        self.0.extend(&other.0);
    }

    fn lose(&mut self, member: usize) {
        self.0.insert(member);
    }
}

/// A word on some matter of a group, with its members: the receiver may not have made the group yet.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Said<V> {
    pub(super) group: u64,
    pub(super) members: Vec<usize>,
    /// `None`: this is what was decided.
    pub(super) round: Option<u32>,
    pub(super) value: V,
}

impl<V> Said<V> {
    pub(super) fn new(group: u64, members: Vec<usize>, word: Word<V>) -> Self {
        match word {
            Word::Round(round, value) => Said { group, members, round: Some(round), value },
            Word::Decided(value) => Said { group, members, round: None, value },
        }
    }

    pub(super) fn word(self) -> Word<V> {
        match self.round {
            Some(round) => Word::Round(round, self.value),
            None => Word::Decided(self.value),
        }
    }
}

/// A message on a control connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Note {
    /// The sender leaves the world in good order.
    Goodbye,
    /// As `Goodbye`, of one that was told before that this rank was lost to a group of theirs: it may leave because of that.
    GoodbyeAfter { lost: usize },
    /// The sender has dropped its end of one group.
    LeftGroup { group: u64 },
    /// The sender lives. Sent to ranks of other machines.
    Pulse,
    /// Why a group is dead.
    Verdict(Said<Cause>),
    /// Who is left of a group.
    Rebuild(Said<Absent>),
    /// What are you doing?
    Ask,
    /// What the sender does now.
    Status(Status),
    /// Calls that the sender has made on a line beside a group: strands and words of signatures, see
    /// [`ledger`](super::ledger). The first is the sender's call number `first` there, from 0: it shows whether a note was lost.
    Calls { group: u64, line: u64, first: u64, calls: Vec<(u64, [u64; 3])> },
}

/// Notes are small: the longest names the members of a large group.
const MAX_NOTE: usize = 1 << 20;

impl Note {
    pub(super) fn encode(&self) -> Vec<u8> {
        // Of these types MessagePack can write all.
        let body = rmp_serde::to_vec(self).unwrap_or_default();
        let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
        bytes.extend_from_slice(&body);
        bytes
    }

    /// The first note in `bytes` and its length; `Ok(None)` if more bytes must come, `Err` if this is no note.
    pub(super) fn decode(bytes: &[u8]) -> Result<Option<(Note, usize)>, ()> {
        let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(*length) as usize;
        if length > MAX_NOTE {
            return Err(());
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        rmp_serde::from_slice(body).map(|note| Some((note, 4 + length))).map_err(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cause() -> impl Strategy<Value = Cause> {
        let how = prop_oneof![
            Just(Loss::Died),
            Just(Loss::Left),
            Just(Loss::Failed),
            Just(Loss::Silent),
            (0usize..3).prop_map(|lost| Loss::LeftAfter { lost }),
        ];
        let ranks = || proptest::collection::btree_set(0usize..5, 0..4);
        let late = (0u64..3, 0u64..4, ranks(), ranks(), 0usize..4);
        prop_oneof![
            (0usize..4, how).prop_map(|(rank, how)| Cause::Lost { rank, how }),
            (0usize..4, 4usize..6, 0u64..3).prop_map(|(rank, other, count)| {
                let signature = Signature::bare(Call::Barrier);
                Cause::Mismatch { rank, mine: signature, other, theirs: Signature { count, ..signature } }
            }),
            late.prop_map(|(waited, step, missing, present, reporter)| {
                let (waited, report) = (Duration::from_secs(waited), format!("by {reporter}"));
                Cause::Timeout(Lateness { waited, step, missing, present, reporter, report })
            }),
        ]
    }

    fn joined(mut a: Cause, b: &Cause) -> Cause {
        a.join(b);
        a
    }

    proptest! {
        #[test]
        fn causes_join_to_one_whatever_the_order(a in cause(), b in cause(), c in cause()) {
            prop_assert_eq!(joined(a.clone(), &b), joined(b.clone(), &a));
            prop_assert_eq!(joined(joined(a.clone(), &b), &c), joined(a.clone(), &joined(b, &c)));
            prop_assert_eq!(joined(a.clone(), &a), a);
        }

        #[test]
        fn a_death_comes_before_whoever_left_because_of_it(dead in 0usize..5, other in 0usize..5) {
            let died = Cause::Lost { rank: dead, how: Loss::Died };
            for how in [Loss::Left, Loss::LeftAfter { lost: dead }, Loss::Failed] {
                prop_assert_eq!(joined(Cause::Lost { rank: other, how }, &died), died.clone());
            }
        }

        #[test]
        fn notes_survive_and_garbage_does_not_panic(cause in cause(), round: Option<u32>, garbage: Vec<u8>) {
            let said = Said { group: 7, members: vec![0, 3], round, value: cause.clone() };
            let bytes = Note::Verdict(said).encode();
            let decoded = Note::decode(&bytes);
            let Ok(Some((Note::Verdict(said), n))) = decoded else { panic!("{decoded:?}") };
            prop_assert_eq!((said.value, said.round, said.members, n), (cause, round, vec![0, 3], bytes.len()));
            prop_assert!(matches!(Note::decode(&bytes[..bytes.len() - 1]), Ok(None)));
            let _ = Note::decode(&garbage);
        }
    }
}
