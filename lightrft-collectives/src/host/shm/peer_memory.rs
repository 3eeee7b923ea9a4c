//! Copies from and to another process's own memory, one copy and no staging; one of this crate's unsafe fences
//!
//! `process_vm_readv` and `process_vm_writev` need the right to trace the other process: the same user and a kernel that lets siblings do it
//! (`kernel.yama.ptrace_scope` 0). Groups find out when they are made and do without it otherwise.
#![allow(unsafe_code)]

use std::io;

/// Copies `to.len()` bytes at the address `from` of process `pid`.
///
/// What is read there is not checked: the other process has said that it is its buffer, and waits until it was read.
pub(super) fn read(pid: u32, from: u64, to: &mut [u8]) -> io::Result<()> {
    whole(to.len(), |done| {
        let rest = &mut to[done..];
        let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let remote = libc::iovec { iov_base: (from as usize + done) as *mut _, iov_len: rest.len() };
        // SAFETY: the kernel writes to `rest` only, which is borrowed mutably and as long as it says. A remote address that
        // is not mapped is an error and not a fault.
        unsafe { libc::process_vm_readv(pid as i32, &local, 1, &remote, 1, 0) }
    })
}

/// Copies `from` to the address `to` of process `pid`.
///
/// The caller must have been told by that process, in a call that it has not returned from, that it waits for just these
/// bytes there: see [`lend`](super::lend) for how it knows.
pub(super) fn write(pid: u32, to: u64, from: &[u8]) -> io::Result<()> {
    whole(from.len(), |done| {
        let rest = &from[done..];
        let local = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
        let remote = libc::iovec { iov_base: (to as usize + done) as *mut _, iov_len: rest.len() };
        // SAFETY: the kernel reads from `rest` only, which is borrowed and as long as it says. What it writes is memory of
        // another process, which that process has lent for it.
        unsafe { libc::process_vm_writev(pid as i32, &local, 1, &remote, 1, 0) }
    })
}

/// Repeats a copy that may end early or be interrupted until `len` bytes are done.
fn whole(len: usize, mut copy: impl FnMut(usize) -> isize) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match copy(done) {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n if n > 0 => done += n as usize,
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Whether an error says that the process is gone or on its way out.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EFAULT))
}
