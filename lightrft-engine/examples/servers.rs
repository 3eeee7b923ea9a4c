//! Several servers of one model behind one handle. End one of them while it draws, and watch the others go on.
//!
//! `cargo run -p lightrft-engine --features vllm,sglang --example servers -- vllm FOLDER [COUNT [PROGRAM]]`
//!
//! or `sglang` in its place, with its Python for `PROGRAM`. Starts `COUNT` servers of the model in `FOLDER` (2 if it is not
//! said), prints their process groups, and makes ten calls. On a machine with GPUs each
//! server has its own, by its index; where there are none, say so by `CPU=1`.

use std::error::Error;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lightrft_engine::sglang::{self, MemorySaver, Seeds, SglangEngine};
use lightrft_engine::vllm::{self, VllmEngine};
use lightrft_engine::{DataParallel, Engine, Request, Sampling, StartProgress, Watch};

const USAGE: &str = "usage: servers vllm|sglang FOLDER [COUNT [PROGRAM]]";

/// What kind of server, of which model, where.
#[derive(Clone)]
struct Servers {
    engine: String,
    folder: PathBuf,
    program: Option<PathBuf>,
    gpus: bool,
}

impl Servers {
    fn start(&self, replica: usize) -> lightrft_engine::Result<Box<dyn Engine>> {
        let mut tell = |progress: &StartProgress| {
            eprintln!("  {replica} {:5.1?} {}", progress.waited, progress.last_line);
        };
        let gpus = if self.gpus { vec![replica as u32] } else { Vec::new() };
        if self.engine == "vllm" {
            let mut start = vllm::Start::new(self.folder.to_string_lossy());
            start.program = self.program.clone().unwrap_or(start.program);
            start.sleep_mode = self.gpus;
            start.gpus = gpus;
            let engine = VllmEngine::start(&start, &mut tell)?;
            println!("replica {replica}: {} of process group {:?}", engine.url(), engine.process());
            return Ok(Box::new(engine));
        }
        let mut start = sglang::Start::new(&self.folder);
        start.program = self.program.clone().unwrap_or(start.program);
        if !self.gpus {
            (start.memory_saver, start.seeds) = (MemorySaver::Off, Seeds::Ignored);
        }
        start.gpus = gpus;
        let engine = SglangEngine::start(&start, &mut tell)?;
        println!("replica {replica}: {} of process group {:?}", engine.url(), engine.process());
        Ok(Box::new(engine))
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(engine), Some(folder)) = (args.next(), args.next()) else { return Err(USAGE.into()) };
    if engine != "vllm" && engine != "sglang" {
        return Err(USAGE.into());
    }
    let count = args.next().map_or(Ok(2), |count| count.parse())?;
    let program = args.next().map(PathBuf::from);
    let gpus = std::env::var_os("CPU").is_none();
    let servers = Servers { engine, folder: folder.into(), program, gpus };
    let mut engines = DataParallel::new(count, move |replica| servers.start(replica))?
        .telling(|event| println!("{event:?}"));

    // Of different lengths, four samples each, without a stop: every token is drawn.
    let sampling = Sampling { max_new_tokens: 100, ..Sampling::default() };
    let requests: Vec<Request> =
        (1..17_u32).map(|n| Request::new((1..=n).collect::<Vec<_>>(), sampling.clone()).samples(4)).collect();
    let mut first = None;
    for call in 0..10 {
        let started = Instant::now();
        let completions = engines.generate(&requests, &mut Watch::within(Duration::from_secs(600)))?;
        let seconds = started.elapsed().as_secs_f64();
        let tokens: usize = completions.iter().map(|c| c.tokens.len()).sum();
        let drawn: Vec<_> = completions.into_iter().map(|c| c.tokens).collect();
        let equal =
            drawn.iter().zip(first.get_or_insert_with(|| drawn.clone())).filter(|(a, b)| a == b).count();
        println!(
            "call {call}: {tokens} tokens in {seconds:.1} s; {equal} of {} completions as in the first call",
            drawn.len()
        );
        let services: Vec<_> = engines.replicas().iter().map(|replica| replica.service).collect();
        println!("  {services:?}");
    }
    Ok(())
}
