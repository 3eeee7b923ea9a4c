//! What ranks tell each other first in a call made of several: which call it is, how long their data is, and, where it
//! is short, the data itself
//!
//! Calls on objects, maps and lists of tensors have arguments that differ in length, and that a rank may fail to
//! produce. Each begins with one block of fixed size from every rank. So all know what comes before they commit
//! themselves to it, what is short needs no second call, and whoever cannot take part says why, in place of its data.

use serde::{Deserialize, Serialize};

use crate::buffer::{AlignedBytes, Host, HostMut};
use crate::communicator::{Communicator, CommunicatorExt};
use crate::error::{Error, Result};
use crate::op::Dtype;
use crate::operation::{Call, Operation, Signature};

/// Signature and length.
const HEADER_BYTES: usize = 32;

/// Bytes of a block.
const BLOCK_BYTES: usize = 1024;

/// The longest data that travels in the block itself.
pub(crate) const INLINE_BYTES: usize = BLOCK_BYTES - HEADER_BYTES;

/// The length of a rank that cannot take part.
const REFUSED: u64 = u64::MAX;

/// The longest data of one rank. Lengths come from other processes and are checked before memory is asked for.
const LONGEST: u64 = 1 << 36;

/// The longest text of an error that travels.
const TEXT_BYTES: usize = 400;

/// Why a rank cannot take part, as it tells the others.
#[derive(Debug, Serialize, Deserialize)]
enum Refusal {
    Encode { what: String },
    Argument { got: String, expected: String },
}

/// What all ranks have said.
pub(crate) struct Blocks {
    /// Aligned, and so is the data in each block: it can be read as elements where it is.
    bytes: AlignedBytes,
    signatures: Vec<Signature>,
}

/// One block: the signature, the length of `data` and, if it fits, `data`; or why there is none.
pub(crate) fn block(signature: Signature, data: Result<&[u8], &Error>) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    let refusal;
    let (length, inline) = match data {
        Ok(data) => (data.len() as u64, if data.len() <= INLINE_BYTES { data } else { &[] }),
        Err(error) => {
            refusal = refuse(error);
            (REFUSED, &refusal[..])
        }
    };
    let (header, body) = block.split_at_mut(HEADER_BYTES);
    let words = signature.encode().into_iter().chain([length]);
    for (place, word) in header.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    // A refusal is bounded, too; the rest of a longer one would say nothing.
    let length = inline.len().min(INLINE_BYTES);
    body[..length].copy_from_slice(&inline[..length]);
    block
}

fn refuse(error: &Error) -> Vec<u8> {
    let cut = |text: &str| text.chars().take(TEXT_BYTES / 4).collect::<String>();
    let refusal = match error {
        Error::Argument { got, expected, .. } => Refusal::Argument { got: cut(got), expected: cut(expected) },
        Error::Encode { source, .. } => Refusal::Encode { what: cut(&source.to_string()) },
        other => Refusal::Encode { what: cut(&other.to_string()) },
    };
    // Two short texts can always be written.
    rmp_serde::to_vec_named(&refusal).unwrap_or_default()
}

/// The error of `rank`, as it told it.
fn refused<C: Communicator + ?Sized>(comm: &C, call: Call, rank: usize, inline: &[u8]) -> Error {
    let (group, rank) = (comm.name().to_string(), comm.ranks()[rank]);
    let mut rest = inline;
    match rmp_serde::from_read(&mut rest) {
        Ok(Refusal::Argument { got, expected }) => Error::Argument { call, group, rank, got, expected },
        Ok(Refusal::Encode { what }) => {
            let source = rmp_serde::encode::Error::Syntax(what).into();
            Error::Encode { call, group, rank, source }
        }
        Err(_) => garbled(rank),
    }
}

fn garbled(rank: usize) -> Error {
    Error::Protocol { rank, got: "a block that is none".into(), expected: "a call, a length and data".into() }
}

fn word(block: &[u8], index: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&block[8 * index..8 * index + 8]);
    u64::from_le_bytes(bytes)
}

fn signature(block: &[u8]) -> Option<Signature> {
    Signature::decode([word(block, 0), word(block, 1), word(block, 2)])
}

fn length(block: &[u8]) -> u64 {
    word(block, 3)
}

impl Blocks {
    /// Tells every rank this one's `signature` and `data`, and hears theirs.
    ///
    /// # Errors
    /// This rank's own error if `data` is one, on the others the error of the first rank that had one: all ranks
    /// are then as far as before the call. [`Error::Mismatch`] if a rank made another call.
    pub(crate) fn exchange<C: Communicator + ?Sized>(
        comm: &C,
        signature: Signature,
        data: Result<&[u8], &Error>,
    ) -> Result<Self> {
        let mut bytes = AlignedBytes::zeroed(comm.world_size() * BLOCK_BYTES);
        let block = block(signature, data);
        let (input, output) = (Host::block(&block).into(), HostMut::block(bytes.as_mut_slice()).into());
        comm.run(Operation::AllGather { input, output })?;
        Self::read(bytes, comm.ranks())?.or_refusal(comm, data.err())
    }

    /// As [`exchange`](Blocks::exchange), where only the root has something to say: its block, and its `table`, which
    /// is as long on every rank.
    pub(crate) fn from_root<C: Communicator + ?Sized>(
        comm: &C,
        signature: Signature,
        data: Result<&[u8], &Error>,
        root: usize,
        table: &mut [u64],
    ) -> Result<Self> {
        let mut bytes = block(signature, data).to_vec();
        bytes.extend(table.iter().flat_map(|n| n.to_le_bytes()));
        comm.run(Operation::Broadcast { data: HostMut::block(&mut bytes).into(), root })?;
        for (index, n) in table.iter_mut().enumerate() {
            *n = word(&bytes[BLOCK_BYTES..], index);
        }
        let block = AlignedBytes::copy_of(&bytes[..BLOCK_BYTES]);
        let blocks = Self::read(block, &comm.ranks()[root..=root])?;
        if blocks.signatures[0].call != signature.call {
            let (rank, other) = (comm.ranks()[comm.rank()], comm.ranks()[root]);
            return Err(mismatch(comm, (rank, signature), (other, blocks.signatures[0])));
        }
        let own = if comm.rank() == root { data.err() } else { None };
        match blocks.length(0) {
            REFUSED => {
                Err(own.cloned().unwrap_or_else(|| refused(comm, signature.call, root, blocks.inline(0))))
            }
            _ => Ok(blocks),
        }
    }

    /// Reads the blocks of `ranks` of the world.
    fn read(bytes: AlignedBytes, ranks: &[usize]) -> Result<Self> {
        let all = bytes.as_slice();
        let mut signatures = Vec::with_capacity(all.len() / BLOCK_BYTES);
        for (rank, block) in ranks.iter().zip(all.chunks_exact(BLOCK_BYTES)) {
            let length = length(block);
            match signature(block).filter(|_| length == REFUSED || length <= LONGEST) {
                Some(signature) => signatures.push(signature),
                None => return Err(garbled(*rank)),
            }
        }
        Ok(Blocks { bytes, signatures })
    }

    fn or_refusal<C: Communicator + ?Sized>(self, comm: &C, own: Option<&Error>) -> Result<Self> {
        // Other calls first: their data means something else.
        let same = |s: &Signature| (s.call, s.root, s.dtype) == self.kind(0);
        if let Some(odd) = self.signatures.iter().position(|s| !same(s)) {
            let (rank, other) = (comm.ranks()[0], comm.ranks()[odd]);
            return Err(mismatch(comm, (rank, self.signatures[0]), (other, self.signatures[odd])));
        }
        let call = self.signatures[0].call;
        match (0..self.signatures.len()).find(|rank| self.length(*rank) == REFUSED) {
            None => Ok(self),
            Some(rank) => Err(own.cloned().unwrap_or_else(|| refused(comm, call, rank, self.inline(rank)))),
        }
    }

    fn kind(&self, rank: usize) -> (Call, Option<u32>, Option<Dtype>) {
        let signature = self.signatures[rank];
        (signature.call, signature.root, signature.dtype)
    }

    /// Whether all ranks have the same arguments, not just the same call.
    pub(crate) fn agree(&self) -> bool {
        self.signatures.iter().all(|signature| *signature == self.signatures[0])
    }

    /// Length of `rank`'s data; in [`from_root`](Blocks::from_root), of the root's at 0.
    fn length(&self, rank: usize) -> u64 {
        length(&self.bytes.as_slice()[rank * BLOCK_BYTES..])
    }

    /// Bytes of `rank`'s data, wherever they travel.
    pub(crate) fn data_bytes(&self, rank: usize) -> usize {
        self.length(rank) as usize
    }

    /// Bytes of `rank`'s data that did not fit into its block: all or none.
    pub(crate) fn outside(&self, rank: usize) -> usize {
        let bytes = self.data_bytes(rank);
        if bytes > INLINE_BYTES { bytes } else { 0 }
    }

    /// `rank`'s data, if it was short; else nothing of use. Elements of any type may be read where it begins.
    pub(crate) fn inline(&self, rank: usize) -> &[u8] {
        let bytes = self.data_bytes(rank).min(INLINE_BYTES);
        &self.bytes.as_slice()[rank * BLOCK_BYTES + HEADER_BYTES..][..bytes]
    }

    /// Number of ranks heard.
    pub(crate) fn ranks(&self) -> usize {
        self.signatures.len()
    }
}

/// Ranks made different calls, which the collective that both began with has not noticed: the group is dead, as it would be
/// then.
fn mismatch<C: Communicator + ?Sized>(
    comm: &C,
    (rank, mine): (usize, Signature),
    (other, theirs): (usize, Signature),
) -> Error {
    // The lower rank first, whoever noticed.
    let ((rank, mine), (other, theirs)) =
        if rank < other { ((rank, mine), (other, theirs)) } else { ((other, theirs), (rank, mine)) };
    let (group, mine, theirs) = (comm.name().into(), Box::new(mine), Box::new(theirs));
    let error = Error::Mismatch { group, rank, mine, other, theirs };
    comm.poison(&error);
    error
}
