//! The protocol of the memory that ranks share, checked in every interleaving of two and three ranks
//!
//! The programs below are those of `host/segment.rs` and `host/shm/`, instruction by instruction: what is written and
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
    /// Cells of each rank, taken in turns.
    cells: usize,
    waiting: Waiting,
    /// Of the store that publishes a step.
    publish: Order,
    closing: Closing,
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

/// How calls end in which ranks use each other's own memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closing {
    /// With a step.
    Meet,
    /// With nothing: wrong.
    None,
}

const PROTOCOL: Protocol =
    Protocol { slots: 2, cells: 4, waiting: Waiting::Spins, publish: Order::SeqCst, closing: Closing::Meet };

/// Calls of which each rank's program is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Barrier,
    /// Each rank shows what it has in its cell: the smallest calls.
    InCells,
    /// Each rank shows what it has in its slot, all meet, each reads all others.
    InSlots,
    /// The root shows, all meet, the others read.
    Broadcast {
        root: usize,
    },
    /// As a broadcast, but the root does not wait for those who read: wrong.
    OneWayBroadcast {
        root: usize,
    },
    /// Each rank shows the parts that others own, all meet, each shows the sum of its own part, all meet, each reads
    /// the sums.
    AllReduce,
    /// All meet, each reads the others' own memory, all meet; then it is its owner's again.
    Direct,
    /// All meet, each reads its part of everyone's memory, writes the sum to everyone's, all meet.
    AllReduceInHeap,
}

impl Call {
    const ALL: [Call; 7] = [
        Call::Barrier,
        Call::InCells,
        Call::InSlots,
        Call::Broadcast { root: 0 },
        Call::AllReduce,
        Call::Direct,
        Call::AllReduceInHeap,
    ];

    fn steps(self) -> u8 {
        if matches!(self, Call::AllReduce | Call::Direct | Call::AllReduceInHeap) { 2 } else { 1 }
    }

    fn uses_slots(self) -> bool {
        use Call::{AllReduce, Broadcast, InSlots, OneWayBroadcast};
        matches!(self, InSlots | Broadcast { .. } | OneWayBroadcast { .. } | AllReduce)
    }
}

/// Builds the ranks' programs.
struct Builder {
    model: Model,
    protocol: Protocol,
    /// Steps so far, and uses of the slots.
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

    /// Part `part` of `owner`'s own memory.
    fn own(&mut self, owner: usize, part: usize) -> Word {
        self.model.word(format!("memory of rank {owner}, part {part}"))
    }

    /// A field of the cell that `rank` has for `step`.
    fn cell(&mut self, rank: usize, step: u8, field: &str) -> Word {
        let cell = usize::from(step) % self.protocol.cells;
        self.model.word(format!("{field} in cell {cell} of rank {rank}"))
    }

    fn write(&mut self, rank: usize, word: Word, value: u8) {
        self.push(rank, Instruction::BeginWrite(word));
        self.push(rank, Instruction::EndWrite(word, value));
    }

    fn read(&mut self, rank: usize, word: Word, value: u8) {
        self.push(rank, Instruction::BeginRead(word));
        self.push(rank, Instruction::EndRead(word, value));
    }

    /// Fills a cell, publishes its step, and wakes who sleeps on it.
    fn publish(&mut self, rank: usize, step: u8, call: Call) {
        let signature = self.cell(rank, step, "signature");
        self.push(rank, Instruction::Store(signature, step, Order::Relaxed));
        if call == Call::InCells {
            let payload = self.cell(rank, step, "payload");
            self.push(rank, Instruction::Store(payload, step, Order::Relaxed));
        }
        let word = self.cell(rank, step, "step");
        let store = Instruction::Store(word, step, self.protocol.publish);
        if self.protocol.waiting == Waiting::WokenEarly {
            self.wake(rank, step, word);
        }
        self.push(rank, store);
        if self.protocol.waiting == Waiting::Sleeps {
            self.wake(rank, step, word);
        }
    }

    /// Wakes who sleeps on this cell, if anyone does.
    fn wake(&mut self, rank: usize, step: u8, word: Word) {
        let sleepers = self.cell(rank, step, "sleepers");
        let after = self.model.here(rank) + 2;
        self.push(rank, Instruction::JumpIfZero(sleepers, after));
        self.push(rank, Instruction::Wake(word));
    }

    /// Waits until `peer` has published `step`, and compares signatures.
    fn wait_for(&mut self, rank: usize, peer: usize, step: u8) {
        let word = self.cell(peer, step, "step");
        if self.protocol.waiting == Waiting::Spins {
            self.push(rank, Instruction::Await(word, step));
        } else {
            let sleepers = self.cell(peer, step, "sleepers");
            let begin = self.model.here(rank);
            self.push(rank, Instruction::JumpIfEqual(word, step, begin + 6));
            self.push(rank, Instruction::Add(sleepers, 1));
            self.push(rank, Instruction::JumpIfEqual(word, step, begin + 4));
            self.push(rank, Instruction::Sleep(word));
            self.push(rank, Instruction::Add(sleepers, -1));
            self.push(rank, Instruction::Jump(begin));
        }
        let signature = self.cell(peer, step, "signature");
        self.push(rank, Instruction::Expect(signature, step));
    }

    fn meet(&mut self, rank: usize, step: u8, call: Call) {
        self.publish(rank, step, call);
        let ranks = self.model.ranks();
        for peer in (rank + 1..ranks).chain(0..rank) {
            self.wait_for(rank, peer, step);
        }
    }

    /// Adds `call` to every rank's program.
    fn call(&mut self, call: Call) {
        for rank in 0..self.model.ranks() {
            self.call_of(rank, call);
        }
        self.steps += call.steps();
        self.uses += usize::from(call.uses_slots());
    }

    fn call_of(&mut self, rank: usize, call: Call) {
        let (ranks, first) = (self.model.ranks(), self.steps + 1);
        let others = || (0..ranks).filter(move |other| *other != rank);
        match call {
            Call::Barrier => self.meet(rank, first, call),
            Call::InCells => {
                self.meet(rank, first, call);
                for other in 0..ranks {
                    let payload = self.cell(other, first, "payload");
                    self.push(rank, Instruction::Expect(payload, first));
                }
            }
            Call::InSlots => {
                let mine = self.slot(rank, 0);
                self.write(rank, mine, first);
                self.meet(rank, first, call);
                for other in others() {
                    let theirs = self.slot(other, 0);
                    self.read(rank, theirs, first);
                }
            }
            Call::Broadcast { root } | Call::OneWayBroadcast { root } => {
                let shown = self.slot(root, 0);
                if rank == root {
                    self.write(rank, shown, first);
                }
                match call {
                    Call::OneWayBroadcast { .. } if rank == root => self.publish(rank, first, call),
                    Call::OneWayBroadcast { .. } => {
                        self.publish(rank, first, call);
                        self.wait_for(rank, root, first);
                    }
                    _ => self.meet(rank, first, call),
                }
                if rank != root {
                    self.read(rank, shown, first);
                }
            }
            Call::AllReduce => {
                for owner in others() {
                    let part = self.slot(rank, owner);
                    self.write(rank, part, first);
                }
                self.meet(rank, first, call);
                for other in others() {
                    let part = self.slot(other, rank);
                    self.read(rank, part, first);
                }
                let sum = self.slot(rank, rank);
                self.write(rank, sum, first + 1);
                self.meet(rank, first + 1, call);
                for owner in others() {
                    let sum = self.slot(owner, owner);
                    self.read(rank, sum, first + 1);
                }
            }
            Call::Direct => {
                let mine = self.own(rank, 0);
                self.write(rank, mine, first);
                self.meet(rank, first, call);
                for other in others() {
                    let theirs = self.own(other, 0);
                    self.read(rank, theirs, first);
                }
                self.close(rank, first + 1, call);
            }
            Call::AllReduceInHeap => {
                for part in 0..ranks {
                    let mine = self.own(rank, part);
                    self.write(rank, mine, first);
                }
                self.meet(rank, first, call);
                let part: Vec<Word> = (0..ranks).map(|other| self.own(other, rank)).collect();
                part.iter().for_each(|word| self.read(rank, *word, first));
                part.iter().for_each(|word| self.write(rank, *word, first + 1));
                self.close(rank, first + 1, call);
                for part in 0..ranks {
                    let sum = self.own(rank, part);
                    self.read(rank, sum, first + 1);
                }
            }
        }
    }

    fn close(&mut self, rank: usize, step: u8, call: Call) {
        if self.protocol.closing == Closing::Meet {
            self.meet(rank, step, call);
        }
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
fn two_ranks_never_touch_what_the_other_uses() {
    for a in Call::ALL {
        for b in Call::ALL {
            for c in Call::ALL {
                nothing_is_wrong(2, PROTOCOL, &[a, b, c]);
            }
        }
    }
}

#[test]
fn three_ranks_never_touch_what_another_uses() {
    nothing_is_wrong(3, PROTOCOL, &[Call::InSlots, BROADCAST, Call::InSlots]);
    nothing_is_wrong(3, PROTOCOL, &[BROADCAST, Call::Broadcast { root: 1 }, BROADCAST, BROADCAST]);
    nothing_is_wrong(3, PROTOCOL, &[Call::InCells; 6]);
    nothing_is_wrong(3, PROTOCOL, &[BROADCAST, Call::AllReduce]);
    nothing_is_wrong(3, PROTOCOL, &[Call::Direct, Call::InCells, Call::Direct]);
}

#[test]
fn a_sleeper_is_always_woken() {
    let protocol = Protocol { waiting: Waiting::Sleeps, ..PROTOCOL };
    // Once around the cells, where sleepers of an earlier step may still be counted.
    nothing_is_wrong(2, protocol, &[Call::Barrier; 6]);
    nothing_is_wrong(2, Protocol { cells: 2, ..protocol }, &[Call::InSlots; 3]);
    nothing_is_wrong(3, protocol, &[Call::Barrier; 2]);
}

#[test]
fn one_slot_is_not_enough_and_the_search_finds_it() {
    let protocol = Protocol { slots: 1, ..PROTOCOL };
    is_found("while it is being written", 2, protocol, &[Call::InSlots; 2], Memory::Sequential);
    is_found("while it is being written", 3, protocol, &[BROADCAST; 2], Memory::Sequential);
}

#[test]
fn a_root_that_waits_for_nobody_overwrites_what_is_read_and_the_search_finds_it() {
    let calls = [Call::OneWayBroadcast { root: 0 }; 3];
    is_found("while it is being written", 2, PROTOCOL, &calls, Memory::Sequential);
}

#[test]
fn memory_that_is_not_given_back_by_a_step_is_overwritten_and_the_search_finds_it() {
    let protocol = Protocol { closing: Closing::None, ..PROTOCOL };
    is_found("while", 2, protocol, &[Call::Direct; 2], Memory::Sequential);
    is_found("not 2", 2, protocol, &[Call::AllReduceInHeap], Memory::Sequential);
}

#[test]
fn one_cell_is_overwritten_before_it_is_seen_and_the_search_finds_it() {
    let protocol = Protocol { cells: 1, ..PROTOCOL };
    is_found("nobody can go on", 2, protocol, &[Call::Barrier; 2], Memory::Sequential);
    // Two would do: nobody is ever more than one step ahead.
    nothing_is_wrong(2, Protocol { cells: 2, ..PROTOCOL }, &[Call::InCells; 4]);
    nothing_is_wrong(3, Protocol { cells: 2, ..PROTOCOL }, &[Call::InCells; 4]);
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
    assert!(check(2, protocol, &[Call::InSlots], Memory::Buffered).fault().is_none());
}
