//! What must hold for those who are left when a member of a group is lost

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::communicator::{Communicator, CommunicatorExt};
use crate::error::{Error, Result};
use crate::op::ReduceOp;

/// For a machine that is busy with other things.
const LIMIT: Duration = Duration::from_secs(60);

/// Called by all members but rank `lost` of the group, which is, or soon will be, lost: they are told so by name, come together in
/// a new group, and work in it. Returns the new group.
///
/// # Errors
/// Those of the new group's calls; in a backend that can rebuild there are none.
///
/// # Panics
/// If a promise is broken.
pub fn survive(comm: &dyn Communicator, lost: usize) -> Result<Arc<dyn Communicator>> {
    let begin = Instant::now();
    let told = loop {
        match comm.barrier() {
            Ok(()) => assert!(begin.elapsed() < LIMIT, "rank {lost} is not lost"),
            Err(error) => break error,
        }
    };
    let is_named =
        |error: &Error| matches!(error, Error::PeerLost { rank, .. } if *rank == comm.ranks()[lost]);
    assert!(is_named(&told), "{told}");
    let group = comm.rebuild(LIMIT)?;
    let left: Vec<usize> = comm.ranks().iter().copied().filter(|rank| *rank != comm.ranks()[lost]).collect();
    assert_eq!(group.ranks(), left);
    assert_eq!(left[group.rank()], comm.ranks()[comm.rank()]);
    assert_ne!(group.name(), comm.name());

    let expected = left.iter().map(|rank| *rank as f64).sum::<f64>();
    for length in [1, 100_000] {
        let mut sum = vec![left[group.rank()] as f64; length];
        group.all_reduce(&mut sum, ReduceOp::Sum)?;
        assert_eq!(sum, vec![expected; length]);
    }
    let ends = [0, left.len() - 1];
    let pair = if left.len() > 1 { group.subgroup(&ends)? } else { None };
    if let Some(pair) = pair {
        assert_eq!(pair.all_gather_object(&pair.rank())?, [0, 1]);
    }

    // The old group stays dead, and has had its one chance.
    let again = comm.barrier();
    assert!(again.as_ref().is_err_and(is_named), "{again:?}");
    let again = comm.rebuild(LIMIT);
    assert!(matches!(again, Err(Error::NoRebuild { .. })), "{again:?}");
    group.barrier()?;
    Ok(group)
}
