//! The embedded engine beside `transformers` on the same CPU, and what the vLLM driver costs
//!
//! ```text
//! cargo xtask bench engine [--peers] [--vllm DIR] [--quick] [--what TEXT,..] [--rounds N] [--json FILE] [--check]
//! ```
//!
//! # How it is measured
//! A random model of SmolLM2-135M's shape in f32, tokens drawn at temperature 1. Shown is the median over rounds, in which
//! both contenders take turns; a call that is not counted comes first. The peer is a process of its own each time, with as
//! many threads as ours. Ours gives the log-probabilities of the tokens it draws, the peer does not.
//!
//! The driver's rows need no Python: a server that answers at once stands in for vLLM. With `--vllm DIR`, a folder made by
//! `tools/live/setup.sh vllm DIR`, weights of the same shape are brought into a real vLLM on this CPU.
//!
//! `--peers` needs a Python with torch and transformers (`LIGHTRFT_PYTHON`, else `python3`). The last line is everything as
//! one JSON object. With `--check` a missed target is an exit code of 1, and so is one that cannot be looked at without
//! `--peers` or `--vllm`: that is said before anything is measured. `--what` leaves rows out with their targets. `--quick`
//! draws a quarter of the tokens.

// The test server serves a bench as well.
#![allow(clippy::unwrap_used)]

mod driver;
mod generate;
// Tests use more of it.
#[allow(dead_code)]
#[path = "../../tests/servers/http.rs"]
mod http;
mod report;
mod update;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use lexopt::{Arg, Parser, ValueExt};
use report::Row;

/// What every case is told.
struct Options {
    python: Option<Python>,
    /// Where a real vLLM is.
    vllm: Option<PathBuf>,
    quick: bool,
    /// Only rows with one of these in their name.
    what: Vec<String>,
    rounds: usize,
    json: Option<String>,
    check: bool,
    /// Cargo says that the bench was asked for, not merely built and tried by `cargo test --all-targets`.
    asked: bool,
}

impl Options {
    fn wants(&self, what: &str) -> bool {
        self.what.is_empty() || self.what.iter().any(|part| what.contains(part.as_str()))
    }
}

type Rows = Result<Vec<Row>, Box<dyn Error>>;

struct Case {
    /// Measures some rows, or none where none is wanted.
    measure: fn(&Options) -> Rows,
    /// The targets of wanted rows that these options do not let it look at, each with what it would take.
    unseen: fn(&Options) -> Vec<String>,
}

const CASES: [Case; 3] = [
    Case { measure: generate::measure, unseen: generate::unseen },
    // A server of its own is all that it takes.
    Case { measure: driver::measure, unseen: |_| Vec::new() },
    Case { measure: update::measure, unseen: update::unseen },
];

fn main() -> ExitCode {
    let done =
        options().and_then(|options| if options.asked { bench(&options) } else { Ok(ExitCode::SUCCESS) });
    done.unwrap_or_else(|error| {
        eprintln!("bench engine: {error}");
        ExitCode::FAILURE
    })
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        python: None,
        vllm: None,
        quick: false,
        what: Vec::new(),
        rounds: 3,
        json: None,
        check: false,
        asked: false,
    };
    let mut parser = Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Long("bench") => options.asked = true,
            Arg::Long("peers") => options.python = Some(Python::found()?),
            Arg::Long("vllm") => options.vllm = Some(from_here(parser.value()?)),
            Arg::Long("quick") => options.quick = true,
            Arg::Long("check") => options.check = true,
            Arg::Long("json") => options.json = Some(parser.value()?.string()?),
            Arg::Long("rounds") => options.rounds = parser.value()?.parse::<usize>()?.max(1),
            Arg::Long("what") => {
                options.what = parser.value()?.string()?.split(',').map(str::to_owned).collect();
            }
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn bench(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let unseen: Vec<String> = CASES.iter().flat_map(|case| (case.unseen)(options)).collect();
    for target in &unseen {
        eprintln!("bench engine: NOT LOOKED AT: {target}");
    }
    if options.check && !unseen.is_empty() {
        let what = "--check looks at every target: give what they need, or leave their rows out by --what";
        return Err(what.into());
    }
    let before = report::load();
    let mut rows = Vec::new();
    for case in CASES {
        rows.extend((case.measure)(options)?);
    }
    let peers = options.python.as_ref().map_or("", |python| python.versions.as_str());
    let setting = report::Setting { machine: report::machine()?, load: [before, report::load()], peers };
    report::print(&rows, &unseen, &setting);
    let object = report::json(&rows, &unseen, &setting).to_string();
    if let Some(path) = &options.json {
        let path = from_here(path);
        std::fs::write(&path, format!("{object}\n")).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    println!("{object}");
    let missed = rows.iter().any(Row::missed);
    Ok(ExitCode::from(u8::from(options.check && missed)))
}

/// Cargo starts a bench in its package's folder; a relative path was meant from where the command was given.
fn from_here(path: impl AsRef<Path>) -> PathBuf {
    let folder = std::env::var_os("LIGHTRFT_BENCH_FOLDER").unwrap_or_default();
    Path::new(&folder).join(path)
}

/// A Python that has torch and transformers.
struct Python {
    program: String,
    versions: String,
}

impl Python {
    /// The one that `LIGHTRFT_PYTHON` names, else `python3`.
    fn found() -> Result<Self, Box<dyn Error>> {
        let program = std::env::var("LIGHTRFT_PYTHON").unwrap_or_else(|_| "python3".into());
        let mut python = Self { program, versions: String::new() };
        python.versions = python.run(&["versions".into()])?;
        Ok(python)
    }

    /// The last line that the script prints.
    fn run(&self, args: &[String]) -> Result<String, Box<dyn Error>> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/generate.py");
        let output = Command::new(&self.program).arg(script).args(args).stderr(Stdio::inherit()).output();
        let output = output.map_err(|e| format!("{}: {e}", self.program))?;
        if !output.status.success() {
            return Err(format!("{} cannot run the peer: {}", self.program, output.status).into());
        }
        let text = String::from_utf8(output.stdout)?;
        Ok(text.lines().last().unwrap_or_default().to_owned())
    }
}
