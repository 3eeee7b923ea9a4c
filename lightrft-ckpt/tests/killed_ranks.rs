//! One of two real processes that save together killed with SIGKILL: the other gets an error, and no half a state is left.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::error::Error as StdError;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lightrft_ckpt::testing::Observed;
use lightrft_ckpt::{
    Agreement, Alone, Checkpoints, OsFileSystem, Part, Region, Rotation, Saver, Snapshot, Verify, Which,
};

const FOLDER_VARIABLE: &str = "LIGHTRFT_CKPT_TEST_RANKS_IN";
const RANK_VARIABLE: &str = "LIGHTRFT_CKPT_TEST_RANK";
const DEADLINE: Duration = Duration::from_secs(20);
const ELEMENTS: usize = 20_000;

/// Two processes on one socket.
struct Pair {
    rank: usize,
    peer: UnixStream,
}

impl Pair {
    /// Rank 0 listens, rank 1 calls.
    fn join(rank: usize, socket: &Path) -> Pair {
        let peer = if rank == 0 {
            let listener = UnixListener::bind(socket).unwrap();
            listener.set_nonblocking(true).unwrap();
            within_deadline(|| listener.accept().map(|(peer, _)| peer))
        } else {
            within_deadline(|| UnixStream::connect(socket))
        };
        peer.set_nonblocking(false).unwrap();
        peer.set_read_timeout(Some(DEADLINE)).unwrap();
        peer.set_write_timeout(Some(DEADLINE)).unwrap();
        Pair { rank, peer }
    }
}

/// Tries until the other process is there.
fn within_deadline(mut connect: impl FnMut() -> io::Result<UnixStream>) -> UnixStream {
    let begin = Instant::now();
    loop {
        match connect() {
            Ok(peer) => return peer,
            Err(e) if begin.elapsed() > DEADLINE => panic!("{e}"),
            Err(_) => std::thread::yield_now(),
        }
    }
}

impl Agreement for Pair {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        2
    }

    fn exchange(&self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>, Box<dyn StdError + Send + Sync>> {
        let mut peer = &self.peer;
        peer.write_all(&(mine.len() as u64).to_le_bytes())?;
        peer.write_all(&mine)?;
        let mut length = [0; 8];
        peer.read_exact(&mut length)?;
        let mut theirs = vec![0; u64::from_le_bytes(length) as usize];
        peer.read_exact(&mut theirs)?;
        Ok(if self.rank == 0 { vec![mine, theirs] } else { vec![theirs, mine] })
    }
}

fn content(step: u64) -> Vec<u64> {
    (0..ELEMENTS as u64).map(|i| step * 1_000_000 + i).collect()
}

/// Not a test by itself: one of the two processes. Tells every operation, every save, and how it ended.
#[test]
fn child_that_saves_with_another() {
    let Some(folder) = std::env::var_os(FOLDER_VARIABLE) else { return };
    let folder = Path::new(&folder);
    let rank: usize = std::env::var(RANK_VARIABLE).unwrap().parse().unwrap();
    let group = Pair::join(rank, &folder.join("socket"));
    let told = Observed::new(OsFileSystem::new(), |operation| {
        writeln!(io::stdout(), "operation {}", operation.kind)
    });
    let outcome = Saver::open_on(Arc::new(told), folder.join("checkpoints"), &group).and_then(|saver| {
        let newest = saver.checkpoints().load_together(&group, Which::Newest, Verify::Everything);
        let begin = newest.map_or(1, |(newest, _)| newest.step() + 1);
        for step in begin.. {
            let all = content(step);
            let mine = ELEMENTS * rank / 2..ELEMENTS * (rank + 1) / 2;
            let mut snapshot = Snapshot::of_step(step);
            snapshot.parts.push(Part::new("w", vec![ELEMENTS], Region::Flat(mine.clone()), &all[mine]));
            saver.save(
                &group,
                &snapshot,
                &Rotation { max_num: 2, max_mem_gib: 1.0, ..Rotation::default() },
            )?;
            if writeln!(io::stdout(), "saved {step}").is_err() {
                break;
            }
        }
        Ok(())
    });
    let _ = writeln!(
        io::stdout(),
        "ended {}",
        outcome.map_or_else(|e| format!("with error {e}"), |()| String::new())
    );
}

fn start(rank: usize, folder: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_that_saves_with_another", "--nocapture", "--test-threads=1"])
        .env(FOLDER_VARIABLE, folder)
        .env(RANK_VARIABLE, rank.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

fn last_saved(lines: &[String]) -> u64 {
    let saved = |line: &String| line.split_once("saved ").map(|(_, step)| step.trim().parse().unwrap());
    lines.iter().rev().find_map(saved).unwrap_or(0)
}

#[test]
fn a_killed_rank_is_an_error_on_the_other_and_leaves_the_old_step_or_the_new() {
    // What a killed process has written is there all the same; in memory, syncing is quick.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let dir = folder.path().join("checkpoints");
    let mut found_before = 0;
    for kill in 0..24u64 {
        let _ = std::fs::remove_file(folder.path().join("socket"));
        let mut children = [0, 1].map(|rank| start(rank, folder.path()));
        let killed = (kill % 2) as usize;
        // Rank 1 writes its shard and no more; rank 0 does the rest.
        let operations = if killed == 1 { 12 + kill % 20 } else { 30 + kill * 7 % 60 };
        let outputs = children.each_mut().map(|child| {
            let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
            let (send, receive) = std::sync::mpsc::channel();
            std::thread::spawn(move || lines.for_each(|line| send.send(line).unwrap_or_default()));
            receive
        });
        let mut lines: [Vec<String>; 2] = Default::default();
        let mut begun = 0;
        while begun < operations {
            let line = outputs[killed].recv_timeout(DEADLINE).expect("a rank ended by itself");
            begun += u64::from(line.contains("operation "));
            lines[killed].push(line);
        }
        children[killed].kill().unwrap();
        // The other one ends by itself, within its deadline.
        for (lines, output) in lines.iter_mut().zip(outputs) {
            while let Ok(line) = output.recv_timeout(2 * DEADLINE) {
                lines.push(line);
            }
        }
        for child in &mut children {
            child.wait().unwrap();
        }
        let told = lines[1 - killed].iter().find_map(|line| line.split_once("ended ")).unwrap().1;
        assert!(told.starts_with("with error "), "kill {kill} of rank {killed}: {told:?}");

        let at = Checkpoints::open(&dir);
        let said = last_saved(&lines[0]).max(last_saved(&lines[1]));
        let found = match at.load(Which::Newest, Verify::Everything) {
            Ok((checkpoint, report)) => {
                assert_eq!(report.skipped, []);
                let step = checkpoint.step();
                assert_eq!(checkpoint.read_vec::<u64>("w", &Region::Whole).unwrap(), content(step));
                step
            }
            Err(_) => 0,
        };
        assert!(found >= said.max(found_before), "kill {kill}: step {found} is there, {said} was said");
        found_before = found;
    }
    assert!(found_before > 10, "the kills left no room to save: step {found_before}");
    assert_eq!(Saver::open(&dir, &Alone).unwrap().left_by_sweep(), []);
}
