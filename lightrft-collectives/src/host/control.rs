//! One control connection: notes go out whole or not at all, and nobody waits for a peer that does not read

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes that wait for a peer; more notes to it are dropped. It is stopped or dead: it learns of that otherwise.
const MAX_BACKLOG: usize = 4 << 20;

/// How much of the backlog a note may fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    All,
    /// The rest is for notes that must not be lost.
    Half,
}

#[derive(Debug)]
pub(super) struct Control {
    stream: TcpStream,
    /// What did not fit into the connection: the rest of a note, and later notes.
    backlog: Mutex<Vec<u8>>,
}

/// Whether all that was to be sent has been.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sent {
    All,
    /// The watcher sends the rest when the connection can take it.
    Later,
}

impl Control {
    pub(super) fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Control { stream, backlog: Mutex::default() })
    }

    fn backlog(&self) -> MutexGuard<'_, Vec<u8>> {
        self.backlog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether there is something to [`flush`](Control::flush).
    pub(super) fn is_behind(&self) -> bool {
        !self.backlog().is_empty()
    }

    /// Sends whole notes, now or later; drops them if there is no room. Does not wait.
    pub(super) fn send(&self, notes: &[u8], room: Room) -> Sent {
        let most = match room {
            Room::All => MAX_BACKLOG,
            Room::Half => MAX_BACKLOG / 2,
        };
        let mut backlog = self.backlog();
        if backlog.len() + notes.len() <= most {
            backlog.extend_from_slice(notes);
        }
        self.write(&mut backlog)
    }

    /// Sends what has waited.
    pub(super) fn flush(&self) -> Sent {
        self.write(&mut self.backlog())
    }

    fn write(&self, backlog: &mut Vec<u8>) -> Sent {
        let mut done = 0;
        while done < backlog.len() {
            match (&self.stream).write(&backlog[done..]) {
                Ok(n) => done += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // A broken connection is the reader's news.
                Err(_) => done = backlog.len(),
            }
        }
        backlog.drain(..done);
        if backlog.is_empty() { Sent::All } else { Sent::Later }
    }

    /// Takes what has come. `false` once the peer has closed the connection.
    pub(super) fn receive(&self, input: &mut Vec<u8>) -> bool {
        let mut buffer = [0; 4096];
        loop {
            match (&self.stream).read(&mut buffer) {
                Ok(0) => return false,
                Ok(n) => input.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Ipv4Addr, TcpListener};

    #[test]
    fn notes_to_a_peer_that_does_not_read_wait_and_come_whole() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mine = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let theirs = Control::new(listener.accept().unwrap().0).unwrap();
        let mine = Control::new(mine).unwrap();
        let note = [7u8; 100_000];
        let mut sent = 0;
        // More than the system buffers, but less than is kept.
        while mine.send(&note, Room::All) == Sent::All {
            sent += 1;
        }
        sent += 1;
        assert!(mine.is_behind());
        let mut input = Vec::new();
        while mine.is_behind() {
            assert!(theirs.receive(&mut input));
            mine.flush();
        }
        while input.len() < sent * note.len() {
            assert!(theirs.receive(&mut input));
        }
        assert_eq!(input.len(), sent * note.len());
        drop(mine);
        while theirs.receive(&mut input) {}
    }

    #[test]
    fn what_is_kept_for_a_peer_is_bounded() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mine = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mine = Control::new(mine).unwrap();
        for _ in 0..200 {
            mine.send(&[0; 100_000], Room::Half);
        }
        let calls = mine.backlog().len();
        assert!(calls <= MAX_BACKLOG / 2);
        // Others still have room.
        for _ in 0..200 {
            mine.send(&[0; 100_000], Room::All);
        }
        assert!((calls + 100_000..=MAX_BACKLOG).contains(&mine.backlog().len()));
    }
}
