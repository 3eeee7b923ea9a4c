//! The Python process that runs the peers' optimizers: one order a line, one answer a line, each with a deadline

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// The first use of DeepSpeed's optimizer compiles it.
const ANSWER: Duration = Duration::from_secs(600);

/// The running process.
pub(crate) struct Peers {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
    /// Peers that cannot be had here.
    missing: Vec<String>,
    versions: String,
}

impl Peers {
    /// Starts it, its calls on `threads` threads.
    pub(crate) fn start(threads: usize) -> Result<Self, Box<dyn Error>> {
        let python = std::env::var("LIGHTRFT_PYTHON").unwrap_or_else(|_| "python3".into());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/adamw.py");
        let mut command = Command::new(&python);
        command.args(["-W", "ignore"]).arg(script);
        command
            .env("LIGHTRFT_BENCH_THREADS", threads.to_string())
            .env("OMP_NUM_THREADS", threads.to_string());
        // Its threads must not spin while ours are measured.
        command.env("OMP_WAIT_POLICY", "PASSIVE");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (Some(orders), Some(lines)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("no pipes".into());
        };
        let (send, answers) = channel();
        thread::spawn(move || {
            for line in BufReader::new(lines).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        let mut peers = Self { child, orders, answers, missing: Vec::new(), versions: String::new() };
        peers.versions = peers.answer()?;
        Ok(peers)
    }

    /// Seconds of one call, or `None` where there is no such peer, which is said once.
    pub(crate) fn time(
        &mut self,
        peer: &str,
        case: &str,
        elems: usize,
    ) -> Result<Option<f64>, Box<dyn Error>> {
        if self.missing.iter().any(|missing| missing == peer) {
            return Ok(None);
        }
        writeln!(self.orders, "{peer} {case} {elems}")?;
        let answer = self.answer()?;
        if let Some(reason) = answer.strip_prefix("without ") {
            eprintln!("LEFT OUT: {peer}: {reason}");
            self.missing.push(peer.to_owned());
            return Ok(None);
        }
        Ok(Some(answer.parse::<u64>().map_err(|_| format!("{peer} said `{answer}`"))? as f64 / 1e9))
    }

    /// Names and versions of what has run.
    pub(crate) fn versions(&mut self) -> Result<String, Box<dyn Error>> {
        writeln!(self.orders, "versions")?;
        let more = self.answer()?;
        Ok([self.versions.as_str(), more.as_str()]
            .into_iter()
            .filter(|v| !v.is_empty())
            .collect::<Vec<_>>()
            .join(", "))
    }

    fn answer(&self) -> Result<String, Box<dyn Error>> {
        self.answers.recv_timeout(ANSWER).map_err(|error| match error {
            RecvTimeoutError::Timeout => format!("the peers gave no answer within {ANSWER:?}").into(),
            RecvTimeoutError::Disconnected => "the peers' process has ended".into(),
        })
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        // It holds nothing that is worth a farewell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
