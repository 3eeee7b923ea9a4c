//! What a group lends to another way between its ranks, the communicator of their GPUs: a line in the flight recorder, and the
//! comparison of the calls made there

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};

use super::ledger::Told;
use super::watcher::Shared;
use crate::flight::recorder::{GROUPS, Outcome, Slot, Ticket};
use crate::operation::Signature;
use crate::site;

/// A line beside a group; see [`Communicator::beside`](crate::Communicator::beside).
#[derive(Debug)]
pub struct Beside {
    shared: Arc<Shared>,
    group: u64,
    /// The line's number, the same on all members.
    line: u64,
    /// Ranks of the world.
    members: Vec<usize>,
    slot: Slot,
    /// Calls told to each member.
    told: Mutex<Vec<u64>>,
}

impl Beside {
    pub(super) fn new(shared: Arc<Shared>, group: u64, members: &[usize], line: u64, name: &str) -> Self {
        let slot = shared.recorder.enter(line, name, members.len());
        Beside {
            shared,
            group,
            line,
            members: members.to_vec(),
            slot,
            told: Mutex::new(vec![0; members.len()]),
        }
    }

    /// Records that a call begins, from where this thread's [`site`] says. Calls begin one after the other.
    #[inline]
    pub(crate) fn begin(&self, call: &Signature) -> Ticket {
        self.shared.recorder.begin(self.slot, call.call, call.encode(), site::current())
    }

    /// Records how a call has ended. Calls end in the order in which they began.
    #[inline]
    pub(crate) fn end(&self, ticket: Ticket, outcome: Outcome) {
        self.shared.recorder.end(ticket, outcome);
    }

    /// Has calls compared with those of the other members, which tell theirs in the same order. A mismatch becomes the group's
    /// verdict. Does not wait.
    pub(crate) fn tell(&self, calls: &[Told]) {
        // Held until they are sent: they go in the order of their numbers.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let mut parts = BTreeMap::<usize, Vec<Told>>::new();
        for call in calls {
            parts.entry(call.clerk(self.members.len())).or_default().push(*call);
        }
        for (clerk, calls) in parts {
            self.shared.tell_calls(self.group, self.members[clerk], (self.line, told[clerk]), &calls);
            told[clerk] += calls.len() as u64;
        }
    }

    /// The members that have not begun a step, as ranks of the world, and what they do instead: those of this machine, whose
    /// recorders can be read here and have, like this rank's, a line for these calls.
    pub(crate) fn missing(&self, step: u64) -> (Vec<usize>, String) {
        let (mut missing, mut text) = (Vec::new(), String::new());
        if step == 0 {
            return (missing, text);
        }
        for rank in self.members.iter().copied().filter(|rank| *rank != self.shared.rank) {
            let Some(flight) = self.shared.flight(rank) else { continue };
            let group = flight.groups.iter().find(|group| group.id == self.line);
            let has_begun = match group {
                Some(group) => group.step >= step,
                // It has not entered the line, or has found none left.
                None => flight.groups.len() == GROUPS,
            };
            if !has_begun {
                missing.push(rank);
                let _ = write!(text, "; rank {rank} has not made it: it {}", flight.status());
            }
        }
        (missing, text)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.shared.recorder.leave(self.slot);
        self.shared.close_ledger(self.group, self.line);
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::super::{Group, Join, Transport, World};
    use crate::communicator::{Communicator, CommunicatorExt};
    use crate::error::Error;
    use crate::flight::recorder::{GROUPS, Outcome};
    use crate::flight::{self, State};
    use crate::host::ledger::Told;
    use crate::op::{Dtype, ReduceOp};
    use crate::operation::{Call, Signature};
    use crate::store::MemoryStore;

    const LIMIT: Duration = Duration::from_secs(30);

    /// Runs `rank` as each of `world_size` ranks, in worlds of their own though in one process.
    fn ranks(world_size: usize, rank: impl Fn(Group) + Sync) {
        let store = &MemoryStore::new();
        thread::scope(|scope| {
            for number in 0..world_size {
                let rank = &rank;
                scope.spawn(move || {
                    let join = Join {
                        store,
                        prefix: "test".into(),
                        rank: number,
                        world_size,
                        interface: Ipv4Addr::LOCALHOST.into(),
                        timeout: LIMIT,
                        patience: LIMIT,
                        transport: Transport::Auto,
                        server: None,
                        token: None,
                    };
                    let world = World::join(join).unwrap();
                    rank(Group::new(world, "world".into(), (0..world_size).collect(), LIMIT, LIMIT).unwrap());
                });
            }
        });
    }

    fn reduce(count: u64) -> Signature {
        let (dtype, op) = (Some(Dtype::F32), Some(ReduceOp::Sum));
        Signature { dtype, op, count, ..Signature::bare(Call::AllReduce) }
    }

    fn await_failure(group: &Group) -> Error {
        let begin = Instant::now();
        loop {
            assert!(begin.elapsed() < LIMIT, "no verdict");
            match group.failure(Call::Barrier) {
                Some(error) => return error,
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    #[test]
    fn ranks_that_make_different_calls_beside_a_group_both_learn_of_it() {
        ranks(2, |group| {
            let beside = group.beside(99, "world on GPUs").unwrap();
            let odd = if group.rank() == 1 { 9 } else { 8 };
            beside.tell(&[Told::by_all(&reduce(8)), Told::by_all(&reduce(odd))]);
            let error = await_failure(&group);
            let both = matches!(&error, Error::Mismatch { rank: 0, mine, other: 1, theirs, .. }
                if **mine == reduce(8) && **theirs == reduce(9));
            assert!(both, "{error}");
            // Whoever leaves first leaves the other its error.
            let error = group.barrier().unwrap_err();
            assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        });
    }

    #[test]
    fn what_two_ranks_exchange_is_compared_by_the_lower_and_told_to_all() {
        ranks(3, |group| {
            let beside = group.beside(99, "world on GPUs").unwrap();
            let exchange =
                |count| Signature { dtype: Some(Dtype::F32), count, ..Signature::bare(Call::AllToAllV) };
            let of = |from, to, count| Told::between(from, to, 3, &exchange(count));
            beside.tell(&match group.rank() {
                0 => [of(0, 1, 5), of(2, 0, 6)],
                1 => [of(0, 1, 5), of(1, 2, 7)],
                _ => [of(2, 0, 6), of(1, 2, 8)],
            });
            let error = await_failure(&group);
            let both = matches!(&error, Error::Mismatch { rank: 1, mine, other: 2, theirs, .. }
                if **mine == exchange(7) && **theirs == exchange(8));
            assert!(both, "{error}");
            // Whoever leaves first leaves the others their error.
            assert!(matches!(group.barrier().unwrap_err(), Error::Mismatch { .. }));
        });
    }

    #[test]
    fn nobody_is_missing_on_a_line_for_which_there_was_no_room() {
        ranks(2, |group| {
            // Rank 1 has one line more than its recorder holds, and rank 0 just enough.
            let names = 2..GROUPS as u64 + group.rank() as u64;
            let _others: Vec<_> = names.map(|line| group.beside(1000 + line, "another").unwrap()).collect();
            let beside = group.beside(99, "world on GPUs").unwrap();
            let ticket = beside.begin(&reduce(1));
            assert_eq!(ticket.step(), 1 - group.rank() as u64);
            group.barrier().unwrap();
            assert!(beside.missing(ticket.step()).0.is_empty());
            group.barrier().unwrap();
        });
    }

    #[test]
    fn a_line_beside_a_group_says_who_has_not_come_and_what_it_does_instead() {
        ranks(2, |group| {
            let beside = group.beside(99, "world on GPUs").unwrap();
            let first = beside.begin(&reduce(1));
            beside.end(first, Outcome::Done);
            if group.rank() == 0 {
                beside.begin(&reduce(2));
                beside.begin(&reduce(3));
            }
            group.barrier().unwrap();
            let line = line!() - 1;
            assert!(beside.missing(1).0.is_empty());
            let (missing, text) = beside.missing(2);
            assert_eq!(missing, if group.rank() == 0 { vec![1] } else { Vec::new() });
            assert!(group.rank() == 1 || text.contains("rank 1 has not made it: it is in "), "{text}");
            group.barrier().unwrap();

            let flights = flight::read(std::process::id()).unwrap();
            let job = group.world.shared.nonce;
            let mine =
                flights.iter().find(|flight| flight.job == job && flight.rank == group.rank()).unwrap();
            let on_gpus = mine.groups.iter().find(|group| group.id == 99).unwrap();
            let (step, at) = if group.rank() == 0 { (3, 2) } else { (1, 1) };
            assert_eq!((on_gpus.step, on_gpus.at, on_gpus.busy), (step, at, group.rank() == 0), "{mine}");
            let place = format!("beside.rs:{line}");
            let here = |record: &&flight::Record| {
                record.site.as_ref().is_some_and(|site| site.ends_with(&place))
                    && matches!(record.state, State::Done(_))
            };
            assert_eq!(mine.records.iter().filter(here).count(), 1, "{mine}");
            // The others are read before anybody goes.
            group.barrier().unwrap();
        });
    }
}
