//! A group in the place of a dead one, of those who are left
//!
//! The survivors agree over their control connections on who is left, and make a new group as any other is made: no store
//! is needed, nor any rank that may be among the dead. If another dies while they connect, the group that they were making
//! is dead in its turn, for all of them, and they begin anew with that one: so all go through the same sequence of groups,
//! and who was quick enough to have a group that then dies meets the others when it rebuilds that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Group;
use super::world::group_id;
use crate::communicator::Communicator;
use crate::error::{Error, Loss, Result};
use crate::group::next_name;
use crate::operation::Call;
use crate::single::Single;

/// Makes the group of those members of `dead` who call this within `timeout` and live.
pub(super) fn rebuild(dead: &Group, timeout: Duration) -> Result<Arc<dyn Communicator>> {
    let begin = Instant::now();
    let rest = || timeout.saturating_sub(begin.elapsed());
    let (world, me) = (&dead.world, dead.world.rank());
    let (mut name, mut id, mut ranks) = (dead.name.clone(), dead.id, dead.ranks.clone());
    // Kept until the end: to drop a group is to take no part in what takes its place.
    let mut failed = Vec::new();
    loop {
        let absent = world.shared.agree_on_absent(id, &ranks, rest());
        if absent.contains(&me) {
            let card = &world.cards[me];
            let (pid, host) = (card.pid, card.node.clone());
            return Err(Error::PeerLost {
                call: Call::Rebuild,
                group: name,
                rank: me,
                pid,
                host,
                how: Loss::Silent,
            });
        }
        ranks.retain(|rank| !absent.contains(rank));
        name = next_name(&name);
        id = group_id(&name);
        tracing::info!(group = name, ?ranks, "rebuilding");
        if ranks == [me] {
            return Ok(Single::group(name, me));
        }
        let limit = rest().max(Duration::from_secs(1));
        let made = Group::connect(world.clone(), name.clone(), ranks.clone(), dead.timeout, limit);
        let error = match made {
            Ok(group) => match group.share() {
                Ok(()) => return Ok(Arc::new(group)),
                Err(error) => {
                    failed.push(group);
                    error
                }
            },
            Err(error) => error,
        };
        if !matches!(error, Error::PeerLost { .. }) || rest().is_zero() {
            return Err(error);
        }
    }
}
