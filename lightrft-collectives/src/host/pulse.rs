//! Signs of life between machines: who must be told that this rank lives, and who has not been heard from
//!
//! The end of a machine, or of the way to it, closes no connection. A rank of this machine cannot be lost so: the kernel
//! tells of its end, and a stopped one lives.

use std::time::{Duration, Instant};

/// How often signs of life are sent, and how long a rank may be silent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rhythm {
    pub(super) every: Duration,
    pub(super) silence: Duration,
}

/// One a second; after three that did not come the rank is lost, within 5 s of its last.
pub(super) const RHYTHM: Rhythm =
    Rhythm { every: Duration::from_secs(1), silence: Duration::from_millis(3500) };

/// When each rank of another machine was heard last.
#[derive(Debug)]
pub(super) struct Pulse {
    rhythm: Rhythm,
    sent: Option<Instant>,
    heard: Vec<Option<Instant>>,
    looked: Option<Instant>,
}

impl Pulse {
    pub(super) fn new(rhythm: Rhythm, world: usize) -> Self {
        Pulse { rhythm, sent: None, heard: vec![None; world], looked: None }
    }

    /// Begins to listen for a rank.
    pub(super) fn expect(&mut self, rank: usize, now: Instant) {
        self.heard[rank].get_or_insert(now);
    }

    /// Something came from a rank.
    pub(super) fn hear(&mut self, rank: usize, now: Instant) {
        self.heard[rank].iter_mut().for_each(|heard| *heard = now);
    }

    /// A rank is not waited for any more.
    pub(super) fn forget(&mut self, rank: usize) {
        self.heard[rank] = None;
    }

    /// The time until [`is_due`](Pulse::is_due) or [`silent`](Pulse::silent) has news; `None` if it never will.
    pub(super) fn rest(&self, now: Instant) -> Option<Duration> {
        self.heard.iter().any(Option::is_some).then_some(())?;
        let next = self.sent.map_or(now, |sent| sent + self.rhythm.every);
        let oldest = self.heard.iter().flatten().min().map(|heard| *heard + self.rhythm.silence);
        Some(oldest.map_or(next, |oldest| oldest.min(next)).saturating_duration_since(now))
    }

    /// Whether a sign of life is to be sent now; it then counts as sent.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let anyone = self.heard.iter().any(Option::is_some);
        let due =
            anyone && self.sent.is_none_or(|sent| now.saturating_duration_since(sent) >= self.rhythm.every);
        if due {
            self.sent = Some(now);
        }
        due
    }

    /// The ranks that have been silent for too long. To be called at least once in the time between two signs of life:
    /// after a longer pause it was this process that did not listen, and all get another chance.
    pub(super) fn silent(&mut self, now: Instant) -> Vec<usize> {
        let pause = self.looked.map_or(Duration::ZERO, |looked| now.saturating_duration_since(looked));
        self.looked = Some(now);
        if pause > self.rhythm.every * 2 {
            self.heard.iter_mut().flatten().for_each(|heard| *heard = now);
        }
        let too_long = |heard: &Instant| now.saturating_duration_since(*heard) >= self.rhythm.silence;
        let silent = self.heard.iter().enumerate().filter(|(_, heard)| heard.as_ref().is_some_and(too_long));
        silent.map(|(rank, _)| rank).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_missing_signs_of_life_are_a_loss_and_one_in_time_is_not() {
        let begin = Instant::now();
        let at = |millis| begin + Duration::from_millis(millis);
        let mut pulse = Pulse::new(RHYTHM, 4);
        assert_eq!(pulse.rest(begin), None);
        pulse.expect(1, begin);
        pulse.expect(3, begin);
        for second in 0..3 {
            let now = at(1000 * second);
            assert!(pulse.is_due(now) && !pulse.is_due(now));
            assert_eq!(pulse.silent(now), [0; 0]);
            pulse.hear(1, now);
        }
        assert_eq!(pulse.silent(at(3400)), [0; 0]);
        assert_eq!(pulse.silent(at(3500)), [3]);
        assert_eq!(pulse.silent(at(5400)), [3]);
        assert_eq!(pulse.silent(at(5500)), [1, 3]);
        pulse.forget(3);
        assert_eq!(pulse.silent(at(5600)), [1]);
    }

    #[test]
    fn who_was_stopped_itself_does_not_accuse_the_others() {
        let begin = Instant::now();
        let mut pulse = Pulse::new(RHYTHM, 2);
        pulse.expect(1, begin);
        assert_eq!(pulse.silent(begin + Duration::from_secs(1)), [0; 0]);
        let awake = begin + Duration::from_secs(60);
        assert_eq!(pulse.silent(awake), [0; 0]);
        let later = |millis| awake + Duration::from_millis(millis);
        assert_eq!(pulse.silent(later(1900)), [0; 0]);
        assert_eq!(pulse.silent(later(3500)), [1]);
    }
}
