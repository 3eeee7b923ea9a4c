//! Groups within groups: checked member lists

use crate::communicator::Communicator;
use crate::error::{Error, Result};
use crate::operation::Call;

/// The members of a new group must be ranks of its parent, each once.
pub(crate) fn check_members<C: Communicator + ?Sized>(parent: &C, ranks: &[usize]) -> Result<()> {
    let (world, group) = (parent.world_size(), parent.name());
    let mut seen = vec![false; world];
    for &rank in ranks {
        match seen.get_mut(rank) {
            None => {
                return Err(Error::Rank { call: Call::Subgroup, group: group.into(), what: "member", rank, world });
            }
            Some(true) => return Err(Error::Members { group: group.into(), ranks: ranks.to_vec() }),
            Some(new) => *new = true,
        }
    }
    if ranks.is_empty() {
        return Err(Error::Members { group: group.into(), ranks: Vec::new() });
    }
    Ok(())
}
