//! Three ranks, each a process: this program starts itself three times and times all-reduces.
//! `cargo run --release -p lightrft-collectives --example 3_processes`   prints a line per size
//! `mpirun -n 2 target/release/examples/3_processes`   the same ranks, started by Open MPI; or by `srun` or `torchrun`

use std::time::Instant;

use lightrft_collectives::launch::{Launcher, Output};
use lightrft_collectives::{CommunicatorExt, Error, ReduceOp, Rendezvous, Source, Transport};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // `3_processes [ranks] [tcp]`
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rendezvous = Rendezvous::from_env()?;
    if rendezvous.source() != Source::Alone {
        return Ok(rank_main(rendezvous, args.iter().any(|arg| arg == "tcp"))?);
    }
    let ranks = args.first().and_then(|n| n.parse().ok()).unwrap_or(3);
    let outcome = Launcher::new(std::env::current_exe()?)
        .args(&args)
        .ranks(ranks)
        .output(Output::PlainRankZero)
        .run()?;
    println!("{outcome}");
    std::process::exit(outcome.exit_code());
}

fn rank_main(rendezvous: Rendezvous, tcp: bool) -> Result<(), Error> {
    let transport = if tcp { Transport::Tcp } else { Transport::Auto };
    let comm = rendezvous.transport(transport).init()?;
    for (elements, rounds) in [(2, 20_000), (1 << 18, 200), (1 << 23, 10)] {
        let mut data = vec![1f32; elements];
        comm.all_reduce(&mut data, ReduceOp::Mean)?;
        comm.barrier()?;
        let begin = Instant::now();
        for _ in 0..rounds {
            comm.all_reduce(&mut data, ReduceOp::Mean)?;
        }
        let micros = begin.elapsed().as_secs_f64() * 1e6 / f64::from(rounds);
        assert!(data.iter().all(|x| *x == 1.0), "the mean of ones is one");
        if comm.rank() == 0 {
            println!(
                "all_reduce of {:>8} bytes on {} ranks: {micros:10.2} us",
                elements * 4,
                comm.world_size()
            );
        }
    }
    Ok(())
}
