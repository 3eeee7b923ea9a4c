//! A disk in memory that forgets what was not synced: any part of it, torn and out of order.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::fs::{Entry, EntryKind, FileSystem, Lock, ReadFile, WriteFile};

/// What a crash does to everything that was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// All of it is lost.
    LoseAll,
    /// All of it was written after all.
    KeepAll,
    /// Every write, truncation to its sectors, the length that a file was created with, and every change of a name is kept or lost by itself: one of the many
    /// ways, told by the seed.
    Tear(u64),
}

/// A disk in memory. Clones are the same disk.
///
/// Every operation that changes it is counted, in order, so that a test can crash before any one of them
/// ([`crash_before`](Self::crash_before)), see what the program under test makes of the errors, and look at what the
/// medium holds afterwards ([`after`](Self::after)).
#[derive(Clone, Default)]
pub struct SimulatedDisk {
    state: Arc<Mutex<State>>,
}

/// The smallest piece that a disk writes whole.
const SECTOR: usize = 512;
const ROOT: usize = 0;

#[derive(Clone, Default)]
struct State {
    nodes: Vec<Node>,
    operations: u64,
    /// From this operation on, nothing works.
    crash_before: Option<u64>,
    /// These operations fail once, with this error.
    failing: Vec<(u64, io::ErrorKind)>,
    locks: Vec<std::path::PathBuf>,
}

#[derive(Clone)]
enum Node {
    File {
        durable: Vec<u8>,
        writes: Vec<(usize, Vec<u8>)>,
        /// Room set aside at its creation: a crash may leave it so long, with zeros.
        set_aside: usize,
    },
    Dir {
        durable: BTreeMap<String, usize>,
        changes: Vec<Change>,
    },
}

/// A change of a directory that may be lost by itself.
#[derive(Clone)]
enum Change {
    Link { name: String, node: usize },
    Unlink { name: String },
    Rename { from: String, to: String, node: usize },
    Exchange { one: String, other: String, nodes: [usize; 2] },
}

impl Change {
    fn apply(&self, names: &mut BTreeMap<String, usize>) {
        match self {
            Change::Link { name, node } => {
                names.insert(name.clone(), *node);
            }
            Change::Unlink { name } => {
                names.remove(name);
            }
            Change::Rename { from, to, node } => {
                names.remove(from);
                names.insert(to.clone(), *node);
            }
            Change::Exchange { one, other, nodes } => {
                names.insert(one.clone(), nodes[1]);
                names.insert(other.clone(), nodes[0]);
            }
        }
    }
}

fn write_at(content: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if content.len() < offset + bytes.len() {
        content.resize(offset + bytes.len(), 0);
    }
    content[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl Node {
    fn dir() -> Node {
        Node::Dir { durable: BTreeMap::new(), changes: Vec::new() }
    }

    fn content(&self) -> io::Result<Cow<'_, [u8]>> {
        let Node::File { durable, writes, .. } = self else { return Err(io::ErrorKind::IsADirectory.into()) };
        if writes.is_empty() {
            return Ok(Cow::Borrowed(durable));
        }
        let mut content = durable.clone();
        writes.iter().for_each(|(offset, bytes)| write_at(&mut content, *offset, bytes));
        Ok(Cow::Owned(content))
    }

    fn names(&self) -> io::Result<Cow<'_, BTreeMap<String, usize>>> {
        let Node::Dir { durable, changes } = self else { return Err(io::ErrorKind::NotADirectory.into()) };
        if changes.is_empty() {
            return Ok(Cow::Borrowed(durable));
        }
        let mut names = durable.clone();
        changes.iter().for_each(|change| change.apply(&mut names));
        Ok(Cow::Owned(names))
    }

    /// What a crash leaves of it.
    fn survive(&mut self, keep: &mut dyn FnMut() -> bool) {
        match self {
            Node::File { durable, writes, set_aside } => {
                if durable.len() < *set_aside && keep() {
                    durable.resize(*set_aside, 0);
                }
                *set_aside = 0;
                for (offset, bytes) in writes.drain(..) {
                    let mut at = offset;
                    for sector in bytes.chunks(SECTOR) {
                        // Sectors may arrive without those before them; the file is then long enough, with holes.
                        if keep() {
                            write_at(durable, at, sector);
                        }
                        at += sector.len();
                    }
                }
            }
            Node::Dir { durable, changes } => {
                for change in changes.drain(..) {
                    if keep() {
                        change.apply(durable);
                    }
                }
            }
        }
    }
}

impl State {
    /// Counts an operation that changes the disk.
    fn operate(&mut self) -> io::Result<()> {
        self.alive()?;
        let this = self.operations;
        self.operations += 1;
        match self.failing.iter().find(|(at, _)| *at == this) {
            Some((_, kind)) => Err((*kind).into()),
            None => Ok(()),
        }
    }

    fn alive(&self) -> io::Result<()> {
        match self.crash_before {
            Some(at) if self.operations >= at => Err(io::Error::other("the disk has crashed")),
            _ => Ok(()),
        }
    }

    fn lookup(&self, path: &Path) -> io::Result<usize> {
        let mut at = ROOT;
        for name in parts(path)? {
            at = *self.nodes[at].names()?.get(name).ok_or(io::ErrorKind::NotFound)?;
        }
        Ok(at)
    }

    /// The directory that holds a path's last name, and that name.
    fn locate<'p>(&self, path: &'p Path) -> io::Result<(usize, &'p str)> {
        let mut names = parts(path)?;
        let name = names.pop().ok_or(io::ErrorKind::InvalidInput)?;
        let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        Ok((self.lookup(parent)?, name))
    }

    fn change(&mut self, dir: usize, change: Change) {
        if let Node::Dir { changes, .. } = &mut self.nodes[dir] {
            changes.push(change);
        }
    }

    fn add(&mut self, path: &Path, node: Node) -> io::Result<usize> {
        self.operate()?;
        let (dir, name) = self.locate(path)?;
        if self.nodes[dir].names()?.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.nodes.push(node);
        let node = self.nodes.len() - 1;
        self.change(dir, Change::Link { name: name.to_owned(), node });
        Ok(node)
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        let (dir, name) = self.locate(path)?;
        self.change(dir, Change::Unlink { name: name.to_owned() });
        Ok(())
    }
}

fn parts(path: &Path) -> io::Result<Vec<&str>> {
    path.components()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name.to_str().ok_or(io::ErrorKind::InvalidInput.into())),
            Component::RootDir | Component::CurDir => None,
            _ => Some(Err(io::ErrorKind::InvalidInput.into())),
        })
        .collect()
}

impl SimulatedDisk {
    /// An empty disk.
    pub fn new() -> Self {
        let disk = SimulatedDisk::default();
        disk.state().nodes.push(Node::dir());
        disk
    }

    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.nodes.is_empty() {
            state.nodes.push(Node::dir());
        }
        state
    }

    /// Operations so far that changed the disk, or tried to.
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Lets nothing succeed from operation `n` on (the first is 0).
    pub fn crash_before(&self, n: u64) {
        self.state().crash_before = Some(n);
    }

    /// Lets operation `n` fail, and only it.
    pub fn fail_at(&self, n: u64, kind: io::ErrorKind) {
        self.state().failing.push((n, kind));
    }

    /// The disk as it is found after a crash at this moment: another disk, that works.
    pub fn after(&self, crash: Crash) -> SimulatedDisk {
        let state = self.state();
        let mut nodes = state.nodes.clone();
        let mut random = match crash {
            Crash::Tear(seed) => seed,
            _ => 0,
        };
        let mut keep = || match crash {
            Crash::LoseAll => false,
            Crash::KeepAll => true,
            Crash::Tear(_) => {
                // SplitMix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
                random = random.wrapping_add(0x9E37_79B9_7F4A_7C15);
                let mut mixed = (random ^ (random >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                (mixed ^ (mixed >> 31)) & 1 == 1
            }
        };
        nodes.iter_mut().for_each(|node| node.survive(&mut keep));
        SimulatedDisk { state: Arc::new(Mutex::new(State { nodes, ..State::default() })) }
    }

    /// The content of a file, for a test to look at or to spoil.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn content(&self, path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        let state = self.state();
        Ok(state.nodes[state.lookup(path.as_ref())?].content()?.into_owned())
    }

    /// Gives a file other content, durably: rot. The file is created when missing, its directory is not.
    ///
    /// # Errors
    /// When there is no such directory, or `path` is one.
    pub fn spoil(&self, path: impl AsRef<Path>, content: Vec<u8>) -> io::Result<()> {
        let path = path.as_ref();
        let mut state = self.state();
        let found = state.lookup(path);
        let node = match found {
            Ok(node) => node,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let (dir, name) = state.locate(path)?;
                state.nodes.push(Node::File { durable: Vec::new(), writes: Vec::new(), set_aside: 0 });
                let node = state.nodes.len() - 1;
                if let Node::Dir { durable, .. } = &mut state.nodes[dir] {
                    durable.insert(name.to_owned(), node);
                }
                node
            }
            Err(e) => return Err(e),
        };
        match &mut state.nodes[node] {
            Node::File { durable, writes, set_aside } => {
                *set_aside = 0;
                writes.clear();
                *durable = content;
                Ok(())
            }
            Node::Dir { .. } => Err(io::ErrorKind::IsADirectory.into()),
        }
    }
}

impl FileSystem for SimulatedDisk {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        let mut so_far = std::path::PathBuf::from("/");
        for name in parts(path)? {
            let parent = so_far.clone();
            so_far.push(name);
            let missing = self.state().lookup(&so_far).is_err();
            if missing {
                self.create_dir(&so_far)?;
            }
            if missing || so_far == path {
                self.sync_dir(&parent)?;
            }
        }
        Ok(())
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.state().add(path, Node::dir()).map(drop)
    }

    fn create(&self, path: &Path, bytes: u64) -> io::Result<Box<dyn WriteFile>> {
        let file = Node::File { durable: Vec::new(), writes: Vec::new(), set_aside: bytes as usize };
        let node = self.state().add(path, file)?;
        Ok(Box::new(OpenFile { disk: self.clone(), node }))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn ReadFile>> {
        let state = self.state();
        state.alive()?;
        let node = state.lookup(path)?;
        match state.nodes[node] {
            Node::File { .. } => Ok(Box::new(OpenFile { disk: self.clone(), node })),
            Node::Dir { .. } => Err(io::ErrorKind::IsADirectory.into()),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let state = self.state();
        state.alive()?;
        let names = state.nodes[state.lookup(path)?].names()?;
        let entry = |(name, node): (&String, &usize)| {
            let kind = match state.nodes[*node] {
                Node::File { .. } => EntryKind::File,
                Node::Dir { .. } => EntryKind::Dir,
            };
            Entry { name: name.clone(), kind }
        };
        Ok(names.iter().map(entry).collect())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.operate()?;
        let ((dir, old), (to_dir, new)) = (state.locate(from)?, state.locate(to)?);
        if dir != to_dir {
            return Err(io::ErrorKind::CrossesDevices.into());
        }
        let names = state.nodes[dir].names()?.into_owned();
        let node = *names.get(old).ok_or(io::ErrorKind::NotFound)?;
        if let Some(&there) = names.get(new) {
            match state.nodes[there].names() {
                Ok(inside) if !inside.is_empty() => return Err(io::ErrorKind::DirectoryNotEmpty.into()),
                _ => {}
            }
        }
        state.change(dir, Change::Rename { from: old.to_owned(), to: new.to_owned(), node });
        Ok(())
    }

    fn exchange(&self, one: &Path, other: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.operate()?;
        let nodes = [state.lookup(one)?, state.lookup(other)?];
        let ((dir, one), (other_dir, other)) = (state.locate(one)?, state.locate(other)?);
        if dir != other_dir {
            return Err(io::ErrorKind::CrossesDevices.into());
        }
        state.change(dir, Change::Exchange { one: one.to_owned(), other: other.to_owned(), nodes });
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.operate()?;
        match state.nodes[state.lookup(path)?] {
            Node::File { .. } => state.remove(path),
            Node::Dir { .. } => Err(io::ErrorKind::IsADirectory.into()),
        }
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.operate()?;
        if state.nodes[state.lookup(path)?].names()?.is_empty() {
            state.remove(path)
        } else {
            Err(io::ErrorKind::DirectoryNotEmpty.into())
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state();
        state.operate()?;
        let node = state.lookup(path)?;
        let names = state.nodes[node].names()?.into_owned();
        state.nodes[node] = Node::Dir { durable: names, changes: Vec::new() };
        Ok(())
    }

    fn try_lock(&self, path: &Path) -> io::Result<Option<Box<dyn Lock>>> {
        let mut state = self.state();
        state.alive()?;
        if state.locks.iter().any(|held| held == path) {
            return Ok(None);
        }
        state.locks.push(path.to_owned());
        Ok(Some(Box::new(HeldLock { disk: self.clone(), path: path.to_owned() })))
    }
}

#[derive(Debug)]
struct OpenFile {
    disk: SimulatedDisk,
    node: usize,
}

impl WriteFile for OpenFile {
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.disk.state();
        state.operate()?;
        if let Node::File { writes, .. } = &mut state.nodes[self.node] {
            writes.push((offset as usize, bytes.to_vec()));
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.disk.state();
        state.operate()?;
        let content = state.nodes[self.node].content()?.into_owned();
        state.nodes[self.node] = Node::File { durable: content, writes: Vec::new(), set_aside: 0 };
        Ok(())
    }
}

impl ReadFile for OpenFile {
    fn bytes(&self) -> io::Result<u64> {
        let state = self.disk.state();
        state.alive()?;
        Ok(state.nodes[self.node].content()?.len() as u64)
    }

    fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let state = self.disk.state();
        state.alive()?;
        let content = state.nodes[self.node].content()?;
        let offset = usize::try_from(offset).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let part = offset.checked_add(into.len()).and_then(|end| content.get(offset..end));
        into.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

#[derive(Debug)]
struct HeldLock {
    disk: SimulatedDisk,
    path: std::path::PathBuf,
}

impl Lock for HeldLock {}

impl Drop for HeldLock {
    fn drop(&mut self) {
        self.disk.state().locks.retain(|held| *held != self.path);
    }
}

impl fmt::Debug for SimulatedDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.state();
        write!(f, "SimulatedDisk {{ nodes: {}, operations: {} }}", state.nodes.len(), state.operations)
    }
}
