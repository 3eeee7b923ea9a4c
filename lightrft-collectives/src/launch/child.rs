//! Starts a process that dies with its parent; one of this crate's unsafe fences
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};

/// Starts `command` in a process group of its own, to be killed when the calling *thread* ends.
///
/// The kernel ties the signal to the thread that forked: call this from one that outlives the child.
pub(super) fn spawn(command: &mut Command) -> io::Result<Child> {
    let parent = getpid();
    command.process_group(0);
    // SAFETY: the closure runs in the child between fork and exec, where only async-signal-safe functions may be
    // called: it makes two system calls, allocates nothing and takes no lock (an `io::Error` of a raw code holds none).
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // A parent that died before that call sends no signal any more.
            if getppid() == Some(parent) { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
        });
    }
    command.spawn()
}
