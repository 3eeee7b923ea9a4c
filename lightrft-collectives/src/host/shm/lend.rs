//! Buffers that a rank lends to the others for a call, and how it gets them back if the call fails
//!
//! In a direct call ranks read, and write, each other's buffers. When it succeeds, its last step says that everyone has
//! done with them. When it fails, a rank must not return, and so give its buffer to whoever uses that memory next,
//! while another is still at it; and nobody may take as a result what it has read of a buffer that was given back.
//!
//! So each rank has two words that all can see: the loan in which it is *at work* on others' buffers, and the last loan that it
//! *took back*. Who takes back writes the second and then reads everyone's first; who goes to work writes the first and
//! then reads everyone's second. Each pair is in one order for all (`SeqCst`): of two ranks, either the one that takes back
//! sees the other at work, and waits until it has done, or the other sees that the buffer is not lent any more. A rank goes
//! to work when all others have come: nobody ever waits for one that waits itself.
//!
//! # Who does not let go
//! No wait is for ever, so a rank may have to take back what another still holds:
//! - One that only reads is given a little time. What it has read it will not take as a result.
//! - One that also writes to others' buffers is waited for until the deadline of a call has passed, unless it is stopped, as
//!   by a signal or a debugger. Then it is given a little time too, in which a kernel call that it is in comes to its end. It
//!   looks whether the buffers are still lent before each write, and so writes nothing when it goes on.
//!
//! That leaves two windows in which memory is written that its owner may use for something else: a writer is stopped just
//! between such a look and the write after it (a kernel call, or a block in the heap), for longer than the little
//! time; or something keeps it there for as long as a call may take and it does not count as stopped, as a frozen control
//! group or a page that cannot be read in. Only a call that has failed can come to this, and the second is logged.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use crate::host::exchange::Fault;
use crate::host::segment::Segment;

/// How long a failed call waits for a rank at work that can do no harm. It copies for milliseconds and waits for nobody
/// meanwhile: only one that is stopped takes longer.
const LONGEST: Duration = Duration::from_secs(2);

/// The loan of this rank's buffer to the others, and of theirs to this rank, from one step on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Loan(u32);

/// A rank that is at work on a buffer which its owner wants back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Borrower {
    /// It has ended, or left the group.
    Gone,
    /// It reads, or is stopped.
    Harmless,
    /// It runs and may write.
    Writes,
}

impl Loan {
    /// The loan whose buffers are shown in this step.
    pub(super) fn of(step: u32) -> Self {
        // 0 is no loan. Of two steps that follow each other only one begins a loan.
        Loan(step.max(1))
    }

    /// This rank goes to work on the others' buffers, if they still lend them. All have come.
    pub(super) fn begin(self, segment: &Segment) -> Result<(), Fault> {
        segment.loans(segment.rank()).at_work.store(self.0, SeqCst);
        self.holds(segment)
    }

    /// Whether all still lend their buffers. One whose call has failed has taken its own back; the group's verdict says why.
    pub(super) fn holds(self, segment: &Segment) -> Result<(), Fault> {
        let taken_back = |rank: &usize| segment.loans(*rank).taken_back.load(SeqCst) == self.0;
        (0..segment.world()).find(taken_back).map_or(Ok(()), |rank| Err(Fault::Lost(rank)))
    }

    /// This rank has done with the others' buffers.
    pub(super) fn done(self, segment: &Segment) {
        segment.loans(segment.rank()).at_work.store(0, SeqCst);
    }

    /// Ends a loan that came to nothing: returns when nobody is at work on this rank's buffer, but for those that do not let
    /// go. One that writes has `deadline` for it.
    pub(super) fn take_back(
        self,
        segment: &Segment,
        deadline: Duration,
        borrower: impl Fn(usize) -> Borrower,
    ) {
        let mine = segment.loans(segment.rank());
        mine.at_work.store(0, SeqCst);
        mine.taken_back.store(self.0, SeqCst);
        let at_work = |rank: usize| segment.loans(rank).at_work.load(SeqCst) == self.0;
        let begin = Instant::now();
        // Who goes to work from here on sees at once that it must not. With each, since when it can do no harm.
        let mut borrowers: Vec<(usize, Option<Instant>)> =
            (0..segment.world()).filter(|rank| at_work(*rank)).map(|rank| (rank, None)).collect();
        loop {
            borrowers.retain_mut(|(rank, harmless_since)| {
                at_work(*rank)
                    && match borrower(*rank) {
                        Borrower::Gone => false,
                        Borrower::Harmless => {
                            harmless_since.get_or_insert_with(Instant::now).elapsed() < LONGEST
                        }
                        Borrower::Writes if begin.elapsed() <= deadline.max(LONGEST) => {
                            *harmless_since = None;
                            true
                        }
                        Borrower::Writes => {
                            tracing::error!(
                                rank,
                                "a member of the group may still write to a buffer it was lent"
                            );
                            false
                        }
                    }
            });
            if borrowers.is_empty() {
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

    fn is_lent(loan: Loan, segment: &Segment) -> bool {
        loan.holds(segment).is_ok()
    }

    #[test]
    fn who_takes_back_waits_for_those_at_work_and_stops_those_who_come_later() {
        let [mine, theirs, late] = &segments();
        let loan = Loan::of(5);
        loan.begin(mine).unwrap();
        loan.begin(theirs).unwrap();
        let is_back = &AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(move || {
                loan.take_back(mine, Duration::from_secs(60), |_| Borrower::Writes);
                is_back.store(true, Ordering::SeqCst);
            });
            while is_lent(loan, theirs) {
                thread::yield_now();
            }
            assert!(!is_back.load(Ordering::SeqCst), "a rank is at work");
            assert!(matches!(loan.begin(late), Err(Fault::Lost(0))));
            loan.done(late);
            loan.done(theirs);
        });
        assert!(is_back.load(Ordering::SeqCst));
        // The next loan is another one.
        Loan::of(7).begin(theirs).unwrap();
    }

    #[test]
    fn nobody_waits_for_a_rank_that_died_at_work_or_has_not_gone_to_work() {
        let [mine, dead, _] = &segments();
        let loan = Loan::of(5);
        loan.begin(dead).unwrap();
        let begin = Instant::now();
        let borrower = |rank| if rank == 1 { Borrower::Gone } else { Borrower::Writes };
        loan.take_back(mine, Duration::from_secs(60), borrower);
        assert!(begin.elapsed() < LONGEST);
    }

    #[test]
    fn a_writer_is_waited_for_beyond_the_time_of_a_reader_until_it_is_stopped() {
        let [mine, writer, _] = &segments();
        let loan = Loan::of(5);
        loan.begin(writer).unwrap();
        let begin = Instant::now();
        let runs = LONGEST + Duration::from_millis(300);
        let borrower = |_| if begin.elapsed() < runs { Borrower::Writes } else { Borrower::Harmless };
        loan.take_back(mine, Duration::from_secs(60), borrower);
        let waited = begin.elapsed();
        assert!(waited >= runs + LONGEST, "{waited:?}");
    }
}
