//! Collectives between processes of one machine, beside torch's Gloo and Open MPI
//!
//! ```text
//! cargo xtask bench collectives [--peers] [--ranks 2,4] [--quick] [--what TEXT,..] [--columns shm,tcp,..]
//!                               [--priority rr|normal] [--pin best|cores|none] [--rounds N] [--json FILE] [--check]
//! ```
//!
//! # How it is measured
//! Every contender runs its ranks as processes that live as long as the bench and sleep between orders. A *round* is one
//! order: a barrier, a warm-up, a barrier, then iterations timed one by one on each rank. An iteration's time is the
//! maximum over ranks, a round's the median over its iterations, and what is shown the median over rounds. The rounds of
//! all contenders take turns, case by case, so that what disturbs the machine disturbs them alike. Sizes are counted as
//! nccl-tests counts them, and GB/s are those bytes by the time.
//!
//! All contenders get the same orders, the same scheduling priority (`SCHED_RR` by default where that is permitted,
//! since a time slice of another program is longer than most collectives). The calling thread of each rank is pinned to
//! core `rank % cores`, except in the contenders that are slower for it (`--pin best`): those that go through sockets,
//! where the kernel or other threads have work to do on some core. Results of our ranks are checked, once per case. The peers need `--peers`: Gloo a Python with torch (`LIGHTRFT_PYTHON`, else `python3`), Open
//! MPI its `mpicc` and `mpirun`; one that cannot be started is left out aloud.
//!
//! `--what failure` measures, several times each, how long ranks take to learn that one of them was killed, fell silent on
//! another machine, or made another call; it prints the worst beside the median.
//!
//! Printed: a table for each number of ranks, and as the last line all of it as one JSON object. With `--check` a missed
//! target is an exit code of 1.

mod cases;
mod contender;
mod failure;
mod rank;
mod report;

use std::error::Error;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use cases::Case;
use contender::{Answer, Conditions, Contender, Pin, Priority, Program};
use failure::Fault;
use lexopt::{Arg, Parser, ValueExt};
use rank::Way;
use report::{Column, Measured, Row, Setting};

/// Set in the environment of the bench once it runs at its own priority.
const RAISED: &str = "LIGHTRFT_BENCH_RAISED";

struct Options {
    peers: bool,
    ranks: Vec<usize>,
    quick: bool,
    /// Only rows with one of these in their name.
    what: Vec<String>,
    columns: Vec<Column>,
    priority: Option<Priority>,
    pin: Pin,
    rounds: usize,
    json: Option<String>,
    check: bool,
    /// This process is a rank.
    rank: Option<Way>,
    /// Cargo says that the bench was asked for, not merely built and tried by `cargo test --all-targets`.
    asked: bool,
}

fn main() -> ExitCode {
    let done = options().and_then(|options| match options.rank {
        Some(way) => rank::serve(way).map(|()| ExitCode::SUCCESS),
        None if !options.asked => Ok(ExitCode::SUCCESS),
        None => bench(&options),
    });
    done.unwrap_or_else(|error| {
        eprintln!("bench collectives: {error}");
        ExitCode::FAILURE
    })
}

fn options() -> Result<Options, Box<dyn Error>> {
    let mut options = Options {
        peers: false,
        ranks: vec![2, 4],
        quick: false,
        what: Vec::new(),
        columns: Column::ALL.into(),
        priority: None,
        pin: Pin::Best,
        rounds: 5,
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
            Arg::Long("rounds") => options.rounds = parser.value()?.parse()?,
            Arg::Long("ranks") => {
                let list = parser.value()?.string()?;
                options.ranks = list.split(',').map(str::parse).collect::<Result<_, _>>()?;
            }
            Arg::Long("what") => {
                options.what = parser.value()?.string()?.split(',').map(str::to_owned).collect();
            }
            Arg::Long("columns") => {
                let list = parser.value()?.string()?;
                let find = |name| Column::ALL.into_iter().find(|c| c.label() == name);
                let columns: Option<Vec<Column>> = list.split(',').map(find).collect();
                options.columns = columns.ok_or("--columns: some of shm, heap, tcp, gloo, openmpi")?;
            }
            Arg::Long("priority") => {
                options.priority = Some(match parser.value()?.string()?.as_str() {
                    "rr" => Priority::Rr,
                    "normal" => Priority::Normal,
                    other => return Err(format!("--priority {other}: expected rr or normal").into()),
                });
            }
            Arg::Long("pin") => {
                options.pin = match parser.value()?.string()?.as_str() {
                    "best" => Pin::Best,
                    "cores" => Pin::Cores,
                    "none" => Pin::None,
                    other => return Err(format!("--pin {other}: expected best, cores or none").into()),
                };
            }
            Arg::Long("rank") => {
                let way = parser.value()?.string()?;
                options.rank = Some(Way::parse(&way).ok_or("--rank: shm, heap or tcp")?);
            }
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(options)
}

fn bench(options: &Options) -> Result<ExitCode, Box<dyn Error>> {
    let permitted = Priority::Rr.is_permitted();
    let priority = options.priority.unwrap_or(if permitted { Priority::Rr } else { Priority::Normal });
    if priority == Priority::Rr {
        if !permitted {
            return Err("--priority rr: not permitted here (it needs CAP_SYS_NICE, chrt and prlimit)".into());
        }
        if std::env::var_os(RAISED).is_none() {
            // Above the ranks: a bench that cannot get the processor cannot end a rank that does not give it away.
            let mut raised = Command::new("chrt");
            raised.args(["-r", "20"]).arg(std::env::current_exe()?).args(std::env::args_os().skip(1));
            return Err(raised.env(RAISED, "1").exec().into());
        }
    }
    let folder = tempfile::tempdir()?;
    let cores = std::thread::available_parallelism()?.get();
    let mut setting = Setting {
        machine: machine(cores),
        conditions: Conditions { priority, pin: options.pin },
        load: [load(), String::new()],
        versions: Vec::new(),
    };
    let programs = programs(options, folder.path())?;
    let (mut rows, mut failed) = (Vec::new(), false);
    for &ranks in &options.ranks {
        let cases: Vec<Case> = Case::all(ranks, options.quick)
            .into_iter()
            .filter(|case| options.what.is_empty() || options.what.iter().any(|w| case.name().contains(w)))
            .collect();
        let mut contenders = Vec::new();
        for (column, program) in programs.iter().filter(|_| !cases.is_empty()) {
            match Contender::start(program, ranks, setting.conditions, folder.path()) {
                Ok(contender) => contenders.push((*column, contender)),
                Err(error) => {
                    eprintln!("LEFT OUT at {ranks} ranks: {error}");
                    failed |= column.is_ours();
                }
            }
        }
        for (column, contender) in &contenders {
            if !setting.versions.iter().any(|(label, _)| *label == column.label()) {
                setting.versions.push((column.label(), contender.version.clone()));
            }
        }
        let mut table = Vec::new();
        for case in cases {
            let measured = measure(&case, &mut contenders, options, &mut failed);
            if contender::was_interrupted() {
                return Err("interrupted".into());
            }
            table.push(Row { case, measured });
        }
        drop(contenders);
        for fault in Fault::ALL {
            if options.what.iter().any(|what| fault.name().contains(what.as_str())) {
                let (conditions, folder) = (setting.conditions, folder.path());
                table.push(failure::measure(fault, &programs, ranks, conditions, folder, &mut failed));
            }
        }
        report::print(&table);
        println!();
        rows.append(&mut table);
    }
    setting.load[1] = load();
    report::print_setting(&setting);
    let missed: Vec<String> = rows
        .iter()
        .flat_map(|row| row.targets().into_iter().map(move |t| (row, t)))
        .filter(|(_, target)| !target.met)
        .map(|(row, target)| format!("{}: {} {}", row.case.name(), target.column.label(), target.text))
        .collect();
    if options.check {
        for missed in &missed {
            println!("missed: {missed}");
        }
    }
    let object = report::json(&rows, &setting).to_string();
    if let Some(path) = &options.json {
        // Cargo starts a bench in its package's folder; a relative path was meant from where the command was given.
        let folder = std::env::var_os("LIGHTRFT_BENCH_FOLDER").unwrap_or_default();
        let path = Path::new(&folder).join(path);
        std::fs::write(&path, format!("{object}\n")).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    println!("{object}");
    Ok(ExitCode::from(u8::from(failed || options.check && !missed.is_empty())))
}

/// All rounds of a case, contenders taking turns. One that fails is left out from then on.
fn measure(
    case: &Case,
    contenders: &mut Vec<(Column, Contender)>,
    options: &Options,
    failed: &mut bool,
) -> Vec<(Column, Measured)> {
    // Seconds per round.
    let budget = if options.quick { 0.015 } else { 0.03 };
    let rounds = if options.quick { options.rounds.min(3) } else { options.rounds };
    let mut plans: Vec<(Column, usize, Vec<f64>)> = Vec::new();
    for round in 0..=rounds {
        let mut lost = Vec::new();
        let count = contenders.len();
        for turn in 0..count {
            let (column, contender) = &mut contenders[(turn + round) % count];
            let column = *column;
            let plan = plans.iter_mut().find(|(c, ..)| *c == column);
            // Large ones vary little and take long.
            if plan.as_ref().is_some_and(|(.., medians)| medians.len() == 3 && medians[0] > 20e3) {
                continue;
            }
            // The first round only finds out how many iterations the others can have.
            let (warmup, iterations) = match &plan {
                None if round == 0 => (1, 1),
                None => continue,
                // What takes long is warm from the first round.
                Some((_, iterations, _)) => (iterations / 10, *iterations),
            };
            match contender.obey(&case.order(warmup, iterations)) {
                Ok(Answer::Unsupported) => {}
                Ok(Answer::Times(nanos)) => {
                    let mut micros: Vec<f64> = nanos.iter().map(|n| *n as f64 / 1e3).collect();
                    micros.sort_by(f64::total_cmp);
                    match plan {
                        None => {
                            let fits = budget * 1e6 / micros[0].max(0.05);
                            let fewest = if micros[0] > 100e3 { 1.0 } else { 2.0 };
                            plans.push((column, fits.clamp(fewest, 2000.0) as usize, Vec::new()));
                        }
                        Some((.., medians)) => medians.push(report::median(&micros)),
                    }
                }
                Err(error) => {
                    eprintln!("LEFT OUT from {} on: {error}", case.name());
                    *failed |= column.is_ours();
                    lost.push(column);
                }
            }
        }
        contenders.retain(|(column, _)| !lost.contains(column));
    }
    let measured = plans.into_iter().filter_map(|(c, _, medians)| Some((c, Measured::of(medians)?)));
    measured.collect()
}

/// The programs of the contenders that were asked for and can be had here.
fn programs(options: &Options, folder: &Path) -> Result<Vec<(Column, Program)>, Box<dyn Error>> {
    let own = std::env::current_exe()?.display().to_string();
    let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers");
    let mut programs = Vec::new();
    for &column in &options.columns {
        let words = match column {
            Column::Shm | Column::Heap | Column::Tcp => {
                vec![own.clone(), "--rank".into(), column.label().into()]
            }
            Column::Gloo | Column::OpenMpi if !options.peers => continue,
            Column::Gloo => {
                let python = std::env::var("LIGHTRFT_PYTHON").unwrap_or_else(|_| "python3".into());
                let script = peers.join("gloo.py").display().to_string();
                // Newer names for the same calls are not worth a line per call.
                vec![python, "-W".into(), "ignore".into(), script]
            }
            Column::OpenMpi => match compile(&peers.join("mpi.c"), &folder.join("mpi")) {
                Ok(program) => {
                    let words = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"];
                    let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
                    words.extend(["-n".into(), "RANKS".into(), program]);
                    words
                }
                Err(error) => {
                    eprintln!("LEFT OUT: openmpi: {error}");
                    continue;
                }
            },
        };
        let program = Program {
            label: column.label(),
            words,
            starts_ranks: column == Column::OpenMpi,
            likes_pins: matches!(column, Column::Shm | Column::Heap | Column::OpenMpi),
        };
        programs.push((column, program));
    }
    Ok(programs)
}

/// Compiles the MPI program; returns its path.
fn compile(source: &Path, program: &Path) -> Result<String, String> {
    let mut mpicc = Command::new("mpicc");
    mpicc.args(["-O3", "-march=native", "-o"]).arg(program).arg(source);
    let out = mpicc.output().map_err(|e| format!("mpicc: {e}"))?;
    if !out.status.success() {
        return Err(format!("mpicc: {}", String::from_utf8_lossy(&out.stderr).trim()));
    }
    Ok(program.display().to_string())
}

/// The processor, its cores and the kernel.
fn machine(cores: usize) -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("unknown processor", |(_, name)| name);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{model}, {cores} cores, Linux {}", kernel.trim())
}

/// The load average of the last minute.
fn load() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().unwrap_or("unknown").to_owned()
}
