//! The groups that a rank holds, by what they were made of, so that one group serves all who ask for the same ranks

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// What a shared group was made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Made {
    /// Ranks of the world in the order of the group.
    pub(crate) ranks: Vec<usize>,
    pub(crate) timeout: Duration,
}

/// One rank's shared groups in a world.
///
/// A rank cannot know by itself whether the others still hold theirs: those who make a group tell each other, and share
/// only what all its members hold.
#[derive(Debug)]
pub(crate) struct LiveGroups<G> {
    groups: Mutex<Vec<(Made, Weak<G>)>>,
}

impl<G> Default for LiveGroups<G> {
    fn default() -> Self {
        LiveGroups { groups: Mutex::new(Vec::new()) }
    }
}

impl<G> LiveGroups<G> {
    /// The group made so that lives here and is `healthy`. The caller keeps it alive while it asks the others.
    pub(crate) fn find(&self, made: &Made, healthy: impl Fn(&G) -> bool) -> Option<Arc<G>> {
        let candidate = {
            let groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
            groups.iter().find(|(other, _)| other == made).and_then(|(_, group)| group.upgrade())
        };
        // Outside the lock: a group may be dropped here, and what its end sets off is not known here.
        candidate.filter(|group| healthy(group))
    }

    /// Remembers a group that was just made, in place of one that was made so before.
    pub(crate) fn insert(&self, made: Made, group: &Arc<G>) {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.retain(|(other, group)| *other != made && group.strong_count() > 0);
        groups.push((made, Arc::downgrade(group)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_while_it_lives_and_is_healthy() {
        let made = |ranks: &[usize]| Made { ranks: ranks.to_vec(), timeout: Duration::from_secs(1) };
        let live = LiveGroups::default();
        let group = Arc::new(5);
        live.insert(made(&[0, 1]), &group);
        assert_eq!(live.find(&made(&[0, 1]), |_| true), Some(group.clone()));
        assert_eq!(live.find(&made(&[1, 0]), |_| true), None);
        assert_eq!(live.find(&made(&[0, 1]), |_| false), None);
        drop(group);
        assert_eq!(live.find(&made(&[0, 1]), |_| true), None);
    }
}
