//! Two queues of work on one device, computing and communication beside it, and which of them waits for which
//!
//! One rule makes every reuse of a buffer safe: whoever has a buffer has it on the *computing* lane. A call beside takes the
//! buffer, begins when computing has come as far as it had been given work, and gives the buffer back by letting
//! computing wait for its end. A gather that is begun before a stage is run so overlaps that stage and no earlier one, which
//! is when the buffer that it takes has become free.

use std::fmt;
use std::sync::Arc;

use lightrft_collectives::Result as GroupResult;
use lightrft_collectives::nccl::{Event, Stream};

/// A queue of work in which a place can be marked, and that can wait for a mark of another.
pub trait Timeline {
    /// A place in it.
    type Mark: fmt::Debug;

    /// The place that it has come to when all work it has been given is done.
    fn mark(&self) -> GroupResult<Self::Mark>;

    /// What it is given from now on comes after the mark.
    fn wait_for(&self, mark: &Self::Mark) -> GroupResult<()>;

    /// Waits until it has done all that it was given, for where no order can be had otherwise.
    fn drain(&self);
}

impl Timeline for Stream {
    type Mark = Event;

    fn mark(&self) -> GroupResult<Event> {
        self.record()
    }

    fn wait_for(&self, mark: &Event) -> GroupResult<()> {
        Stream::wait_for(self, mark)
    }

    fn drain(&self) {
        // Calls have deadlines of their own; no call can be in its turn for longer than this.
        let _ = self.wait(lightrft_collectives::DEFAULT_TIMEOUT);
    }
}

/// Both queues.
#[derive(Debug)]
pub(super) struct Lanes<T> {
    pub(super) compute: T,
    beside: T,
}

/// A buffer that the communication lane works on. Dropped, it is freed after that.
pub struct Loan<T: Timeline, V> {
    buffer: Option<V>,
    /// Where the work ends; `None` if nobody can say.
    end: Option<T::Mark>,
    lanes: Arc<Lanes<T>>,
}

impl<T: Timeline, V> fmt::Debug for Loan<T, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loan").field("end", &self.end).finish_non_exhaustive()
    }
}

impl<T: Timeline> Lanes<T> {
    pub(super) fn new(compute: T, beside: T) -> Arc<Self> {
        Arc::new(Self { compute, beside })
    }

    /// Lets `work` enqueue what is done with `buffer` beside computing.
    pub(super) fn begin<V>(
        self: &Arc<Self>,
        buffer: V,
        work: impl FnOnce(&T, &mut V) -> GroupResult<()>,
    ) -> GroupResult<Loan<T, V>> {
        self.beside.wait_for(&self.compute.mark()?)?;
        let mut loan = Loan { buffer: Some(buffer), end: None, lanes: Arc::clone(self) };
        let worked = loan.buffer.as_mut().map_or(Ok(()), |buffer| work(&self.beside, buffer));
        // Also where not all of it could be enqueued.
        loan.end = Some(self.beside.mark()?);
        worked.map(|()| loan)
    }

    /// As [`begin`](Self::begin), with computing waiting for it at once.
    pub(super) fn in_turn(&self, work: impl FnOnce(&T) -> GroupResult<()>) -> GroupResult<()> {
        self.beside.wait_for(&self.compute.mark()?)?;
        let worked = work(&self.beside);
        let ordered = self.beside.mark().and_then(|end| self.compute.wait_for(&end));
        if ordered.is_err() {
            // Its buffers are the caller's, who may free them at once.
            self.beside.drain();
        }
        worked.and(ordered)
    }
}

impl<T: Timeline, V> Loan<T, V> {
    /// The buffer, to be computed with.
    pub(super) fn finish(mut self) -> GroupResult<Option<V>> {
        self.settle()?;
        Ok(self.buffer.take())
    }

    fn settle(&mut self) -> GroupResult<()> {
        let end = self.end.take();
        let waits = end.as_ref().map_or(Ok(()), |end| self.lanes.compute.wait_for(end));
        if end.is_none() || waits.is_err() {
            // Nobody knows when it is free: it is never freed.
            std::mem::forget(self.buffer.take());
        }
        waits
    }
}

impl<T: Timeline, V> Drop for Loan<T, V> {
    fn drop(&mut self) {
        if self.buffer.is_some() {
            let _ = self.settle();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use lightrft_collectives::Error;
    use proptest::prelude::*;

    use super::*;

    /// How much of each lane's work has been done before a place.
    type Clock = [usize; 2];

    #[derive(Debug, Default)]
    struct World {
        clocks: [Clock; 2],
        /// Uses of buffers, in the order of the calls: buffer, and when.
        uses: Vec<(usize, Clock, usize)>,
        freed: Vec<(usize, Clock)>,
    }

    /// A lane that does nothing but keep account of what comes before what.
    #[derive(Clone, Debug)]
    struct Fake {
        world: Rc<RefCell<World>>,
        lane: usize,
    }

    impl Timeline for Fake {
        type Mark = Clock;

        fn mark(&self) -> GroupResult<Clock> {
            Ok(self.world.borrow().clocks[self.lane])
        }

        fn wait_for(&self, mark: &Clock) -> GroupResult<()> {
            let clock = &mut self.world.borrow_mut().clocks[self.lane];
            clock.iter_mut().zip(mark).for_each(|(mine, theirs)| *mine = (*mine).max(*theirs));
            Ok(())
        }

        /// What is done is before all that is given to any lane from now on.
        fn drain(&self) {
            let mut world = self.world.borrow_mut();
            let done = world.clocks[self.lane];
            let ahead = world.clocks.iter_mut().flat_map(|clock| clock.iter_mut().zip(done));
            ahead.for_each(|(mine, done)| *mine = (*mine).max(done));
        }
    }

    impl Fake {
        /// Work on a buffer, which must come after all earlier work on it.
        fn work_on(&self, buffer: usize) {
            let mut world = self.world.borrow_mut();
            let now = world.clocks[self.lane];
            for (other, end, lane) in &world.uses {
                assert!(
                    *other != buffer || now[*lane] >= end[*lane],
                    "buffer {buffer}: {end:?}, then {now:?}"
                );
            }
            world.clocks[self.lane][self.lane] += 1;
            let end = world.clocks[self.lane];
            world.uses.push((buffer, end, self.lane));
        }
    }

    /// A buffer that says when it was freed, on the computing lane.
    #[derive(Debug)]
    struct Freed(usize, Fake);

    impl Drop for Freed {
        fn drop(&mut self) {
            self.1.work_on(self.0);
            let now = self.1.mark().unwrap();
            self.1.world.borrow_mut().freed.push((self.0, now));
        }
    }

    fn lanes() -> (Arc<Lanes<Fake>>, Fake, Rc<RefCell<World>>) {
        let world = Rc::new(RefCell::new(World::default()));
        let fake = |lane| Fake { world: world.clone(), lane };
        (Lanes::new(fake(0), fake(1)), fake(0), world)
    }

    proptest! {
        #[test]
        fn no_two_uses_of_a_buffer_are_without_an_order(steps in prop::collection::vec((0..5u8, 0..4usize), 0..60)) {
            let (lanes, compute, world) = lanes();
            let mut buffers: Vec<Option<Freed>> = (0..4).map(|n| Some(Freed(n, compute.clone()))).collect();
            let mut loans: Vec<Option<Loan<Fake, Freed>>> = (0..4).map(|_| None).collect();
            for (what, n) in steps {
                match (what, buffers[n].take(), loans[n].take()) {
                    (0, Some(buffer), _) => {
                        compute.work_on(buffer.0);
                        buffers[n] = Some(buffer);
                    }
                    (1, Some(buffer), _) => {
                        let work = |beside: &Fake, buffer: &mut Freed| { beside.work_on(buffer.0); Ok(()) };
                        loans[n] = Some(lanes.begin(buffer, work).unwrap());
                    }
                    (2, None, Some(loan)) => buffers[n] = loan.finish().unwrap(),
                    (3, None, Some(loan)) => drop(loan),
                    (4, Some(buffer), _) => {
                        lanes.in_turn(|beside| { beside.work_on(buffer.0); Ok(()) }).unwrap();
                        buffers[n] = Some(buffer);
                    }
                    (_, buffer, loan) => (buffers[n], loans[n]) = (buffer, loan),
                }
            }
            drop((buffers, loans));
            prop_assert_eq!(world.borrow().freed.len(), 4);
        }
    }

    #[test]
    fn computing_that_is_enqueued_later_does_not_hold_up_what_runs_beside() {
        let (lanes, compute, world) = lanes();
        compute.work_on(0);
        let work = |beside: &Fake, buffer: &mut usize| {
            beside.work_on(*buffer);
            Ok(())
        };
        let gather = lanes.begin(1, work).unwrap();
        // The stage that the gather is to be hidden behind.
        compute.work_on(0);
        assert_eq!(world.borrow().clocks, [[2, 0], [1, 1]]);
        gather.finish().unwrap();
        assert_eq!(world.borrow().clocks[0], [2, 1]);
    }

    #[test]
    fn a_call_that_fails_half_way_gives_its_buffer_up_after_what_it_had_enqueued() {
        let (lanes, compute, world) = lanes();
        let failed = lanes.begin(Freed(7, compute), |beside, buffer| {
            beside.work_on(buffer.0);
            Err(Error::Taken)
        });
        assert!(failed.is_err());
        assert_eq!(world.borrow().freed, [(7, [1, 1])]);
    }
}
