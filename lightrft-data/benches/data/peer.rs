//! Peers: a Python process for each measurement, and what one measurement says

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// One measurement in a process of its own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Taken {
    pub(crate) seconds: f64,
    /// Most memory that the process held at once, above what it held before it began.
    pub(crate) peak_mib: f64,
}

impl Taken {
    /// What a process says on its last line: nanoseconds and KiB.
    pub(crate) fn of(mut command: Command) -> Result<Self, Box<dyn Error>> {
        let name = command.get_program().to_string_lossy().into_owned();
        let output = command.stderr(Stdio::inherit()).output().map_err(|e| format!("{name}: {e}"))?;
        if !output.status.success() {
            return Err(format!("{name}: {}", output.status).into());
        }
        let text = String::from_utf8(output.stdout)?;
        let numbers: Vec<f64> = text
            .lines()
            .last()
            .unwrap_or_default()
            .split(' ')
            .map(str::parse)
            .collect::<Result<_, _>>()
            .map_err(|e| format!("{name} said `{text}`: {e}"))?;
        let &[nanoseconds, kib] = numbers.as_slice() else {
            return Err(format!("{name} said `{text}`, expected two numbers").into());
        };
        Ok(Self { seconds: nanoseconds / 1e9, peak_mib: kib / 1024.0 })
    }
}

/// A Python that has torch.
pub(crate) struct Python {
    program: String,
    script: PathBuf,
    pub(crate) versions: String,
}

impl Python {
    /// The one that `LIGHTRFT_PYTHON` names, else `python3`.
    pub(crate) fn found() -> Result<Self, Box<dyn Error>> {
        let program = std::env::var("LIGHTRFT_PYTHON").unwrap_or_else(|_| "python3".into());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/peers/data.py");
        let output = Command::new(&program).arg(&script).arg("versions").stderr(Stdio::inherit()).output();
        let output = output.map_err(|e| format!("{program}: {e}"))?;
        if !output.status.success() {
            return Err(format!("{program} cannot run the peers: {}", output.status).into());
        }
        let versions = String::from_utf8(output.stdout)?.trim().to_owned();
        Ok(Self { program, script, versions })
    }

    /// Has it do something once.
    pub(crate) fn take(&self, what: &str, argument: &str) -> Result<Taken, Box<dyn Error>> {
        let mut command = Command::new(&self.program);
        command.args(["-W", "ignore"]).arg(&self.script).args([what, argument]);
        Taken::of(command)
    }
}
