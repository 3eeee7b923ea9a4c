//! The tasks of this workspace: `cargo xtask help` lists them.
//!
//! No dependencies, so that it builds in seconds on a fresh machine.

mod bench;
mod check;
mod demo;
mod examples;
mod gpu;
mod live;
mod manifest;
mod source;
mod steps;
mod test;
mod tidy;
mod workspace;

use std::process::ExitCode;

use workspace::Workspace;

const HELP: &str = "\
Usage: cargo xtask <command>

  demo [options]   build the main job in release and run it: GRPO on this machine's CPU with the embedded engine.
                   Options go to the program: --ranks N, --steps N, --seed S, --out DIR, --resume, --help
  bench <ckpt|collectives|data|engine|sharding> [options]
                   build the bench in release and run it; --peers adds other libraries to the same run, --json FILE
                   keeps the last line, --quick takes seconds. The bench's source says the rest
  test             every test that needs no GPU and no Python: unit, integration and documentation tests of all
                   crates with their CPU features, then each numbered example
  check            rustfmt, tidy, clippy, documentation, each crate's feature sets: cheapest first, no warning allowed
  gpu build        test programs for machines with GPUs, in release, into target/gpu/; needs neither CUDA nor a GPU
  gpu test [N]     those tests on N GPUs of this machine, or on all: builds them first, or, started as
                   target/gpu/xtask on a machine without cargo, takes those beside it. A test that is skipped has failed
  gpu bench [N]    the figures of those programs, which nobody checks
  live <vllm|sglang|vllm-gpu|sglang-gpu> [DIR]
                   the driver of that server against real servers, on the CPU or, with -gpu, on a GPU, which
                   `tools/live/setup.sh vllm|sglang|vllm-gpu|sglang-gpu DIR` installs; DIR is target/live by default
  tidy             only the tree's own rules (part of check)
  help             this text
";

/// Exit code for a command line that makes no sense, as is usual for command-line programs.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let Some(command) = args.next() else {
        eprint!("{HELP}");
        return ExitCode::from(USAGE);
    };
    let rest: Vec<_> = args.collect();
    let workspace = Workspace::of_this_build();
    let command = command.to_string_lossy();
    if let ("test" | "check" | "tidy" | "help" | "--help" | "-h", Some(first)) = (&*command, rest.first()) {
        eprintln!("xtask: `{command}` takes no arguments, got `{}`", first.to_string_lossy());
        return ExitCode::from(USAGE);
    }
    match &*command {
        "bench" => bench::run(&workspace, &rest),
        "demo" => demo::run(&workspace, &rest),
        "gpu" => gpu::run(&workspace, &rest),
        "live" => live::run(&workspace, &rest),
        "test" => test::run(&workspace),
        "check" => check::run(&workspace),
        "tidy" => tidy::run(&workspace),
        "help" | "--help" | "-h" => {
            print!("{HELP}");
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("xtask: no command `{command}`; `cargo xtask help` lists them");
            ExitCode::from(USAGE)
        }
    }
}
