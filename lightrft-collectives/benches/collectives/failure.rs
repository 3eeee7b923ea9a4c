//! How long survivors take to notice that a rank was killed in the midst of their calls

use std::path::Path;

use crate::cases::{Case, Type};
use crate::contender::{Conditions, Contender, Program};
use crate::report::{Column, Measured, Row};

/// What asks for it on the command line, and the name of its rows.
pub(crate) const NAME: &str = "failure/sigkill";

/// Ranks killed, each in a job of its own.
const SAMPLES: usize = 10;

/// Of a peer, whose ranks take seconds to start.
const PEER_SAMPLES: usize = 3;

/// Kills the last rank of a job of `ranks` ranks again and again. Open MPI is left out: it ends the whole job.
pub(crate) fn measure(
    programs: &[(Column, Program)],
    ranks: usize,
    conditions: Conditions,
    folder: &Path,
    failed: &mut bool,
) -> Row {
    let case = Case { op: NAME, dtype: Type::F32, bytes: None, count: 0, ranks };
    let mut measured = Vec::new();
    for (column, program) in programs.iter().filter(|(column, _)| *column != Column::OpenMpi) {
        let samples = if column.is_ours() { SAMPLES } else { PEER_SAMPLES };
        let (mut times, mut named) = (Vec::new(), 0);
        for _ in 0..samples {
            let sample =
                Contender::start(program, ranks, conditions, folder).and_then(Contender::lose_a_rank);
            match sample {
                Ok((time, by_all)) => {
                    times.push(time.as_secs_f64() * 1e6);
                    named += usize::from(by_all);
                }
                Err(error) => {
                    eprintln!("LEFT OUT from {}: {error}", case.name());
                    *failed |= column.is_ours();
                }
            }
        }
        println!("{}: {}: all survivors named the rank in {named} of {samples}", case.name(), column.label());
        // A rank that is not named, or is named by some only, is a broken promise.
        *failed |= column.is_ours() && named < samples;
        measured.extend(Measured::of(times).map(|times| (*column, times)));
    }
    Row { case, measured }
}
