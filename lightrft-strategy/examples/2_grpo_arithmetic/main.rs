//! GRPO on sums, the whole of a run: ranks, sharded training, an engine that sleeps and takes new weights,
//! checkpoints, a kill, and an exact resume.
//!
//! `cargo run --release -p lightrft-strategy --example grpo_arithmetic` starts two ranks of itself; under `torchrun
//! --no-python` or another launcher it is one of the ranks that the launcher started.

mod options;
mod rank;
mod task;

use std::env;
use std::error::Error;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode};
use std::time::Duration;

use lightrft_collectives::Rendezvous;
use lightrft_collectives::launch::{Failure, Launcher};
use lightrft_data::{Dataset, JsonLines, JsonLinesOptions};
use lightrft_strategy::{Text, check_prompts};
use options::{HELP, Options};

/// Threads of the tensor library in each rank.
const THREADS: &str = "RAYON_NUM_THREADS";

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> ExitCode {
    let options = match Options::parse() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("error: {error}\n\n{HELP}");
            return ExitCode::from(2);
        }
    };
    let launched = env::var_os("RANK").is_some();
    match if launched { be_a_rank(&options) } else { launch(&options) } {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", chain(&*error));
            ExitCode::FAILURE
        }
    }
}

/// An error with everything behind it, on one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let more = error.to_string();
        // Many errors repeat their source in their own text.
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = error.source();
    }
    text
}

fn be_a_rank(options: &Options) -> Result<ExitCode> {
    if env::var_os(THREADS).is_none() {
        // Ranks that share cores slow each other down with threads that spin. The tensor library reads the variable
        // when it starts, so this program starts again with it.
        let threads = threads(env::var("LOCAL_WORLD_SIZE").ok().and_then(|n| n.parse().ok()).unwrap_or(1));
        let error =
            Command::new(env::current_exe()?).args(env::args_os().skip(1)).env(THREADS, threads).exec();
        return Err(error.into());
    }
    let world = Rendezvous::from_env()?.init()?;
    let first = world.rank() == 0;
    rank::run(world, options)?;
    // Where another program launched the ranks, nobody else shows the result.
    if first && !options.launched_here {
        print!("{}", std::fs::read_to_string(rank::result_file(&options.out()))?);
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts the ranks; when the run is to show a crash, until one is killed, and then again to go on.
fn launch(options: &Options) -> Result<ExitCode> {
    let settings = options.settings(options.ranks)?;
    settings.validate(options.ranks)?;
    // What is wrong with the questions is said once, before any rank starts and before anything is written.
    let text = Text::from_json(task::TOKENIZER)?;
    for file in [&options.prompts, &options.held_out] {
        let questions = JsonLines::open(file, JsonLinesOptions::default())?;
        check_prompts(&text, &questions, settings.prompt_max_len, 0, 1)?;
        for index in 0..questions.len() {
            text.encode(questions.get(index)?.label.as_deref().unwrap_or_default())?;
        }
    }

    let program = env::current_exe()?;
    let run = |options: &Options| {
        Launcher::new(&program)
            .args(options.arguments())
            .env(THREADS, threads(options.ranks))
            .ranks(options.ranks)
            .grace(Duration::from_secs(1))
            .run()
    };
    let kill = options.kill_step(settings.save_steps);
    let mut outcome = run(&Options { kill_at: Some(kill.unwrap_or(0)), ..options.clone() })?;
    let staged =
        kill.is_some() && outcome.signal.is_none() && outcome.failure.is_some_and(is_staged(options));
    if staged {
        println!("{outcome}; going on from the newest checkpoint");
        outcome = run(&Options { kill_at: Some(0), resume: true, ..options.clone() })?;
    }
    if !outcome.is_success() {
        eprintln!("error: {outcome}");
        return Ok(ExitCode::from(u8::try_from(outcome.exit_code()).unwrap_or(1)));
    }
    println!("files of the run: {}", options.out().display());
    let result = std::fs::read_to_string(rank::result_file(&options.out()))?;
    print!("{result}");
    let resumed: serde_json::Value = serde_json::from_str(&result)?;
    if staged && resumed["resumed_exactly"] == false {
        return Err("the resumed run did not repeat the steps that were done before the kill".into());
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a failure is the kill that the run was asked to show.
fn is_staged(options: &Options) -> impl Fn(Failure) -> bool {
    let last = options.ranks - 1;
    move |failure| failure.rank == last && failure.status.signal() == Some(9)
}

/// An equal share of the cores for each rank, and at least one.
fn threads(ranks: usize) -> String {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    (cores / ranks.max(1)).max(1).to_string()
}
