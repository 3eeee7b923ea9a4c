//! Who is missing where, and who waits for whom in a circle

use std::collections::{BTreeMap, BTreeSet};

use super::{Flight, Ranks, Status};

/// What is known of a rank's present: by its rank in the world.
pub(crate) type Known = BTreeMap<usize, Status>;

/// One rank that waits for the next in a circle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Edge {
    pub(crate) rank: usize,
    pub(crate) group: String,
    pub(crate) group_id: u64,
    pub(crate) call: Option<crate::operation::Signature>,
}

/// A circle of ranks through `start` of whom each waits for the next: none of them can go on. Only calls count that have
/// said for whom they wait; whoever is in no call may yet come.
pub(crate) fn cycle(known: &Known, start: usize) -> Option<Vec<Edge>> {
    fn search(
        known: &Known,
        start: usize,
        rank: usize,
        seen: &mut BTreeSet<usize>,
        path: &mut Vec<Edge>,
    ) -> bool {
        // A rank whose threads are in several calls is held up only if all of them are: that cannot be told apart here,
        // so such a rank is no part of a circle.
        let doing = known.get(&rank).map_or(&[][..], |status| &status.doing);
        let [doing] = doing else { return false };
        path.push(Edge { rank, group: doing.group.clone(), group_id: doing.group_id, call: doing.call });
        for next in &doing.waiting_for {
            if *next == start || seen.insert(*next) && search(known, start, *next, seen, path) {
                return true;
            }
        }
        path.pop();
        false
    }
    let mut path = Vec::new();
    search(known, start, start, &mut BTreeSet::from([start]), &mut path).then_some(path)
}

/// A circle in words.
pub(crate) fn describe(cycle: &[Edge]) -> String {
    let parts = cycle.iter().enumerate().map(|(place, edge)| {
        let next = cycle[(place + 1) % cycle.len()].rank;
        let call = edge.call.map_or_else(|| "a call".into(), |call| call.to_string());
        format!("rank {} in {call} on `{}` waits for rank {next}", edge.rank, edge.group)
    });
    format!("deadlock: {}", parts.collect::<Vec<_>>().join(", "))
}

/// What the recorders of a job say together, a line each: which ranks are missing where and what they do instead, and
/// which wait for each other. Nothing if no rank waits for another.
///
/// The recorders should be read at about the same time. Ranks that are not given are taken to be unknown, not missing.
pub fn diagnose(flights: &[Flight]) -> Vec<String> {
    let known: Known = flights.iter().map(|flight| (flight.rank, flight.status())).collect();
    let mut lines = Vec::new();
    let mut groups: BTreeMap<u64, (&str, u64)> = BTreeMap::new();
    for group in flights.iter().flat_map(|flight| &flight.groups).filter(|group| group.busy) {
        let furthest = groups.entry(group.id).or_insert((&group.name, 0));
        furthest.1 = furthest.1.max(group.at);
    }
    for (id, (name, step)) in groups {
        for flight in flights {
            let Some(group) = flight.groups.iter().find(|group| group.id == id) else { continue };
            if group.step < step {
                let status = &known[&flight.rank];
                lines
                    .push(format!("rank {} is missing at step {step} of `{name}`: it {status}", flight.rank));
            }
        }
    }
    for (rank, status) in &known {
        for doing in &status.doing {
            let unknown: Vec<usize> =
                doing.waiting_for.iter().copied().filter(|rank| !known.contains_key(rank)).collect();
            if !unknown.is_empty() {
                lines.push(format!(
                    "rank {rank} waits for {}, of which nothing is known: it is in {doing}",
                    Ranks(&unknown)
                ));
            }
        }
    }
    let mut told = BTreeSet::new();
    for rank in known.keys() {
        if let Some(cycle) = cycle(&known, *rank)
            && told.insert(cycle.iter().map(|edge| edge.rank).collect::<BTreeSet<_>>())
        {
            lines.push(describe(&cycle));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flight::{Doing, GroupState, Record, State};
    use crate::operation::{Call, Signature};
    use std::time::Duration;

    /// A rank that is in a barrier on one group, waiting for others; in no call if the group is 0.
    fn rank(rank: usize, group: u64, step: u64, waiting_for: &[usize]) -> Flight {
        let call = Some(Signature::bare(Call::Barrier));
        let state = |id: u64| GroupState {
            id,
            name: format!("world/{id}"),
            size: 3,
            step: if id == group { step } else { 5 },
            at: if id == group { step } else { 5 },
            busy: id == group,
            waiting_for: if id == group { waiting_for.to_vec() } else { Vec::new() },
        };
        let (group, step, state_now) = if group == 0 {
            (1, 5, State::Done(Duration::from_secs(12)))
        } else {
            (group, step, State::Running)
        };
        let record = Record {
            group: format!("world/{group}"),
            group_id: group,
            step,
            call,
            site: None,
            begun: Duration::from_secs(12),
            state: state_now,
        };
        let groups = [1, 2].map(state).to_vec();
        Flight { rank, world_size: 3, job: 1, pid: 4711, groups, records: vec![record] }
    }

    #[test]
    fn who_is_missing_is_named_with_what_it_does_instead() {
        let lines = diagnose(&[rank(0, 1, 6, &[2]), rank(1, 1, 6, &[2]), rank(2, 0, 5, &[])]);
        let expected = "rank 2 is missing at step 6 of `world/1`: it is in no call; its last: barrier() at step 5 of \
                        `world/1`, ended 12.0 s ago";
        assert_eq!(lines, [expected]);
        let lines = diagnose(&[rank(0, 1, 6, &[2]), rank(2, 2, 9, &[])]);
        let expected =
            "rank 2 is missing at step 6 of `world/1`: it is in barrier() at step 9 of `world/2` for 12.0 s";
        assert_eq!(lines[0], expected);
    }

    #[test]
    fn who_has_enqueued_less_than_another_is_missing_only_where_that_one_waits() {
        let gpu = |number: usize, begun: u64, at: u64| {
            let mut flight = rank(number, 1, begun, &[]);
            flight.groups[0].at = at;
            flight.records[0].step = at;
            flight
        };
        assert_eq!(diagnose(&[gpu(0, 900, 50), gpu(1, 60, 50), gpu(2, 50, 50)]), [""; 0]);
        let expected = "rank 2 is missing at step 51 of `world/1`: it is in barrier() at step 50 of `world/1` for 12.0 s";
        assert_eq!(diagnose(&[gpu(0, 900, 50), gpu(1, 60, 51), gpu(2, 50, 50)]), [expected]);
    }

    #[test]
    fn ranks_that_wait_for_each_other_in_two_groups_are_a_deadlock() {
        let lines = diagnose(&[rank(0, 1, 6, &[1]), rank(1, 2, 6, &[2, 0]), rank(2, 0, 5, &[])]);
        let expected = "deadlock: rank 0 in barrier() on `world/1` waits for rank 1, rank 1 in barrier() on `world/2` \
                        waits for rank 0";
        assert_eq!(lines.iter().filter(|line| line.starts_with("deadlock")).collect::<Vec<_>>(), [expected]);
    }

    #[test]
    fn a_chain_that_ends_is_no_deadlock() {
        let known = |flights: &[Flight]| -> Known { flights.iter().map(|f| (f.rank, f.status())).collect() };
        let chain = known(&[rank(0, 1, 6, &[1]), rank(1, 2, 6, &[2]), rank(2, 0, 5, &[])]);
        assert_eq!(cycle(&chain, 0), None);
        // Others may be locked behind whom this one waits, without being part of it.
        let behind = known(&[rank(0, 1, 6, &[1]), rank(1, 2, 6, &[2]), rank(2, 1, 6, &[1])]);
        assert_eq!(cycle(&behind, 0), None);
        assert_eq!(cycle(&behind, 1).map(|cycle| cycle.len()), Some(2));
        let mut two_threads = rank(0, 1, 6, &[1]).status();
        let other: Doing = two_threads.doing[0].clone();
        two_threads.doing.push(other);
        let known = Known::from([(0, two_threads), (1, rank(1, 2, 6, &[0]).status())]);
        assert_eq!(cycle(&known, 0), None);
    }
}
