//! Where in the user's program the call under way was made, for the flight recorder
//!
//! A public function that makes calls [marks](mark) its caller's place for its thread; the recorder reads it, however many
//! wrappers and virtual calls lie between. The outermost mark counts: what a call does inside is the user's call.

use std::cell::Cell;
use std::panic::Location;

/// A place in the program.
pub(crate) type Site = &'static Location<'static>;

thread_local! {
    static SITE: Cell<Option<Site>> = const { Cell::new(None) };
}

/// Keeps a mark until it is dropped.
#[derive(Debug)]
#[must_use = "the mark goes with this value"]
pub(crate) struct Mark {
    is_mine: bool,
}

/// Marks the place from which the function that calls this was called; that function is `#[track_caller]` itself.
#[inline]
#[track_caller]
pub(crate) fn mark() -> Mark {
    mark_as(Some(Location::caller()))
}

/// Marks a place that was found on another thread.
#[inline]
pub(crate) fn mark_as(site: Option<Site>) -> Mark {
    let is_mine = SITE.get().is_none();
    if is_mine {
        SITE.set(site);
    }
    Mark { is_mine }
}

impl Drop for Mark {
    #[inline]
    fn drop(&mut self) {
        if self.is_mine {
            SITE.set(None);
        }
    }
}

/// Where the call under way on this thread was made, if that is known.
#[inline]
pub(crate) fn current() -> Option<Site> {
    SITE.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn inner() -> u32 {
        let _mark = mark();
        current().unwrap().line()
    }

    #[track_caller]
    fn outer() -> u32 {
        let _mark = mark();
        inner()
    }

    #[test]
    fn the_users_place_counts_and_goes_with_the_call() {
        assert_eq!([inner(), outer()], [line!(), line!()]);
        assert!(current().is_none());
        let site = Location::caller();
        let mark = mark_as(Some(site));
        assert_eq!(outer(), site.line());
        drop(mark);
        assert!(current().is_none());
    }
}
