//! The Python process that saves and loads with the peers: one order a line, one answer a line, each with a deadline

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// A buffered save to a slow disk takes long.
const ANSWER: Duration = Duration::from_secs(300);

/// The running process.
pub(crate) struct Peers {
    child: Child,
    orders: ChildStdin,
    answers: Receiver<String>,
    /// Orders that cannot be had here.
    missing: Vec<String>,
}

impl Peers {
    /// Starts it, with a state of `mib` MiB.
    pub(crate) fn start(mib: usize) -> Result<Self, Box<dyn Error>> {
        let python = std::env::var("LIGHTRFT_PYTHON").unwrap_or_else(|_| "python3".into());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/ckpt.py");
        let threads = thread::available_parallelism()?.get().to_string();
        let mut command = Command::new(&python);
        command.args(["-W", "ignore"]).arg(script);
        command.env("LIGHTRFT_BENCH_MIB", mib.to_string()).env("LIGHTRFT_BENCH_THREADS", &threads);
        // Its threads must not spin while ours are measured.
        command.env("OMP_NUM_THREADS", &threads).env("OMP_WAIT_POLICY", "PASSIVE");
        let mut child = (command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn())
            .map_err(|e| format!("{python}: {e}"))?;
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
        let peers = Self { child, orders, answers, missing: Vec::new() };
        peers.answer()?;
        Ok(peers)
    }

    /// Seconds of one call, or `None` where there is no such peer, which is said once.
    pub(crate) fn time(
        &mut self,
        order: &str,
        kind: &str,
        dir: &Path,
    ) -> Result<Option<f64>, Box<dyn Error>> {
        let asked = format!("{order} {kind}");
        if self.missing.contains(&asked) {
            return Ok(None);
        }
        let answer = self.ask(&format!("{asked} {}", dir.display()))?;
        if let Some(reason) = answer.strip_prefix("without ") {
            eprintln!("LEFT OUT: {asked}: {reason}");
            self.missing.push(asked);
            return Ok(None);
        }
        Ok(Some(answer.parse::<u64>().map_err(|_| format!("{asked}: it said `{answer}`"))? as f64 / 1e9))
    }

    /// Sees to it that the last load brought what was saved.
    pub(crate) fn check(&mut self, kind: &str) -> Result<(), Box<dyn Error>> {
        match self.ask("check")?.as_str() {
            "same" => Ok(()),
            other => Err(format!("what {kind} loaded is not what it saved: {other}").into()),
        }
    }

    /// Names and versions of what has run.
    pub(crate) fn versions(&mut self) -> Result<String, Box<dyn Error>> {
        self.ask("versions")
    }

    fn ask(&mut self, order: &str) -> Result<String, Box<dyn Error>> {
        writeln!(self.orders, "{order}")?;
        self.answer()
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
