//! Buffers that a rank lends to the others for a call, and how it gets them back if the call fails
//!
//! In a direct call ranks read, and write, each other's buffers. When it succeeds, its last step says that everyone has
//! done with them. When it fails, a rank must not return, and so give its buffer to whoever uses that memory next,
//! while another is still at it; and nobody may take as a result what it has read of a buffer that was given back.
//!
//! So each rank has two words that all can see: the loan in which it is *at work* on others' buffers, and the last loan that it
//! *took back*. Who takes back writes the second and then reads everyone's first; who goes to work writes the first and
//! then reads everyone's second. Each pair is in one order for all (`SeqCst`): of two ranks, either the one that takes back
//! sees the other at work, and waits until it has done, or the other sees that the buffer is not lent any more.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use crate::host::segment::Segment;

/// How long a failed call waits for ranks that are at work on its buffers. They copy for milliseconds and do not wait for
/// anybody meanwhile: only one that is stopped there takes longer.
const LONGEST: Duration = Duration::from_secs(2);

/// The loan of this rank's buffer to the others, and of theirs to this rank, from one step on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Loan(u32);

impl Loan {
    /// Begins a loan, before the step that shows the others where the buffer lies.
    pub(super) fn begin(segment: &Segment, step: u32) -> Self {
        // 0 is no loan. Of two steps that follow each other only one begins a loan.
        let step = step.max(1);
        segment.loans(segment.rank()).at_work.store(step, SeqCst);
        Loan(step)
    }

    /// A rank, if there is one, that has taken its buffer back.
    pub(super) fn taken_back(self, segment: &Segment) -> Option<usize> {
        (0..segment.world()).find(|rank| segment.loans(*rank).taken_back.load(SeqCst) == self.0)
    }

    /// This rank has done with the others' buffers.
    pub(super) fn done(self, segment: &Segment) {
        segment.loans(segment.rank()).at_work.store(0, SeqCst);
    }

    /// Ends a loan that came to nothing: returns when nobody is at work on this rank's buffer, but for those that are `gone`.
    pub(super) fn take_back(self, segment: &Segment, gone: impl Fn(usize) -> bool) {
        let mine = segment.loans(segment.rank());
        mine.at_work.store(0, SeqCst);
        mine.taken_back.store(self.0, SeqCst);
        let begin = Instant::now();
        let at_work = |rank: &usize| segment.loans(*rank).at_work.load(SeqCst) == self.0 && !gone(*rank);
        while let Some(rank) = (0..segment.world()).find(at_work) {
            if begin.elapsed() > LONGEST {
                tracing::error!(rank, "a member of the group does not let go of a buffer of this process");
                return;
            }
            // Nobody wakes this rank: failures are rare, and calls that do not fail pay for nothing here.
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use super::*;

    fn segments() -> [Segment; 3] {
        let (first, fd) = Segment::create(7, 3, 0).unwrap();
        let open = |rank| Segment::open(std::process::id(), fd.as_raw_fd() as u64, 7, 3, rank).unwrap();
        [first, open(1), open(2)]
    }

    #[test]
    fn who_takes_back_waits_for_those_at_work_and_stops_those_who_come_later() {
        let [mine, theirs, late] = &segments();
        let (loan, their_loan) = (Loan::begin(mine, 5), Loan::begin(theirs, 5));
        assert_eq!(their_loan.taken_back(theirs), None);
        let is_back = &AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(move || {
                loan.take_back(mine, |_| false);
                is_back.store(true, Ordering::SeqCst);
            });
            while their_loan.taken_back(theirs) != Some(0) {
                thread::yield_now();
            }
            assert!(!is_back.load(Ordering::SeqCst), "a rank is at work");
            let late_loan = Loan::begin(late, 5);
            assert_eq!(late_loan.taken_back(late), Some(0));
            late_loan.done(late);
            their_loan.done(theirs);
        });
        assert!(is_back.load(Ordering::SeqCst));
        // The next loan is another one.
        assert_eq!(Loan::begin(theirs, 7).taken_back(theirs), None);
    }

    #[test]
    fn nobody_waits_for_a_rank_that_died_at_work() {
        let [mine, theirs, _] = &segments();
        let loan = Loan::begin(mine, 5);
        Loan::begin(theirs, 5);
        let begin = Instant::now();
        loan.take_back(mine, |rank| rank == 1);
        assert!(begin.elapsed() < LONGEST);
    }
}
