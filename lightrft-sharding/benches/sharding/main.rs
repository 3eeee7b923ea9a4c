//! Optimizer, norm, average, gathers and plans, beside torch and DeepSpeed
//!
//! ```text
//! cargo xtask bench sharding [--peers] [--quick] [--what TEXT,..] [--threads N] [--rounds N]
//!                            [--priority rr|normal] [--json FILE] [--check]
//! ```
//!
//! # How it is measured
//! The passes over memory are of 64 Mi f32 parameters (256 MiB an array) in this process, on as many threads as there are
//! cores. The peers do the same on arrays of the same length in a process of their own that sleeps between its turns. All
//! take turns, round by round, at the same scheduling priority (`SCHED_RR` where that is permitted); what is shown is the
//! median over rounds. GB/s counts what a pass must at least read and write: 28 bytes a parameter for AdamW, 30 with a
//! copy in bf16. AdamW is timed without the norm, as the peers' are: it is a case of its own.
//!
//! Gathers and reduces are between two processes of this program, in turns with the bare collective of the same bytes. So
//! are passes of models that compute nothing for a set time: forward with and without the next unit gathered meanwhile,
//! backward with replicas' sums meanwhile and after it.
//!
//! `--peers` needs a Python with torch (`LIGHTRFT_PYTHON`, else `python3`), and DeepSpeed in it for that one; what cannot be
//! had is left out aloud. The last line is everything as one JSON object. With `--check` a missed target is an exit code of 1.

mod cases;
mod overlap;
mod peer;
mod ranks;
mod report;

use std::error::Error;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Duration;

use cases::{Memory, Pass};
use lexopt::{Arg, Parser, ValueExt};
use peer::Peers;
use report::{Measured, Row, Setting, Target};

/// Set in the environment of the bench once it runs at its own priority.
const RAISED: &str = "LIGHTRFT_BENCH_RAISED";

/// Processor time, in microseconds, that a thread of real-time priority may use without ever waiting in the kernel.
const SPIN_LIMIT: &str = "15000000";

struct Options {
    peers: bool,
    quick: bool,
    /// Only rows with one of these in their name.
    what: Vec<String>,
    threads: usize,
    rounds: usize,
    rr: Option<bool>,
    json: Option<String>,
    check: bool,
    /// This process is a rank that measures so many rounds.
    rank: Option<usize>,
    /// Cargo says that the bench was asked for, not merely built and tried by `cargo test --all-targets`.
    asked: bool,
}

fn main() -> ExitCode {
    let done = options().and_then(|options| match options.rank {
        Some(rounds) => ranks::rank(rounds).map(|()| ExitCode::SUCCESS),
        None if !options.asked => Ok(ExitCode::SUCCESS),
        None => bench(&options),
    });
    done.unwrap_or_else(|error| {
        eprintln!("bench sharding: {error}");
        ExitCode::FAILURE
    })
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        peers: false,
        quick: false,
        what: Vec::new(),
        threads: thread::available_parallelism()?.get(),
        rounds: 7,
        rr: None,
        json: None,
        check: false,
        rank: None,
        asked: false,
    };
    let mut parser = Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Long("bench") => options.asked = true,
            Arg::Long("peers") => options.peers = true,
            Arg::Long("quick") => options.quick = true,
            Arg::Long("check") => options.check = true,
            Arg::Long("json") => options.json = Some(parser.value()?.string()?),
            Arg::Long("rounds") => options.rounds = parser.value()?.parse::<usize>()?.max(1),
            Arg::Long("threads") => options.threads = parser.value()?.parse()?,
            Arg::Long("rank") => options.rank = Some(parser.value()?.parse()?),
            Arg::Long("what") => {
                options.what = parser.value()?.string()?.split(',').map(str::to_owned).collect();
            }
            Arg::Long("priority") => {
                options.rr = Some(match parser.value()?.string()?.as_str() {
                    "rr" => true,
                    "normal" => false,
                    other => return Err(format!("--priority {other}: expected rr or normal").into()),
                });
            }
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

/// What stands before a program that is to run at real-time priority.
fn prefix() -> Vec<String> {
    let limit = format!("--rttime={SPIN_LIMIT}:{SPIN_LIMIT}");
    ["prlimit".into(), limit, "chrt".into(), "-r".into(), "10".into()].into()
}

fn bench(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let prefix = prefix();
    let tried = Command::new(&prefix[0]).args(&prefix[1..]).arg("true").stderr(Stdio::null()).status();
    let permitted = tried.is_ok_and(|status| status.success());
    let rr = options.rr.unwrap_or(permitted);
    if rr && !permitted {
        return Err("--priority rr: not permitted here (it needs CAP_SYS_NICE, chrt and prlimit)".into());
    }
    if rr && std::env::var_os(RAISED).is_none() {
        let mut raised = Command::new(&prefix[0]);
        raised.args(&prefix[1..]).arg(std::env::current_exe()?).args(std::env::args_os().skip(1));
        return Err(raised.env(RAISED, "1").exec().into());
    }
    rayon::ThreadPoolBuilder::new().num_threads(options.threads).build_global()?;
    let rounds = if options.quick { options.rounds.min(3) } else { options.rounds };
    let mut setting = Setting {
        machine: machine()?,
        threads: options.threads,
        priority: if rr { "SCHED_RR 10" } else { "normal" },
        load: [load(), String::new()],
        peers: String::new(),
    };
    let wanted =
        |name: &str| options.what.is_empty() || options.what.iter().any(|what| name.contains(what.as_str()));
    let mut rows = passes(options, rounds, &wanted, &mut setting)?;
    if wanted("plan") {
        rows.push(plan(rounds)?);
    }
    if wanted("unit") {
        let folder = tempfile::tempdir()?;
        let pairs = if options.quick { 20 } else { 60 };
        rows.extend(ranks::measure(if rr { &prefix } else { &[] }, pairs, folder.path())?);
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

/// The passes over memory, everybody in turns.
fn passes(
    options: &Options,
    rounds: usize,
    wanted: &dyn Fn(&str) -> bool,
    setting: &mut Setting,
) -> Result<Vec<Row>, Box<dyn Error>> {
    let elems: usize = if options.quick { 8 << 20 } else { 64 << 20 };
    let cases: Vec<Pass> = Pass::ALL.into_iter().filter(|pass| wanted(pass.label())).collect();
    if cases.is_empty() {
        return Ok(Vec::new());
    }
    let mut peers = if options.peers { Some(Peers::start(options.threads)?) } else { None };
    let mut memory = Memory::new(elems)?;
    let mut rows = Vec::new();
    for pass in cases {
        let others: &[&'static str] = if peers.is_some() { pass.peers() } else { &[] };
        let mut ours = Vec::new();
        let mut theirs: Vec<Vec<f64>> = others.iter().map(|_| Vec::new()).collect();
        for round in 0..=rounds {
            for turn in 0..=others.len() {
                // Whatever the last one's threads still do, they do now.
                thread::sleep(Duration::from_millis(20));
                let who = (turn + round) % (others.len() + 1);
                let time = match (others.get(who), &mut peers) {
                    (Some(other), Some(peers)) => peers.time(other, pass.label(), elems)?,
                    _ => Some(memory.time(pass)?),
                };
                // The first round brings in pages and makes state.
                if let Some(time) = time.filter(|_| round > 0) {
                    theirs.get_mut(who).unwrap_or(&mut ours).push(time);
                }
            }
        }
        let others =
            others.iter().zip(theirs).filter_map(|(label, times)| Measured::of(label, times)).collect();
        let ours = Measured::of("ours", ours).ok_or("no times")?;
        let what = format!("{}, {} Mi parameters", pass.label(), elems >> 20);
        let mut row = Row { what, bytes: pass.bytes() * elems, ours, others, targets: Vec::new() };
        row.targets = targets(pass, &row);
        rows.push(row);
    }
    if let Some(mut peers) = peers {
        setting.peers = peers.versions()?;
    }
    Ok(rows)
}

fn targets(pass: Pass, row: &Row) -> Vec<Target> {
    let rate = row.bytes as f64 / row.ours.median() / 1e9;
    let deepspeed = row.others.iter().find(|other| other.label == "deepspeed");
    let mut targets = Vec::new();
    if matches!(pass, Pass::AdamW | Pass::AdamWAndCopy) {
        targets.push(Target { text: ">= 22 GB/s".into(), met: rate >= 22.0 });
        if let Some(deepspeed) = deepspeed {
            let met = deepspeed.median() >= row.ours.median();
            targets.push(Target { text: ">= 1.0x deepspeed".into(), met });
        }
    }
    targets
}

fn plan(rounds: usize) -> Result<Row, Box<dyn Error>> {
    cases::time_plan(0)?;
    let times: Vec<f64> = (0..rounds * 10).map(cases::time_plan).collect::<Result<_, _>>()?;
    let ours = Measured::of("ours", times).ok_or("no times")?;
    let params: usize = cases::seven_billion().iter().map(|unit| unit.params.len()).sum();
    let what = format!("plan of 7B, {params} parameters, {} ranks", cases::PLANNED_RANKS);
    let target = Target { text: "<= 5 ms".into(), met: ours.median() <= 5e-3 };
    Ok(Row { what, bytes: 0, ours, others: Vec::new(), targets: vec![target] })
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
