//! Copies from another process's own memory, one copy and no staging; one of this crate's unsafe fences
//!
//! `process_vm_readv` needs the right to trace the other process: the same user and a kernel that lets siblings do it
//! (`kernel.yama.ptrace_scope` 0). Groups find out when they are made and do without it otherwise.
#![allow(unsafe_code)]

use std::io;

/// Copies `to.len()` bytes at the address `from` of process `pid`.
///
/// What is read there is not checked: the other process has said that it is its buffer, and waits until it was read.
pub(super) fn read(pid: u32, from: u64, to: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < to.len() {
        let rest = &mut to[done..];
        let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let remote = libc::iovec { iov_base: (from as usize + done) as *mut _, iov_len: rest.len() };
        // SAFETY: the kernel writes to `rest` only, which is borrowed mutably and as long as it says. A remote address that
        // is not mapped is an error and not a fault.
        let n = unsafe { libc::process_vm_readv(pid as i32, &local, 1, &remote, 1, 0) };
        match n {
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
