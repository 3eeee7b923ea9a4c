//! Which ranks of a group share a machine, and who speaks for whom between machines

use std::ops::Range;

/// The machines of a group whose ranks follow each other machine by machine, more than one machine and somewhere more
/// than one rank on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Topology {
    /// The ranks of each machine.
    pub(super) hosts: Vec<Range<usize>>,
    /// Which of `hosts` this rank is on.
    pub(super) mine: usize,
    pub(super) rank: usize,
}

impl Topology {
    /// `machines` names that of each rank. `None` if the ranks of a machine do not follow each other, or if two levels
    /// would be no better than one.
    pub(super) fn new<T: PartialEq>(machines: &[T], rank: usize) -> Option<Self> {
        let mut hosts: Vec<Range<usize>> = Vec::new();
        for (index, machine) in machines.iter().enumerate() {
            match hosts.iter().position(|host| machines[host.start] == *machine) {
                None => hosts.push(index..index + 1),
                Some(host) if host + 1 == hosts.len() => hosts[host].end = index + 1,
                Some(_) => return None,
            }
        }
        let mine = hosts.iter().position(|host| host.contains(&rank))?;
        (1 < hosts.len() && hosts.len() < machines.len()).then_some(Topology { hosts, mine, rank })
    }

    pub(super) fn host(&self) -> Range<usize> {
        self.hosts[self.mine].clone()
    }

    /// This rank's place on its machine.
    pub(super) fn local(&self) -> usize {
        self.rank - self.hosts[self.mine].start
    }

    /// Lanes between machines: one per rank of the smallest. The first ranks of each machine have one each.
    pub(super) fn lanes(&self) -> usize {
        self.hosts.iter().map(|host| host.len()).min().unwrap_or(1)
    }

    /// Ranks of the fullest machine.
    pub(super) fn most(&self) -> usize {
        self.hosts.iter().map(|host| host.len()).max().unwrap_or(1)
    }

    /// The rank at the other end of `lane` on machine `host`.
    pub(super) fn end(&self, host: usize, lane: usize) -> usize {
        self.hosts[host].start + lane
    }

    /// The machine that `peer` is on, if it is another one and `peer` is at the end of `lane`.
    pub(super) fn across(&self, lane: usize, peer: usize) -> Option<usize> {
        let host = self.hosts.iter().position(|host| host.contains(&peer))?;
        (host != self.mine && self.end(host, lane) == peer).then_some(host)
    }

    /// Which machine `peer` is on.
    pub(super) fn host_of(&self, peer: usize) -> usize {
        self.hosts.iter().position(|host| host.contains(&peer)).unwrap_or_default()
    }
}

/// The `index`-th of `n` shares of `length` units, as equal as can be, the last ones shorter.
pub(super) fn share(length: usize, n: usize, index: usize) -> Range<usize> {
    let per = length.div_ceil(n.max(1));
    (index * per).min(length)..((index + 1) * per).min(length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn two_levels_need_machines_whose_ranks_follow_each_other() {
        let topology = Topology::new(&["a", "a", "b"], 2).unwrap();
        assert_eq!((topology.hosts.clone(), topology.mine, topology.lanes()), (vec![0..2, 2..3], 1, 1));
        assert_eq!((topology.across(0, 0), topology.across(0, 1)), (Some(0), None));
        // One machine; each rank on its own; interleaved.
        for machines in [["a", "a", "a", "a"], ["a", "b", "c", "d"], ["a", "b", "a", "b"]] {
            assert_eq!(Topology::new(&machines, 1), None, "{machines:?}");
        }
    }

    proptest! {
        #[test]
        fn shares_follow_each_other_and_leave_nothing(length in 0usize..1000, n in 1usize..10) {
            let mut next = 0;
            for index in 0..n {
                let share = share(length, n, index);
                prop_assert_eq!(share.start, next);
                next = share.end;
            }
            prop_assert_eq!(next, length);
        }
    }
}
