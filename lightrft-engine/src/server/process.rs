//! A server as a process of ours: started with its log, watched until it is ready, and ended with us, however we end.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use super::error::{ServerError, shortened};
use super::http::ApiKey;
use crate::{Error, Result};

/// Ends the server's whole process group when this process lets go of a pipe, which it does even when it is killed.
const GUARDIAN: &str = include_str!("guardian.sh");

/// Between two looks at a server that starts or ends.
const POLL: Duration = Duration::from_millis(20);

/// What is read of a log's end.
const TAIL_BYTES: u64 = 16 << 10;
const TAIL_LINES: usize = 12;

/// The beginning of a log, where servers write their settings.
const START_BYTES: u64 = 16 << 20;

/// A server that starts, as a caller may want to tell about it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StartProgress {
    /// How long it has been starting.
    pub waited: Duration,
    /// The last line of its log.
    pub last_line: String,
}

/// A server's command line and surroundings.
pub(crate) struct ServerCommand {
    /// How errors call it.
    pub(crate) engine: &'static str,
    pub(crate) program: OsString,
    pub(crate) args: Vec<OsString>,
    /// Beside those of this process.
    pub(crate) variables: BTreeMap<OsString, OsString>,
    pub(crate) folder: Option<PathBuf>,
    /// Where its output goes; a file of its own in the system's temporary folder if it is not said.
    pub(crate) log: Option<PathBuf>,
    /// How long it may take to end when it is asked to.
    pub(crate) grace: Duration,
    /// Taken out of what is repeated of its log.
    pub(crate) key: Option<ApiKey>,
}

impl fmt::Debug for ServerCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be secrets.
        let names: Vec<&OsString> = self.variables.keys().collect();
        write!(f, "{} {:?}, with the variables {names:?}", self.program.display(), self.args)
    }
}

impl ServerCommand {
    pub(crate) fn new(engine: &'static str, program: impl AsRef<OsStr>) -> Self {
        Self {
            engine,
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            variables: BTreeMap::new(),
            folder: None,
            log: None,
            grace: Duration::from_secs(10),
            key: None,
        }
    }

    /// Adds an argument.
    pub(crate) fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Sets a variable of its environment.
    pub(crate) fn variable(&mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.variables.insert(name.as_ref().to_owned(), value.as_ref().to_owned());
        self
    }
}

/// A running server, the leader of a process group. Dropped, it is asked to end, and killed if it does not: that may
/// take its grace period.
///
/// If this process is killed, with SIGKILL too, the server is ended in the same way, with all that it has started.
pub(crate) struct ServerProcess {
    engine: &'static str,
    child: Child,
    /// The pipe that keeps it alive.
    lifeline: Option<ChildStdin>,
    status: Option<ExitStatus>,
    grace: Duration,
    log: PathBuf,
    /// The log goes with the server, unless something went wrong.
    log_is_ours: bool,
    key: Option<ApiKey>,
}

impl fmt::Debug for ServerProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "ServerProcess({}, process group {}, log {})",
            self.engine,
            self.child.id(),
            self.log.display()
        )
    }
}

impl ServerProcess {
    /// Starts the command. It may end again at once: see [`wait_until_ready`](Self::wait_until_ready).
    pub(crate) fn start(command: &ServerCommand) -> Result<Self, ServerError> {
        let engine = command.engine;
        let failed = |source| {
            let program = command.program.to_string_lossy().into_owned();
            ServerError::Start { engine, program, source }
        };
        let (output, log) = match &command.log {
            None => own_log(engine).map_err(failed)?,
            Some(log) => {
                let named = |source: io::Error| {
                    failed(io::Error::new(source.kind(), format!("{}: {source}", log.display())))
                };
                let mut options = OpenOptions::new();
                options.write(true).create(true).truncate(true);
                if command.key.is_some() {
                    // It may stand there until the server is ready.
                    options.mode(0o600);
                }
                (options.open(log).map_err(named)?, log.clone())
            }
        };
        let mut shell = Command::new("sh");
        shell.args(["-c", GUARDIAN, "lightrft-guardian", &command.grace.as_secs().max(1).to_string()]);
        shell.arg(&command.program).args(&command.args).envs(&command.variables);
        if let Some(folder) = &command.folder {
            shell.current_dir(folder);
        }
        shell
            .stdin(Stdio::piped())
            .stdout(output.try_clone().map_err(failed)?)
            .stderr(output)
            .process_group(0);
        let mut child = shell.spawn().map_err(failed)?;
        let lifeline = child.stdin.take();
        tracing::info!(engine, pid = child.id(), log = %log.display(), "server started");
        Ok(Self {
            engine,
            child,
            lifeline,
            status: None,
            grace: command.grace,
            log,
            log_is_ours: command.log.is_none(),
            key: command.key.clone(),
        })
    }

    /// Waits until `ready` says so, at most `within`; `ready` is given how long it may take. The process is looked at
    /// between the questions.
    pub(crate) fn wait_until_ready(
        &mut self,
        within: Duration,
        mut ready: impl FnMut(Duration) -> bool,
        tell: &mut dyn FnMut(&StartProgress),
    ) -> Result<(), ServerError> {
        let start = Instant::now();
        let mut told = Duration::ZERO;
        loop {
            self.alive()?;
            if ready(Duration::from_secs(1)) {
                self.scrub();
                // Somebody else may have answered on the port that ours could not have.
                return self.alive();
            }
            let waited = start.elapsed();
            if waited >= within {
                let (log, last_lines) = (self.log.clone(), self.last_lines());
                self.keep_log();
                return Err(ServerError::NotReady { engine: self.engine, waited, log, last_lines });
            }
            if waited - told >= Duration::from_millis(250) {
                told = waited;
                let last_line =
                    self.last_lines().lines().last().unwrap_or_default().chars().take(200).collect();
                tell(&StartProgress { waited, last_line });
            }
            thread::sleep(POLL * 5);
        }
    }

    /// Nothing while it runs; once it has ended, the error that says how.
    pub(crate) fn alive(&mut self) -> Result<(), ServerError> {
        if self.status.is_none() && self.has_ended() {
            self.reap();
        }
        match self.status {
            None => Ok(()),
            Some(status) => {
                let (log, last_lines) = (self.log.clone(), self.last_lines());
                self.keep_log();
                Err(ServerError::Exited { engine: self.engine, status, log, last_lines })
            }
        }
    }

    /// The same, for one that may be about to end: it is given `within` to do so. One that runs on costs that time.
    pub(crate) fn ends_within(&mut self, within: Duration) -> Result<(), ServerError> {
        let start = Instant::now();
        while !self.has_ended() && start.elapsed() < within {
            thread::sleep(POLL);
        }
        self.alive()
    }

    /// Where its output goes.
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// The id of its process group, which every process that it started belongs to, unless it has left it.
    pub(crate) fn group(&self) -> u32 {
        self.child.id()
    }

    /// The end of its log, without the key.
    pub(crate) fn last_lines(&self) -> String {
        let forms = self.key.as_ref().map(ApiKey::forms).unwrap_or_default();
        let most_cut = forms.iter().map(String::len).max().unwrap_or(0);
        let tail =
            read_tail(&self.log, most_cut).unwrap_or_else(|error| format!("(cannot be read: {error})"));
        let lines: Vec<&str> = tail.lines().filter(|line| !line.trim().is_empty()).collect();
        let text = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n");
        shortened(&match &self.key {
            Some(key) => key.redact(text),
            None => text,
        })
    }

    /// The log stays after the server, for whoever looks for what went wrong.
    fn keep_log(&mut self) {
        self.log_is_ours = false;
        self.scrub();
    }

    /// Overwrites the key where the server has written it into its log, as `SGLang` does with all of its settings when it
    /// starts.
    fn scrub(&self) {
        let Some(key) = &self.key else { return };
        if let Err(error) = overwrite(&self.log, &key.forms()) {
            tracing::warn!(log = %self.log.display(), %error, "the key may stand in the server's log");
        }
    }

    /// Asks it to end, and kills it if it has not when its grace period is over.
    pub(crate) fn stop(&mut self) {
        if self.status.is_some() {
            return;
        }
        // The guardian asks and kills; one that was killed itself is stood in for.
        self.lifeline = None;
        let start = Instant::now();
        let patience = self.grace.max(Duration::from_secs(1)) + Duration::from_secs(2);
        while !self.has_ended() && start.elapsed() < patience {
            thread::sleep(POLL);
        }
        self.reap();
        tracing::info!(engine = self.engine, pid = self.child.id(), "server stopped");
    }

    /// Whether its process has ended. It is not reaped: until then its group's number is nobody else's.
    fn has_ended(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        match waitid(WaitId::Pid(Pid::from_child(&self.child)), options) {
            Ok(status) => status.is_some(),
            Err(rustix::io::Errno::INTR) => false,
            // Somebody else has reaped it: this process ignores SIGCHLD, for instance.
            Err(_) => true,
        }
    }

    /// Kills what is left of the group, and takes the leader's status.
    fn reap(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        // Killed, it ends.
        let unknown = ExitStatus::from_raw(0);
        self.status = Some(self.child.wait().unwrap_or(unknown));
        self.lifeline = None;
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.stop();
        if self.log_is_ours {
            let _ = fs::remove_file(&self.log);
        }
    }
}

/// How long a port may still be in use of a server that was just killed.
const PORT_PATIENCE: Duration = Duration::from_secs(1);

/// Refuses a port that cannot be listened on now.
fn check_free(engine: &'static str, port: u16) -> Result<()> {
    let bad = |expected| Err(Error::Settings { engine, field: "port", value: port.to_string(), expected });
    if port == 0 {
        return bad("a port of 1 to 65535 was expected, or none for one that is free");
    }
    let start = Instant::now();
    loop {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                return bad("a port that this user may listen on was expected, or none for one that is free");
            }
            Err(_) if start.elapsed() >= PORT_PATIENCE => {
                return bad("somebody listens on it: another was expected, or none for one that is free");
            }
            Err(_) => thread::sleep(POLL),
        }
    }
}

/// A port of this machine that nobody listens on now.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// Launches on this port, if nobody listens on it: whoever does would be taken for the server. Without one it is launched on
/// a port that is free. Somebody else may take that between the moment it is found free and the server's own taking it: then
/// on another, and of the log of the one before, which is at `log` if it is the caller's, nothing is left.
pub(crate) fn on_port<T>(
    engine: &'static str,
    port: Option<u16>,
    log: Option<&Path>,
    mut launch: impl FnMut(u16) -> Result<T>,
) -> Result<T> {
    if let Some(port) = port {
        check_free(engine, port)?;
        return launch(port);
    }
    let mut attempts = 3;
    loop {
        attempts -= 1;
        let port = free_port().map_err(|source| Error::Backend {
            engine,
            operation: "find a free port",
            source: Box::new(source),
        })?;
        let result = launch(port);
        match &result {
            Err(Error::Server(error)) if error.is_of_a_taken_port() && attempts > 0 => error.discard_log(log),
            _ => return result,
        }
    }
}

/// A log that nobody else reads or has put there.
fn own_log(engine: &str) -> io::Result<(File, PathBuf)> {
    let prefix = format!("lightrft-{}-", engine.to_lowercase());
    Ok(tempfile::Builder::new().prefix(&prefix).suffix(".log").tempfile()?.keep()?)
}

/// Overwrites these texts in the beginning of a file, in place: somebody goes on writing at its end.
fn overwrite(path: &Path, texts: &[String]) -> io::Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut bytes = Vec::new();
    (&file).take(START_BYTES).read_to_end(&mut bytes)?;
    for text in texts.iter().filter(|text| !text.is_empty()) {
        let mut at = 0;
        while let Some(found) = bytes.get(at..).and_then(|rest| find(rest, text.as_bytes())) {
            at += found;
            file.write_all_at(&vec![b'*'; text.len()], at as u64)?;
            bytes.get_mut(at..at + text.len()).unwrap_or_default().fill(b'*');
            at += text.len();
        }
    }
    Ok(())
}

fn find(bytes: &[u8], text: &[u8]) -> Option<usize> {
    bytes.windows(text.len()).position(|window| window == text)
}

/// The end of a file, from the beginning of a line on. Of one long line its end, `most_cut` bytes less: where it is cut, a part
/// of the key could stand that is not known for one.
fn read_tail(path: &Path, most_cut: usize) -> io::Result<String> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let mut whole = &bytes[..];
    if length > TAIL_BYTES {
        let line = bytes.iter().position(|byte| *byte == b'\n').map_or(most_cut, |end| end + 1);
        whole = bytes.get(line..).unwrap_or_default();
    }
    Ok(String::from_utf8_lossy(whole).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn script(script: &str) -> ServerCommand {
        let mut command = ServerCommand::new("test", "sh");
        command.arg("-c").arg(script);
        command
    }

    /// Whether a process is there and not merely waiting to be reaped.
    fn lives(pid: &str) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
        !stat.rsplit(')').next().unwrap().trim_start().starts_with(['Z', 'X'])
    }

    fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < LONG, "{what}");
            thread::sleep(POLL);
        }
    }

    /// The whole of a file that another process writes one line into.
    fn line_in(path: &Path) -> String {
        let mut line = String::new();
        eventually("a line is written", || {
            line = fs::read_to_string(path).unwrap_or_default();
            line.ends_with('\n')
        });
        line.trim().to_owned()
    }

    /// A server with a child of its own, which writes the child's process id into `file`, and one that is deaf.
    fn family(file: &Path) -> ServerCommand {
        let file = file.display();
        script(&format!(
            "(trap '' TERM; while :; do sleep 1; done) & echo \"$$ $!\" > {file}.new; mv {file}.new {file}; wait"
        ))
    }

    #[test]
    fn a_server_that_ends_at_once_is_an_error_with_its_last_words() {
        let mut command = script("echo starting; echo out of memory, key sesame >&2; exit 3");
        command.key = Some(ApiKey::new("sesame"));
        let mut process = ServerProcess::start(&command).unwrap();
        let error = process.wait_until_ready(LONG, |_| false, &mut |_| ()).unwrap_err();
        let ServerError::Exited { status, last_lines, log, .. } = &error else { panic!("{error:?}") };
        assert_eq!((status.code(), last_lines.as_str()), (Some(3), "starting\nout of memory, key ***"));
        assert!(error.to_string().contains("exit status: 3"), "{error}");
        let log = log.clone();
        drop(process);
        assert!(log.exists(), "the log of a failure is kept");
        fs::remove_file(log).unwrap();
    }

    #[test]
    fn a_key_that_a_server_writes_into_its_log_is_overwritten() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        // As it is, as Python prints it and as JSON has it; and what comes after it stays as it was.
        let settings =
            r#"printf '%s\n' "api_key='$KEY'" "{\"key\": \"$JSON\"}" "$PYTHON"; echo up; exec sleep 1000"#;
        let mut command = script(settings);
        let key = "a\"b'c\\d";
        command.variable("KEY", key).variable("JSON", r#"a\"b'c\\d"#).variable("PYTHON", r#"a"b\'c\\d"#);
        command.key = Some(ApiKey::new(key));
        command.log = Some(log.clone());
        let mut server = ServerProcess::start(&command).unwrap();
        assert_eq!(fs::metadata(&log).unwrap().permissions().mode() & 0o777, 0o600);
        let up = |_| fs::read_to_string(&log).unwrap().contains("up\n");
        server.wait_until_ready(LONG, up, &mut |_| ()).unwrap();
        let text = fs::read_to_string(&log).unwrap();
        assert_eq!(text, "api_key='*******'\n{\"key\": \"*********\"}\n*********\nup\n");
    }

    #[test]
    fn no_part_of_the_key_is_left_where_a_log_is_cut() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = script("exec sleep 1000");
        (command.log, command.key) = (Some(log.clone()), Some(ApiKey::new("sesame")));
        let process = ServerProcess::start(&command).unwrap();
        for after in (TAIL_BYTES as usize - 8)..=(TAIL_BYTES as usize) {
            fs::write(&log, format!("sesame{}", "x".repeat(after))).unwrap();
            let lines = process.last_lines();
            assert!(lines.trim_start_matches("***").starts_with('x'), "{after}: {}", &lines[..20]);
            fs::write(&log, format!("sesame{}\nlast", "x".repeat(after - 5))).unwrap();
            let lines = process.last_lines();
            assert!(lines == "last" || lines.starts_with("***x"), "{after}: {lines}");
        }
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let mut process = ServerProcess::start(&ServerCommand::new("test", "/no/such/program")).unwrap();
        let error = process.wait_until_ready(LONG, |_| false, &mut |_| ()).unwrap_err();
        assert!(error.to_string().contains("/no/such/program"), "{error}");
        fs::remove_file(process.log()).unwrap();
        let mut command = script("true");
        command.log = Some("/no/such/folder/log".into());
        let error = ServerProcess::start(&command).unwrap_err();
        assert!(error.to_string().contains("/no/such/folder/log"), "{error}");
    }

    #[test]
    fn a_server_that_never_gets_ready_is_given_up_and_ended() {
        let folder = tempfile::tempdir().unwrap();
        let mut command = script("echo $$; echo loading; exec sleep 1000");
        command.log = Some(folder.path().join("log"));
        let mut process = ServerProcess::start(&command).unwrap();
        let mut lines = Vec::new();
        let mut tell = |progress: &StartProgress| lines.push(progress.last_line.clone());
        let error = process.wait_until_ready(Duration::from_secs(2), |_| false, &mut tell).unwrap_err();
        assert!(matches!(&error, ServerError::NotReady { .. }), "{error:?}");
        assert!(error.to_string().ends_with("loading"), "{error}");
        assert!(error.to_string().contains("raise `ready_within`"), "{error}");
        assert!(lines.iter().any(|line| line == "loading"), "{lines:?}");
        drop(process);
        let log = fs::read_to_string(folder.path().join("log")).unwrap();
        assert!(!lives(log.lines().next().unwrap()));
    }

    #[test]
    fn a_server_is_ready_when_it_says_so_and_its_log_goes_with_it() {
        let mut asked = 0;
        let mut process = ServerProcess::start(&script("exec sleep 1000")).unwrap();
        let ready = |_: Duration| {
            asked += 1;
            asked == 3
        };
        process.wait_until_ready(LONG, ready, &mut |_| ()).unwrap();
        process.alive().unwrap();
        let log = process.log().to_owned();
        assert!(log.exists());
        drop(process);
        assert!(!log.exists());
    }

    #[test]
    fn a_stopped_server_takes_its_descendants_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pids");
        let mut process = ServerProcess::start(&family(&file)).unwrap();
        let pids = line_in(&file);
        let group = process.group().to_string();
        assert!(pids.split(' ').all(lives) && lives(&group));
        process.stop();
        // Killed, the child ends as soon as it has a core.
        eventually("the server and its deaf child are gone", || !pids.split(' ').any(lives));
        assert!(!lives(&group) && !Path::new(&format!("/proc/{group}")).exists(), "the leader is reaped");
        assert!(matches!(process.alive(), Err(ServerError::Exited { .. })));
        fs::remove_file(process.log()).unwrap();
    }

    #[test]
    fn a_server_may_say_good_bye() {
        let mut process = ServerProcess::start(&script(
            "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.1; done",
        ))
        .unwrap();
        eventually("it is up", || process.last_lines() == "up");
        process.stop();
        assert!(process.last_lines().contains("bye"), "{}", process.last_lines());
    }

    #[test]
    fn a_deaf_server_is_killed() {
        let mut command = script("trap '' TERM; echo deaf; while :; do sleep 1; done");
        command.grace = Duration::from_secs(1);
        let mut process = ServerProcess::start(&command).unwrap();
        process.wait_until_ready(LONG, |_| fs::metadata("/").is_ok(), &mut |_| ()).unwrap();
        eventually("it speaks", || process.last_lines() == "deaf");
        process.stop();
        assert_eq!(process.status.unwrap().signal(), Some(9));
    }

    #[test]
    fn descendants_that_outlive_a_server_are_ended_when_that_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pids");
        let mut command = script(&format!("sleep 1000 & echo $! > {}; exit 5", file.display()));
        command.log = Some(folder.path().join("log"));
        let mut process = ServerProcess::start(&command).unwrap();
        eventually("it ends", || process.alive().is_err());
        let pid = line_in(&file);
        eventually("its child is ended", || !lives(&pid));
    }

    #[test]
    fn nothing_is_launched_on_a_port_that_somebody_listens_on() {
        let stray = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = stray.local_addr().unwrap().port();
        let launch = |port| Ok::<_, Error>(port);
        for taken in [port, 0] {
            let error =
                on_port("test", Some(taken), None, |_| -> Result<()> { panic!("launched") }).unwrap_err();
            assert!(
                matches!(&error, Error::Settings { field: "port", value, .. } if *value == taken.to_string()),
                "{error:?}"
            );
        }
        assert_ne!(on_port("test", None, None, launch).unwrap(), port);
        drop(stray);
        assert_eq!(on_port("test", Some(port), None, launch).unwrap(), port);
    }

    #[test]
    fn logs_of_servers_that_are_started_again_are_removed_and_nobody_else_reads_the_last() {
        let mut logs = Vec::new();
        let mut launch = |port: u16| -> Result<()> {
            let command = script(&format!("echo 'Address already in use: {port}'; exit 1"));
            let mut process = ServerProcess::start(&command)?;
            logs.push(process.log().to_owned());
            Ok(process.wait_until_ready(LONG, |_| false, &mut |_| ())?)
        };
        let error = on_port("test", None, None, &mut launch).unwrap_err();
        assert!(matches!(&error, Error::Server(error) if error.is_of_a_taken_port()), "{error:?}");
        let (last, before) = logs.split_last().unwrap();
        assert!(before.len() == 2 && !before.iter().any(|log| log.exists()), "{logs:?}");
        let mode = std::os::unix::fs::MetadataExt::mode(&fs::metadata(last).unwrap());
        assert_eq!(mode & 0o777, 0o600);
        fs::remove_file(last).unwrap();
    }

    /// Not a test by itself: the process that the next one kills.
    #[test]
    fn victim() {
        let Some(file) = std::env::var_os("LIGHTRFT_TEST_VICTIM").map(PathBuf::from) else { return };
        let mut command = match std::env::var_os("LIGHTRFT_TEST_SERVER_ENDS") {
            // It ends by itself, and leaves a child.
            Some(_) => {
                let file = file.display();
                script(&format!("sleep 1000 & echo \"$PPID $!\" > {file}.new; mv {file}.new {file}; exit 5"))
            }
            // Deaf itself too: nobody but the guardian is left to kill it.
            None => {
                let mut command = family(Path::new(&file));
                command.args[1] = format!("trap '' TERM; {}", command.args[1].display()).into();
                command
            }
        };
        command.grace = Duration::from_secs(1);
        command.log = Some(file.with_extension("log"));
        let process = ServerProcess::start(&command).unwrap();
        thread::sleep(LONG * 2);
        drop(process);
    }

    /// A process of its own that starts a server which writes process ids into `file`.
    fn start_victim(file: &Path, configure: impl FnOnce(&mut Command)) -> Child {
        let mut victim = Command::new(std::env::current_exe().unwrap());
        victim.args(["--exact", "server::process::tests::victim"]);
        victim.env("LIGHTRFT_TEST_VICTIM", file).stdout(Stdio::null());
        configure(&mut victim);
        victim.spawn().unwrap()
    }

    #[test]
    fn a_server_and_its_descendants_end_with_a_process_that_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pids");
        let mut parent = start_victim(&file, |_| ());
        let pids = line_in(&file);
        assert!(pids.split(' ').all(lives));
        parent.kill().unwrap();
        parent.wait().unwrap();
        eventually("the server and its deaf child are gone", || !pids.split(' ').any(lives));
    }

    #[test]
    fn descendants_of_a_server_that_ended_by_itself_end_with_a_process_that_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pids");
        let mut parent = start_victim(&file, |victim| {
            victim.env("LIGHTRFT_TEST_SERVER_ENDS", "1");
        });
        let pids = line_in(&file);
        let (shell, child) = pids.split_once(' ').unwrap();
        eventually("the server and its shell end", || !lives(shell));
        assert!(lives(child));
        parent.kill().unwrap();
        parent.wait().unwrap();
        eventually("its child is gone", || !lives(child));
    }
}
