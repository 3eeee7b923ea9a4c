//! Steps of movement: from fixed places to fixed places, and a broadcast that its receivers help to spread

use std::ops::Range;

use super::exchange::Step;

/// The step in which everything has its place beforehand.
pub(super) struct Places<'a, S, R> {
    /// Where `send` points; `None` if into `output`.
    pub(super) input: Option<&'a [u8]>,
    pub(super) output: &'a mut [u8],
    /// What goes to a peer.
    pub(super) send: S,
    /// Where what comes from a peer goes, in `output`.
    pub(super) recv: R,
}

impl<S, R> Step for Places<'_, S, R>
where
    S: Fn(usize) -> Option<Range<usize>>,
    R: Fn(usize) -> Option<Range<usize>>,
{
    fn send_len(&self, peer: usize) -> Option<usize> {
        (self.send)(peer).map(|range| range.len())
    }

    fn recv_len(&self, peer: usize) -> Option<usize> {
        (self.recv)(peer).map(|range| range.len())
    }

    fn outgoing(&mut self, peer: usize, at: usize) -> &[u8] {
        let range = (self.send)(peer).unwrap_or_default();
        &self.input.unwrap_or(self.output)[range][at..]
    }

    fn incoming(&mut self, peer: usize, at: usize) -> &mut [u8] {
        let range = (self.recv)(peer).unwrap_or_default();
        &mut self.output[range][at..]
    }
}

/// A broadcast in which the root sends each of the others a different part, which it passes on to the rest while it
/// still comes in: the root sends everything once, not once per rank.
pub(super) struct Relay<'a> {
    pub(super) data: &'a mut [u8],
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) root: usize,
    /// How much of this rank's part has come from the root.
    pub(super) have: usize,
}

impl Relay<'_> {
    /// The part that goes by way of `rank`, which is not the root.
    fn part(&self, rank: usize) -> Range<usize> {
        let (len, index) = (self.data.len(), if rank > self.root { rank - 1 } else { rank });
        let per = len.div_ceil(self.world - 1);
        (index * per).min(len)..((index + 1) * per).min(len)
    }

    /// Bytes that go from one rank to another.
    fn flow(&self, from: usize, to: usize) -> Range<usize> {
        match (from == self.root, to == self.root) {
            (_, true) => 0..0,
            (true, false) => self.part(to),
            (false, false) => self.part(from),
        }
    }
}

impl Step for Relay<'_> {
    fn send_len(&self, peer: usize) -> Option<usize> {
        Some(self.flow(self.rank, peer).len())
    }

    fn recv_len(&self, peer: usize) -> Option<usize> {
        Some(self.flow(peer, self.rank).len())
    }

    fn outgoing(&mut self, peer: usize, at: usize) -> &[u8] {
        let flow = self.flow(self.rank, peer);
        let known = if self.rank == self.root { flow.len() } else { self.have.min(flow.len()) };
        &self.data[flow][at..known.max(at)]
    }

    fn incoming(&mut self, peer: usize, at: usize) -> &mut [u8] {
        let flow = self.flow(peer, self.rank);
        &mut self.data[flow][at..]
    }

    fn arrived(&mut self, peer: usize, at: usize) {
        if peer == self.root {
            self.have = at;
        }
    }
}
