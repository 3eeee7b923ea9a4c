//! What becomes of the ranks' output: whole lines, so that ranks do not mix, with or without their rank in front

use std::io::{self, BufRead, BufReader, Read, Write};
use std::process::{ChildStderr, ChildStdout};
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// What becomes of the ranks' standard output and error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Output {
    /// Each line with `[rank r] ` in front.
    #[default]
    Prefixed,
    /// Rank 0's lines as they are, those of the others with `[rank r] `.
    PlainRankZero,
    /// Rank 0's lines as they are; of the others, standard error with `[rank r] ` and no standard output.
    OnlyRankZero,
    /// All ranks write to this process's output themselves.
    Inherited,
}

/// Longer lines are printed in pieces, so that a rank that writes no line ends does not fill the memory.
const LONGEST: u64 = 64 << 10;

/// Threads that print what ranks write.
pub(super) struct Printer {
    output: Output,
    done: Sender<()>,
    finished: Mutex<(Receiver<()>, usize)>,
}

#[derive(Clone, Copy)]
enum Stream {
    Out,
    Err,
}

impl Printer {
    pub(super) fn new(output: Output) -> Self {
        let (done, receiver) = mpsc::channel();
        Printer { output, done, finished: Mutex::new((receiver, 0)) }
    }

    pub(super) fn follow(
        &self,
        rank: usize,
        out: Option<ChildStdout>,
        err: Option<ChildStderr>,
    ) -> io::Result<()> {
        if let Some(out) = out {
            self.copy(rank, out, Stream::Out)?;
        }
        if let Some(err) = err {
            self.copy(rank, err, Stream::Err)?;
        }
        Ok(())
    }

    fn copy(&self, rank: usize, from: impl Read + Send + 'static, stream: Stream) -> io::Result<()> {
        let prefix = match (self.output, rank) {
            (Output::PlainRankZero | Output::OnlyRankZero, 0) => String::new(),
            _ => format!("[rank {rank}] "),
        };
        let silent = self.output == Output::OnlyRankZero && rank != 0 && matches!(stream, Stream::Out);
        let done = self.done.clone();
        thread::Builder::new().name(format!("lightrft-output-{rank}")).spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = prefix.clone().into_bytes();
            // Read to the end also when nothing is printed: a full pipe would stop the rank.
            while let Ok(1..) = from.by_ref().take(LONGEST).read_until(b'\n', &mut line) {
                if !silent {
                    if line.last() != Some(&b'\n') {
                        line.push(b'\n');
                    }
                    // Nobody reads our output any more: the job goes on without.
                    let _ = match stream {
                        Stream::Out => io::stdout().lock().write_all(&line),
                        Stream::Err => io::stderr().lock().write_all(&line),
                    };
                }
                line.truncate(prefix.len());
            }
            let _ = done.send(());
        })?;
        self.finished.lock().unwrap_or_else(std::sync::PoisonError::into_inner).1 += 1;
        Ok(())
    }

    /// Waits for the last lines. A process that a rank has left behind may hold its output open for longer than
    /// `timeout`; it is not waited for.
    pub(super) fn finish(self, timeout: Duration) {
        let begin = Instant::now();
        let (receiver, threads) =
            self.finished.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        for _ in 0..threads {
            if receiver.recv_timeout(timeout.saturating_sub(begin.elapsed())).is_err() {
                break;
            }
        }
        let _ = io::stdout().flush();
    }
}
