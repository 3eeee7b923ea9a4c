//! How long ranks take to learn that another was killed, fell silent, or made another call, in the midst of their own

use std::path::Path;

use crate::cases::{Case, Type};
use crate::contender::{Conditions, Contender, Program};
use crate::report::{Column, Measured, Row, median};

/// What goes wrong. The culprit is always the last rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Its process is killed; the time is that to the last survivor's error.
    Kill,
    /// Its process is stopped, and the others are on other machines, as far as the ranks know: they cannot see it, and take it
    /// for lost.
    Silence,
    /// It makes another call; the time is that of the failing call, on the rank where it took longest.
    Mismatch,
}

impl Fault {
    pub(crate) const ALL: [Fault; 3] = [Fault::Kill, Fault::Silence, Fault::Mismatch];

    /// What asks for it on the command line, and the name of its rows; also the first word of the order to the ranks.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Fault::Kill => "failure/sigkill",
            Fault::Silence => "failure/silence",
            Fault::Mismatch => "failure/mismatch",
        }
    }

    /// Jobs of ours in which it happens: silence takes seconds.
    fn samples(self) -> usize {
        match self {
            Fault::Kill => 20,
            Fault::Silence => 4,
            Fault::Mismatch => 20,
        }
    }

    /// Whether it makes sense there. Only being killed is something that peers tell of; of those, Open MPI ends the whole job.
    fn concerns(self, column: Column) -> bool {
        match self {
            Fault::Kill => column != Column::OpenMpi,
            Fault::Silence => column == Column::Tcp,
            Fault::Mismatch => matches!(column, Column::Shm | Column::Tcp),
        }
    }

    /// The program whose ranks it happens to.
    fn program(self, program: &Program) -> Program {
        let mut program = program.clone();
        if self == Fault::Silence {
            let each_alone = r#"LIGHTRFT_HOST_ID=$RANK exec "$0" "$@""#;
            program.words.splice(..0, ["sh", "-c", each_alone].map(str::to_owned));
        }
        program
    }
}

/// Of a peer, whose ranks take seconds to start.
const PEER_SAMPLES: usize = 3;

/// Lets it happen to a job of `ranks` ranks again and again; prints the median and the worst.
pub(crate) fn measure(
    fault: Fault,
    programs: &[(Column, Program)],
    ranks: usize,
    conditions: Conditions,
    folder: &Path,
    failed: &mut bool,
) -> Row {
    let case = Case { op: fault.name(), dtype: Type::F32, bytes: None, count: 0, ranks };
    let mut measured = Vec::new();
    for (column, program) in programs.iter().filter(|(column, _)| fault.concerns(*column)) {
        let samples = if column.is_ours() { fault.samples() } else { PEER_SAMPLES };
        let program = fault.program(program);
        let (mut times, mut named) = (Vec::new(), 0);
        for _ in 0..samples {
            let contender = Contender::start(&program, ranks, conditions, folder);
            match contender.and_then(|contender| contender.suffer(fault)) {
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
        // A rank that is not named, or is named by some only, is a broken promise.
        *failed |= column.is_ours() && named < samples;
        times.sort_by(f64::total_cmp);
        if let Some(worst) = times.last() {
            println!(
                "{}, {ranks} ranks: {}: median {:.2} ms, worst {:.2} ms; all who were told named the rank in {named} of \
                 {samples}",
                case.name(),
                column.label(),
                median(&times) / 1e3,
                worst / 1e3,
            );
        }
        measured.extend(Measured::of(times).map(|times| (*column, times)));
    }
    Row { case, measured }
}
