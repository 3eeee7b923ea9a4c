//! Durable saves, cold and warm loads, checksums, another world size and listings, beside torch, DCP and safetensors
//!
//! ```text
//! cargo xtask bench ckpt [--peers] [--mib N] [--rounds N] [--quick] [--dir DIR] [--what TEXT,..] [--json FILE] [--check]
//! ```
//!
//! # How it is measured
//! A state of 64 tensors of f32, 1 GiB unless `--mib` says else, saved into an empty directory of `--dir` (the folder for
//! temporary files; a tmpfs shows what it costs without a disk). Everybody takes turns, round by round and in changing order, so that slow
//! phases of a disk hit all alike; before each turn everything written before is on the medium. What is shown is the median
//! over rounds, and the least. The first round brings in memory, compares what was loaded, and is not counted.
//!
//! - *Durable save*: from the call until every file and directory is synced; the peers' process syncs what they wrote.
//! - *Cold load*: after the files were dropped from the page cache. *Warm load*: right after it.
//! - Loads end with all bytes in memory of the process, which was there before: whoever maps a file copies it into that;
//!   `torch.load`, which returns new memory, is spared the copy. Ours finds the newest checkpoint and verifies every byte.
//! - *With checksums*: pairs of saves with and without them. *Background*: until the call returns, beside one copy of the
//!   state to memory that is there, by as many threads as the call copies with (which it is judged by), and by one. *Ranks*:
//!   four save an even range of every tensor each, three load, cold, and every byte read is counted. *List*: a thousand
//!   small checkpoints, and a thousand of 870 tensors, while names and manifests are in the system's caches.
//! - *The disk alone* is no contender: as many bytes written past the page cache by four threads, or read by four, with
//!   nothing beside. It bounds everybody.
//! - *DCP* has targets in its own format, with one thread and with two. "DCP safetensors", which writes the tensors with the
//!   safetensors library, counts among the torch paths and not as DCP.
//!
//! `--peers` needs a Python with torch (`LIGHTRFT_PYTHON`, else `python3`), and safetensors in it for that one; what cannot
//! be had is left out aloud. The last line is everything as one JSON object. With `--check` a missed target is an exit code
//! of 1; targets against peers stand only where these were measured, those about a disk only on one.

mod contest;
mod disk;
mod ground;
mod ours;
mod peer;
mod report;
mod state;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;

use contest::Wanted;
use ground::Ground;
use lexopt::{Arg, Parser, ValueExt};
use peer::Peers;
use report::Setting;
use state::State;

struct Options {
    peers: bool,
    mib: usize,
    rounds: usize,
    dir: PathBuf,
    /// Only rows with one of these in their name.
    what: Vec<String>,
    json: Option<PathBuf>,
    check: bool,
    /// Cargo says that the bench was asked for, not merely built and tried by `cargo test --all-targets`.
    asked: bool,
}

fn main() -> ExitCode {
    let done = options().and_then(|options| match options.asked {
        true => bench(&options),
        false => Ok(ExitCode::SUCCESS),
    });
    done.unwrap_or_else(|error| {
        eprintln!("bench ckpt: {error}");
        ExitCode::FAILURE
    })
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        peers: false,
        mib: 1024,
        rounds: 5,
        dir: std::env::temp_dir(),
        what: Vec::new(),
        json: None,
        check: false,
        asked: false,
    };
    // Cargo starts a bench in its package's folder; a relative path was meant from where the command was given.
    let folder = PathBuf::from(std::env::var_os("LIGHTRFT_BENCH_FOLDER").unwrap_or_default());
    let mut parser = Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Long("bench") => options.asked = true,
            Arg::Long("peers") => options.peers = true,
            Arg::Long("quick") => (options.mib, options.rounds) = (64, 3),
            Arg::Long("check") => options.check = true,
            Arg::Long("mib") => options.mib = parser.value()?.parse()?,
            Arg::Long("rounds") => options.rounds = parser.value()?.parse::<usize>()?.max(1),
            Arg::Long("dir") => options.dir = folder.join(parser.value()?),
            Arg::Long("json") => options.json = Some(folder.join(parser.value()?)),
            Arg::Long("what") => {
                options.what = parser.value()?.string()?.split(',').map(str::to_owned).collect();
            }
            other => return Err(other.unexpected().into()),
        }
    }
    if options.mib == 0 {
        return Err("--mib 0: there is nothing to save".into());
    }
    Ok(options)
}

fn bench(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let wanted =
        |name: &str| options.what.is_empty() || options.what.iter().any(|what| name.contains(what.as_str()));
    // Rotation leaves two for a moment, a peer has one beside them; or a thousand manifests.
    let ground = Ground::new(&options.dir, (3 * options.mib as u64 + 1024) << 20)?;
    let mut setting = Setting {
        machine: machine()?,
        ground: match ground.is_memory()? {
            true => format!("{} (tmpfs)", options.dir.display()),
            false => options.dir.display().to_string(),
        },
        rounds: options.rounds,
        load: [load(), String::new()],
        peers: String::new(),
    };
    let mut left_out = false;
    let mut peers = None;
    if options.peers {
        match Peers::start(options.mib) {
            Ok(started) => peers = Some(started),
            Err(error) => {
                eprintln!("LEFT OUT: all peers: {error}");
                left_out = true;
            }
        }
    }
    let mut state = State::new(options.mib);
    let contest =
        Wanted { save: wanted("durable save"), cold: wanted("cold load"), warm: wanted("warm load") };
    let mut rows = Vec::new();
    if contest.save || contest.cold || contest.warm {
        rows.extend(contest::measure(&ground, &mut state, &mut peers, options.rounds, contest)?);
    }
    if wanted("checksums") {
        rows.push(ours::checksums(&ground, &state, options.rounds)?);
    }
    if wanted("background") {
        rows.push(ours::blocking(&ground, &mut state, &mut peers, options.rounds)?);
    }
    if wanted("ranks") {
        rows.push(ours::reshard(&ground, &state, options.rounds)?);
    }
    for (tensors, elems) in [(3, 16), (870, 1 << 18)] {
        if wanted("list") {
            rows.push(ours::listing(&ground, tensors, elems, options.rounds)?);
        }
    }
    if let Some(peers) = &mut peers {
        setting.peers = peers.versions()?;
    }
    setting.load[1] = load();
    report::print(&rows, &setting);
    let object = report::json(&rows, &setting).to_string();
    if let Some(path) = &options.json {
        std::fs::write(path, format!("{object}\n")).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    println!("{object}");
    let missed = left_out || rows.iter().flat_map(|row| &row.targets).any(|target| !target.met);
    Ok(ExitCode::from(u8::from(options.check && missed)))
}

/// The processor, its cores and the kernel.
fn machine() -> Result<String, Box<dyn Error>> {
    let cores = thread::available_parallelism()?.get();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, name)| name);
    let kernel = std::fs::read_to_string(Path::new("/proc/sys/kernel/osrelease")).unwrap_or_default();
    Ok(format!("{model}, {cores} cores, Linux {}", kernel.trim()))
}

/// The load average of the last minute.
fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or("unknown").to_owned()
}
