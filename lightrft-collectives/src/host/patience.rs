//! How a rank waits: first looking again and again, then giving its core away, then asleep

use std::time::{Duration, Instant};

use rustix::thread::sched_yield;

/// How long to look again and again, if every local rank has a core: most peers come sooner, and to be woken takes
/// about as long.
const SPIN: Duration = Duration::from_micros(50);

/// Times to give the core away before sleeping.
const YIELDS: u32 = 30;

/// One wait, from the last time that something moved.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    spin: Duration,
    idle: Option<Instant>,
    yields: u32,
}

/// What to do when nothing moved.
pub(super) enum Next {
    /// Look again.
    Look,
    /// Sleep until the kernel has news; nothing has moved since then.
    Sleep(Instant),
}

impl Patience {
    /// For a rank of `local` on a machine where they have `cores` together. Where they outnumber these, to spin is to keep
    /// the others from doing what is waited for.
    pub(super) fn new(local: usize, cores: usize) -> Self {
        let spin = if local <= cores { SPIN } else { Duration::ZERO };
        Patience { spin, idle: None, yields: 0 }
    }

    /// Passes a moment.
    pub(super) fn pause(&mut self) -> Next {
        let begin = *self.idle.get_or_insert_with(Instant::now);
        if !self.spin.is_zero() && begin.elapsed() < self.spin {
            std::hint::spin_loop();
            return Next::Look;
        }
        if self.yields < YIELDS {
            self.yields += 1;
            sched_yield();
            return Next::Look;
        }
        Next::Sleep(begin)
    }
}
