//! The protocol of the shared slots, checked in every interleaving of two and three ranks
//!
//! The programs below are those of `host/segment.rs` and `host/shm.rs`, instruction by instruction: what is written and
//! read, which step is published, who is waited for, how ranks fall asleep and are woken. Of each there is a broken
//! one as well, in which the search must find what is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod machine;

use machine::{Found, Instruction, Memory, Model, Order, Word, explore};

/// How a protocol is made, so that tests can leave something out.
#[derive(Clone, Copy, Debug)]
struct Protocol {
    /// Slots of each rank, taken in turns.
    slots: usize,
    /// Steps whose signatures are kept.
    history: usize,
    waiting: Waiting,
    /// Of the store that publishes a step.
    publish: Order,
}

/// What a rank does until another has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    /// It looks again and again.
    Spins,
    /// It says that it sleeps, looks, and sleeps.
    Sleeps,
    /// It sleeps so too, but those it waits for wake sleepers before they publish: wrong.
    WokenEarly,
}

const PROTOCOL: Protocol = Protocol { slots: 2, history: 4, waiting: Waiting::Spins, publish: Order::SeqCst };

/// Calls of which each rank's program is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Barrier,
    /// Each rank writes, all meet, each reads all others: small sums, gathers.
    Gather,
    /// The root writes, all meet, the others read.
    Broadcast {
        root: usize,
    },
    /// As a broadcast, but the root does not wait for those who read: wrong.
    OneWayBroadcast {
        root: usize,
    },
    /// Each rank writes the parts that others own, all meet, each writes the sum of its own part, all meet, each reads
    /// the sums.
    AllReduce,
}

/// Builds the ranks' programs.
struct Builder {
    model: Model,
    protocol: Protocol,
    /// Steps published so far, by rank; slots used so far.
    steps: u8,
    uses: usize,
}

impl Builder {
    fn new(ranks: usize, protocol: Protocol) -> Self {
        Builder { model: Model::new(ranks), protocol, steps: 0, uses: 0 }
    }

    fn push(&mut self, rank: usize, instruction: Instruction) {
        self.model.push(rank, instruction);
    }

    /// The bytes of `owner`'s slot that are for (or, of a sum, from) rank `part`.
    fn slot(&mut self, owner: usize, part: usize) -> Word {
        let slot = self.uses % self.protocol.slots;
        self.model.word(format!("slot {slot} of rank {owner}, part {part}"))
    }

    fn write(&mut self, rank: usize, part: usize, value: u8) {
        let word = self.slot(rank, part);
        self.push(rank, Instruction::BeginWrite(word));
        self.push(rank, Instruction::EndWrite(word, value));
    }

    fn read(&mut self, rank: usize, owner: usize, part: usize, value: u8) {
        let word = self.slot(owner, part);
        self.push(rank, Instruction::BeginRead(word));
        self.push(rank, Instruction::EndRead(word, value));
    }

    fn step(&mut self, rank: usize) -> Word {
        self.model.word(format!("step of rank {rank}"))
    }

    /// Publishes step `step` and its signature, and wakes who sleeps on it.
    fn publish(&mut self, rank: usize, step: u8) {
        let signature = self.signature(rank, step);
        self.push(rank, Instruction::Store(signature, step, Order::Relaxed));
        let word = self.step(rank);
        let store = Instruction::Store(word, step, self.protocol.publish);
        if self.protocol.waiting == Waiting::WokenEarly {
            self.wake(rank, word);
        }
        self.push(rank, store);
        if self.protocol.waiting == Waiting::Sleeps {
            self.wake(rank, word);
        }
    }

    /// Wakes who sleeps on this rank's step, if anyone does.
    fn wake(&mut self, rank: usize, step: Word) {
        let sleepers = self.model.word(format!("sleepers on rank {rank}"));
        let after = self.model.here(rank) + 2;
        self.push(rank, Instruction::JumpIfZero(sleepers, after));
        self.push(rank, Instruction::Wake(step));
    }

    fn signature(&mut self, rank: usize, step: u8) -> Word {
        let place = usize::from(step) % self.protocol.history;
        self.model.word(format!("signature {place} of rank {rank}"))
    }

    /// Waits until `peer` has published `step`, and compares signatures.
    fn wait_for(&mut self, rank: usize, peer: usize, step: u8) {
        let word = self.step(peer);
        if self.protocol.waiting == Waiting::Spins {
            self.push(rank, Instruction::Await(word, step));
        } else {
            let sleepers = self.model.word(format!("sleepers on rank {peer}"));
            let begin = self.model.here(rank);
            self.push(rank, Instruction::JumpIfReached(word, step, begin + 6));
            self.push(rank, Instruction::Add(sleepers, 1));
            self.push(rank, Instruction::JumpIfReached(word, step, begin + 4));
            self.push(rank, Instruction::Sleep(word));
            self.push(rank, Instruction::Add(sleepers, -1));
            self.push(rank, Instruction::Jump(begin));
        }
        let signature = self.signature(peer, step);
        self.push(rank, Instruction::Expect(signature, step));
    }

    fn meet(&mut self, rank: usize, step: u8) {
        self.publish(rank, step);
        let ranks = self.model.ranks();
        for distance in 1..ranks {
            self.wait_for(rank, (rank + distance) % ranks, step);
        }
    }

    /// Adds `call` to every rank's program.
    fn call(&mut self, call: Call) {
        let (ranks, first) = (self.model.ranks(), self.steps + 1);
        for rank in 0..ranks {
            let others = || (0..ranks).filter(move |other| *other != rank);
            match call {
                Call::Barrier => self.meet(rank, first),
                Call::Gather => {
                    self.write(rank, 0, first);
                    self.meet(rank, first);
                    others().for_each(|other| self.read(rank, other, 0, first));
                }
                Call::Broadcast { root } | Call::OneWayBroadcast { root } => {
                    if rank == root {
                        self.write(rank, 0, first);
                    }
                    match call {
                        Call::OneWayBroadcast { .. } if rank == root => self.publish(rank, first),
                        Call::OneWayBroadcast { .. } => {
                            self.publish(rank, first);
                            self.wait_for(rank, root, first);
                        }
                        _ => self.meet(rank, first),
                    }
                    if rank != root {
                        self.read(rank, root, 0, first);
                    }
                }
                Call::AllReduce => {
                    others().for_each(|owner| self.write(rank, owner, first));
                    self.meet(rank, first);
                    others().for_each(|other| self.read(rank, other, rank, first));
                    self.write(rank, rank, first + 1);
                    self.meet(rank, first + 1);
                    others().for_each(|owner| self.read(rank, owner, owner, first + 1));
                }
            }
        }
        self.steps += if call == Call::AllReduce { 2 } else { 1 };
        self.uses += usize::from(call != Call::Barrier);
    }
}

fn check(ranks: usize, protocol: Protocol, calls: &[Call], memory: Memory) -> Found {
    let mut builder = Builder::new(ranks, protocol);
    calls.iter().for_each(|call| builder.call(*call));
    explore(&builder.model, memory)
}

/// On the memory that does all that the others do, and more.
#[track_caller]
fn nothing_is_wrong(ranks: usize, protocol: Protocol, calls: &[Call]) {
    let found = check(ranks, protocol, calls, Memory::Unordered);
    let what = format!("{ranks} ranks, {calls:?}: {found}");
    assert!(found.fault().is_none(), "{what}");
    println!("{what}");
}

#[track_caller]
fn is_found(wrong: &str, ranks: usize, protocol: Protocol, calls: &[Call], memory: Memory) {
    let found = check(ranks, protocol, calls, memory);
    assert!(found.fault().is_some_and(|what| what.contains(wrong)), "{found}");
}

const BROADCAST: Call = Call::Broadcast { root: 0 };

#[test]
fn two_ranks_never_touch_a_slot_that_the_other_uses() {
    let calls = [Call::Barrier, Call::Gather, BROADCAST, Call::Broadcast { root: 1 }, Call::AllReduce];
    // Every sequence of three calls.
    for a in calls {
        for b in calls {
            for c in calls {
                nothing_is_wrong(2, PROTOCOL, &[a, b, c]);
            }
        }
    }
}

#[test]
fn three_ranks_never_touch_a_slot_that_another_uses() {
    nothing_is_wrong(3, PROTOCOL, &[Call::Gather, BROADCAST, Call::Gather]);
    nothing_is_wrong(3, PROTOCOL, &[BROADCAST; 4]);
    nothing_is_wrong(3, PROTOCOL, &[BROADCAST, Call::AllReduce]);
}

#[test]
fn a_sleeper_is_always_woken() {
    let protocol = Protocol { waiting: Waiting::Sleeps, ..PROTOCOL };
    nothing_is_wrong(2, protocol, &[Call::Gather; 3]);
    nothing_is_wrong(2, protocol, &[Call::Barrier; 4]);
    nothing_is_wrong(3, protocol, &[Call::Barrier; 2]);
}

#[test]
fn one_slot_is_not_enough_and_the_search_finds_it() {
    let protocol = Protocol { slots: 1, ..PROTOCOL };
    is_found("while it is being written", 2, protocol, &[Call::Gather; 2], Memory::Sequential);
    is_found("while it is being written", 3, protocol, &[BROADCAST; 2], Memory::Sequential);
}

#[test]
fn a_root_that_waits_for_nobody_overwrites_what_is_read_and_the_search_finds_it() {
    is_found(
        "while it is being written",
        2,
        PROTOCOL,
        &[Call::OneWayBroadcast { root: 0 }; 3],
        Memory::Sequential,
    );
}

#[test]
fn a_short_history_of_signatures_is_overwritten_and_the_search_finds_it() {
    let protocol = Protocol { history: 1, ..PROTOCOL };
    is_found("found 2 in signature", 2, protocol, &[Call::Barrier; 2], Memory::Sequential);
    // Two would do: nobody is ever more than one step ahead.
    nothing_is_wrong(2, Protocol { history: 2, ..PROTOCOL }, &[Call::Barrier; 4]);
    nothing_is_wrong(3, Protocol { history: 2, ..PROTOCOL }, &[Call::Barrier; 3]);
}

#[test]
fn a_step_that_is_not_sequentially_consistent_loses_a_wake_up_and_the_search_finds_it() {
    let protocol = Protocol { waiting: Waiting::Sleeps, publish: Order::Release, ..PROTOCOL };
    is_found("nobody can go on", 2, protocol, &[Call::Barrier], Memory::Buffered);
    // With every store taken at once there is nothing to lose.
    assert!(check(2, protocol, &[Call::Barrier], Memory::Sequential).fault().is_none());
}

#[test]
fn a_wake_up_that_comes_before_the_step_is_lost_and_the_search_finds_it() {
    let protocol = Protocol { waiting: Waiting::WokenEarly, ..PROTOCOL };
    is_found("nobody can go on", 2, protocol, &[Call::Barrier], Memory::Sequential);
}

#[test]
fn a_relaxed_step_shows_what_is_not_written_yet_and_the_search_finds_it() {
    let protocol = Protocol { publish: Order::Relaxed, ..PROTOCOL };
    is_found("found 0 in signature", 2, protocol, &[Call::Barrier], Memory::Unordered);
    assert!(check(2, protocol, &[Call::Gather], Memory::Buffered).fault().is_none());
}
