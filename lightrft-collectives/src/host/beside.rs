//! What a group lends to another way between its ranks, the communicator of their GPUs: a line in the flight recorder, and the
//! comparison of the calls made there

use std::fmt::Write;
use std::sync::Arc;

use super::ledger::Told;
use super::watcher::Shared;
use crate::flight::recorder::{Outcome, Slot, Ticket};
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
}

impl Beside {
    pub(super) fn new(shared: Arc<Shared>, group: u64, members: &[usize], line: u64, name: &str) -> Self {
        let slot = shared.recorder.enter(line, name, members.len());
        Beside { shared, group, line, members: members.to_vec(), slot }
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
        self.shared.tell_calls(self.group, &self.members, self.line, calls);
    }

    /// The members that have not begun a step, as ranks of the world, and what they do instead: those of this machine, whose
    /// recorders can be read here.
    pub(crate) fn missing(&self, step: u64) -> (Vec<usize>, String) {
        let (mut missing, mut text) = (Vec::new(), String::new());
        for rank in self.members.iter().copied().filter(|rank| *rank != self.shared.rank) {
            let Some(flight) = self.shared.flight(rank) else { continue };
            let group = flight.groups.iter().find(|group| group.id == self.line);
            if group.is_none_or(|group| group.step < step) {
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
        if self.members[0] == self.shared.rank {
            self.shared.close_ledger(self.line);
        }
    }
}
