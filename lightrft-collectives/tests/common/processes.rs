//! Ranks as processes: a test binary runs one of its own ignored tests once per rank

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use lightrft_collectives::launch::{Launcher, Outcome, Output};
use lightrft_collectives::{Communicator, Rendezvous, Transport};

/// A rank that has not ended by then ends itself, saying where it was. Nothing here takes nearly as long.
const LONGEST_LIFE: Duration = Duration::from_secs(120);

/// What a rank is told by the test that starts it.
#[derive(Clone, Debug)]
pub(crate) struct Job<'a> {
    /// The ignored test that a rank runs.
    pub(crate) role: &'a str,
    pub(crate) ranks: usize,
    pub(crate) transport: Transport,
    pub(crate) seed: u64,
    /// Anything else the role must know.
    pub(crate) variables: Vec<(&'a str, String)>,
    /// Where ranks leave what the others, or the test, shall know.
    pub(crate) notes: Option<&'a Path>,
}

impl Job<'_> {
    /// Runs the ranks to their end.
    pub(crate) fn run(&self) -> Outcome {
        let mut launcher = Launcher::new(std::env::current_exe().unwrap())
            .args([self.role, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env("TRANSPORT", if self.transport == Transport::Tcp { "tcp" } else { "auto" })
            .env("SEED", self.seed.to_string())
            .ranks(self.ranks)
            // Survivors of an injected fault end by themselves.
            .grace(Duration::from_secs(30))
            .output(Output::Prefixed);
        for (name, value) in &self.variables {
            launcher = launcher.env(name, value);
        }
        if let Some(notes) = self.notes {
            launcher = launcher.env("NOTES", notes);
        }
        launcher.run().unwrap()
    }
}

/// A number of the environment.
pub(crate) fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}, expected a number")))
}

/// The seed that the test gave this rank.
pub(crate) fn seed() -> u64 {
    number("SEED").unwrap()
}

/// The folder for notes.
pub(crate) fn notes() -> PathBuf {
    std::env::var_os("NOTES").unwrap().into()
}

/// Joins the world as the test said, every wait ending after `timeout`.
pub(crate) fn join(timeout: Duration) -> Arc<dyn Communicator> {
    let rendezvous = Rendezvous::from_env().unwrap();
    let (rank, seed) = (rendezvous.rank(), seed());
    std::thread::spawn(move || {
        std::thread::sleep(LONGEST_LIFE);
        eprintln!("rank {rank} of the job with seed {seed} still runs after {LONGEST_LIFE:?}");
        std::process::exit(99);
    });
    let tcp = std::env::var_os("TRANSPORT").as_deref() == Some(OsStr::new("tcp"));
    let transport = if tcp { Transport::Tcp } else { Transport::Auto };
    rendezvous.timeout(timeout).transport(transport).init().unwrap()
}

/// The time of day, which processes share.
pub(crate) fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap()
}
