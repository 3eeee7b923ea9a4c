//! Ranks as threads of one process: the reference that every other backend is compared with
//!
//! Each call copies its contribution to a board that the ranks share; once all have come, every rank computes its
//! own result from all contributions. Simple before fast: it is for tests, for examples and for small jobs.

mod board;
mod world;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use self::board::{Board, Posted};
pub use self::world::World;
use crate::buffer::{AlignedBytes, element_bytes};
use crate::communicator::{Communicator, GroupOptions, Sharing};
use crate::error::{Error, Result};
use crate::group::{check_members, rebuilt_before};
use crate::live::{LiveGroups, Made};
use crate::operation::{Call, Exchange, HostOperation, Operation, Signature, digest};
use crate::reduce::fold_bytes;
use crate::single::Single;

/// One rank's end of a group of threads.
#[derive(Debug)]
struct Local {
    board: Arc<Board>,
    rank: usize,
    groups: AtomicUsize,
    /// The groups of this rank that others may share: one table in a world.
    live: Arc<LiveGroups<Local>>,
    /// Whether another group has been made, or tried to be, in the place of this one.
    is_rebuilt: AtomicBool,
}

/// Bytes `index` of `of` equal parts.
fn part(bytes: &[u8], index: usize, of: usize) -> &[u8] {
    let n = bytes.len() / of;
    &bytes[index * n..(index + 1) * n]
}

impl Local {
    fn new(board: Arc<Board>, rank: usize, live: Arc<LiveGroups<Local>>) -> Arc<Self> {
        let (groups, is_rebuilt) = (AtomicUsize::new(0), AtomicBool::new(false));
        Arc::new(Local { board, rank, groups, live, is_rebuilt })
    }

    /// This rank's result from everyone's contribution.
    fn result(&self, operation: HostOperation<'_>, posted: &[Posted]) {
        let (rank, world) = (self.rank, self.world_size());
        let all: Vec<&[u8]> = posted.iter().map(|p| p.bytes.as_slice()).collect();
        match operation {
            Operation::AllReduce { mut data, op } => fold_bytes(op, data.dtype(), &all, data.bytes_mut()),
            Operation::AllReduceInto { mut output, op, .. } => {
                fold_bytes(op, output.dtype(), &all, output.bytes_mut());
            }
            Operation::ReduceScatterInPlace { mut data, op } => {
                let parts: Vec<&[u8]> = all.iter().map(|bytes| part(bytes, rank, world)).collect();
                let (dtype, n) = (data.dtype(), data.bytes().len() / world);
                fold_bytes(op, dtype, &parts, &mut data.bytes_mut()[rank * n..][..n]);
            }
            Operation::Reduce { mut data, op, root } => {
                if rank == root {
                    fold_bytes(op, data.dtype(), &all, data.bytes_mut());
                }
            }
            Operation::ReduceScatter { mut output, op, .. } => {
                let parts: Vec<&[u8]> = all.iter().map(|bytes| part(bytes, rank, world)).collect();
                fold_bytes(op, output.dtype(), &parts, output.bytes_mut());
            }
            Operation::AllGather { mut output, .. } | Operation::AllGatherInPlace { data: mut output } => {
                concatenate(&all, output.bytes_mut());
            }
            Operation::AllGatherV { counts, mut output, .. } => {
                let size = element_bytes(output.dtype());
                debug_assert!(all.iter().zip(counts).all(|(bytes, n)| bytes.len() == n * size));
                concatenate(&all, output.bytes_mut());
            }
            Operation::Gather { mut output, root, .. } => {
                if rank == root {
                    concatenate(&all, output.bytes_mut());
                }
            }
            Operation::Broadcast { mut data, root } => {
                if rank != root {
                    data.bytes_mut().copy_from_slice(all[root]);
                }
            }
            Operation::Scatter { mut output, root, .. } => {
                output.bytes_mut().copy_from_slice(part(all[root], rank, world));
            }
            Operation::AllToAll { mut output, .. } => {
                let parts: Vec<&[u8]> = all.iter().map(|bytes| part(bytes, rank, world)).collect();
                concatenate(&parts, output.bytes_mut());
            }
            // Exchanged in two rounds by `all_to_all_v`.
            Operation::AllToAllV { .. }
            | Operation::Barrier
            | Operation::Send { .. }
            | Operation::Recv { .. } => {}
        }
    }
}

fn concatenate(parts: &[&[u8]], mut output: &mut [u8]) {
    for part in parts {
        let (here, rest) = output.split_at_mut(part.len());
        here.copy_from_slice(part);
        output = rest;
    }
}

impl Communicator for Local {
    fn name(&self) -> &str {
        self.board.name()
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> &[usize] {
        self.board.ranks()
    }

    fn run_within(&self, operation: Operation<'_>, timeout: Option<Duration>) -> Result<()> {
        operation.check(self.rank, self.world_size(), self.name())?;
        let operation = operation.on_host()?;
        let signature = operation.signature(self.world_size());
        match operation {
            Operation::Send { data, to } => {
                let bytes = AlignedBytes::copy_of(data.bytes());
                self.board.send(self.rank, to, Posted { signature, bytes })
            }
            Operation::Recv { mut data, from } => {
                let bytes = self.board.receive(self.rank, from, signature, timeout)?;
                data.bytes_mut().copy_from_slice(bytes.as_slice());
                Ok(())
            }
            Operation::AllToAllV { input, send_counts, mut output, recv_counts } => {
                let row = Exchange::row(send_counts, recv_counts);
                let bytes = AlignedBytes::copy_of(bytemuck::cast_slice(&row));
                let rows = self.board.exchange(self.rank, Posted { signature, bytes }, timeout)?;
                let rows: Vec<u64> =
                    rows.iter().flat_map(|row| bytemuck::cast_slice(row.bytes.as_slice())).copied().collect();
                let exchange = Exchange { counts: &rows, world: self.world_size() };
                if let Some((from, sent, to, expected)) = exchange.disagreement(signature) {
                    return Err(self.board.disagree((from, sent), (to, expected)));
                }
                let bytes = AlignedBytes::copy_of(input.bytes());
                let posted = self.board.exchange(self.rank, Posted { signature, bytes }, timeout)?;
                let size = element_bytes(output.dtype());
                let piece = |from: usize| {
                    let start = exchange.offset(from, self.rank) * size;
                    &posted[from].bytes.as_slice()[start..][..exchange.sent(from, self.rank) * size]
                };
                let pieces: Vec<&[u8]> = (0..posted.len()).map(piece).collect();
                concatenate(&pieces, output.bytes_mut());
                Ok(())
            }
            collective => {
                let bytes = AlignedBytes::copy_of(collective.contribution(self.rank, self.world_size()));
                let posted = self.board.exchange(self.rank, Posted { signature, bytes }, timeout)?;
                self.result(collective, &posted);
                Ok(())
            }
        }
    }

    /// A rank whose thread has returned or panicked counts as dead.
    fn rebuild(&self, timeout: Duration) -> Result<Arc<dyn Communicator>> {
        if self.is_rebuilt.swap(true, Ordering::Relaxed) {
            return Err(rebuilt_before(self));
        }
        let board = self.board.successor(self.rank, timeout)?;
        let me = self.ranks()[self.rank];
        if board.ranks() == [me] {
            return Ok(Single::group(board.name().into(), me));
        }
        let rank = board.ranks().iter().position(|rank| *rank == me).unwrap_or_default();
        Ok(Local::new(board, rank, self.live.clone()))
    }

    fn failure(&self, _call: Call) -> Option<Error> {
        self.board.death()
    }

    fn poison(&self, error: &Error) {
        self.board.die(error.clone());
    }

    fn subgroup_with(
        &self,
        ranks: &[usize],
        options: &GroupOptions,
    ) -> Result<Option<Arc<dyn Communicator>>> {
        check_members(self, ranks)?;
        let is_member = ranks.contains(&self.rank);
        let world_ranks: Vec<usize> = ranks.iter().map(|r| self.ranks()[*r]).collect();
        let timeout = options.timeout.unwrap_or(self.board.timeout());
        let made = Made { ranks: world_ranks, timeout };
        let shared = options.sharing == Sharing::Shared;
        let held = if shared { self.live.find(&made, |group| !group.board.is_dead()) } else { None };

        let digest = digest(ranks.iter().copied().chain([options.sharing as usize]));
        let signature = Signature { digest, ..Signature::bare(Call::Subgroup) };
        let bytes = AlignedBytes::copy_of(&[u8::from(shared && (held.is_some() || !is_member))]);
        let posted = self.board.exchange(self.rank, Posted { signature, bytes }, None)?;
        let index = self.groups.fetch_add(1, Ordering::Relaxed);
        let Some(rank) = ranks.iter().position(|r| *r == self.rank) else { return Ok(None) };
        let name = format!("{}/{index}", self.name());
        if ranks.len() == 1 {
            return Ok(Some(Single::group(name, made.ranks[0])));
        }
        if posted.iter().all(|posted| posted.bytes.as_slice() == [1]) {
            return Ok(held.map(|group| group as Arc<dyn Communicator>));
        }
        let board = self.board.child(name, made.ranks.clone(), timeout);
        let group = Local::new(board, rank, self.live.clone());
        if shared {
            self.live.insert(made, &group);
        }
        Ok(Some(group))
    }
}
