//! Orders, samplers, JSON Lines and loaders, beside LightRFT's sampler over torch, torch's loader and plain Python
//!
//! ```text
//! cargo xtask bench data [--peers] [--quick] [--what TEXT,..] [--rounds N] [--json FILE] [--check]
//! ```
//!
//! # How it is measured
//! What is shown is the median over rounds, in which all contenders take turns. Whatever makes a table of an epoch runs in
//! a process of its own, so that its peak of memory is its own; what it held before the first call is taken off. Files
//! are read from the page cache: a first round that is not counted brings them there.
//!
//! `--peers` needs a Python with torch (`LIGHTRFT_PYTHON`, else `python3`). The last line is everything as one JSON object.
//! With `--check` a missed target is an exit code of 1. `--quick` takes a tenth of the samples and bytes; its targets say
//! little.

mod files;
mod loader;
mod orders;
mod peer;
mod prompts;
mod report;

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::thread;

use lexopt::{Arg, Parser, ValueExt};
use peer::Python;
use report::{Row, Setting};

/// What every case is told.
struct Options {
    python: Option<Python>,
    quick: bool,
    /// Only rows with one of these in their name.
    what: Vec<String>,
    rounds: usize,
    json: Option<String>,
    check: bool,
    /// This process makes an epoch's table of so many samples and says what that took.
    child: Option<usize>,
    /// Cargo says that the bench was asked for, not merely built and tried by `cargo test --all-targets`.
    asked: bool,
}

impl Options {
    fn wants(&self, what: &str) -> bool {
        self.what.is_empty() || self.what.iter().any(|part| what.contains(part.as_str()))
    }
}

/// Measures some rows, or none where none is wanted.
type Case = fn(&Options) -> Result<Vec<Row>, Box<dyn Error>>;

const CASES: [Case; 4] = [orders::measure, files::measure, loader::measure, prompts::measure];

fn main() -> ExitCode {
    let done = options().and_then(|options| match options.child {
        Some(len) => orders::child(len).map(|()| ExitCode::SUCCESS),
        None if !options.asked => Ok(ExitCode::SUCCESS),
        None => bench(&options),
    });
    done.unwrap_or_else(|error| {
        eprintln!("bench data: {error}");
        ExitCode::FAILURE
    })
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        python: None,
        quick: false,
        what: Vec::new(),
        rounds: 5,
        json: None,
        check: false,
        child: None,
        asked: false,
    };
    let mut parser = Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Long("bench") => options.asked = true,
            Arg::Long("peers") => options.python = Some(Python::found()?),
            Arg::Long("quick") => options.quick = true,
            Arg::Long("check") => options.check = true,
            Arg::Long("json") => options.json = Some(parser.value()?.string()?),
            Arg::Long("rounds") => options.rounds = parser.value()?.parse::<usize>()?.max(1),
            Arg::Long("child") => options.child = Some(parser.value()?.parse()?),
            Arg::Long("what") => {
                options.what = parser.value()?.string()?.split(',').map(str::to_owned).collect();
            }
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn bench(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let mut setting = Setting {
        machine: machine()?,
        load: [load(), String::new()],
        peers: options.python.as_ref().map_or(String::new(), |python| python.versions.clone()),
    };
    let mut rows = Vec::new();
    for case in CASES {
        rows.extend(case(options)?);
    }
    setting.load[1] = load();
    report::print(&rows, &setting);
    let object = report::json(&rows, &setting).to_string();
    if let Some(path) = &options.json {
        // Cargo starts a bench in its package's folder; a relative path was meant from where the command was given.
        let folder = std::env::var_os("LIGHTRFT_BENCH_FOLDER").unwrap_or_default();
        let path = Path::new(&folder).join(path);
        std::fs::write(&path, format!("{object}\n")).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    println!("{object}");
    let missed = rows.iter().flat_map(|row| &row.targets).any(|target| !target.met);
    Ok(ExitCode::from(u8::from(options.check && missed)))
}

/// The processor, its cores and the kernel.
fn machine() -> Result<String, Box<dyn Error>> {
    let cores = thread::available_parallelism()?.get();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, name)| name);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    Ok(format!("{model}, {cores} cores, Linux {}", kernel.trim()))
}

/// The load average of the last minute.
fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or("unknown").to_owned()
}
