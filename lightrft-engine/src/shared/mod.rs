//! Buckets of weights in files that an engine's workers map: memory which this process and they share.
//!
//! An engine that takes them says so by [`Engine::shared_buckets`](crate::Engine::shared_buckets). An update then gathers
//! into two such files in turns, and the engine is only told where in them its tensors lie. The files stay for the next
//! update: memory that nobody has used yet costs more than what is written into it.

mod folder;
mod mapping;

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::NamedTensor;
pub(crate) use folder::{StagingFolder, default_parent};
use mapping::Mapping;

/// Files for buckets, in a folder that goes with the last of them.
#[derive(Clone, Debug)]
pub struct SharedBuckets(Arc<Mutex<Files>>);

#[derive(Debug)]
struct Files {
    parent: PathBuf,
    /// Made when the first file is.
    folder: Option<StagingFolder>,
    made: usize,
    /// Files that nobody uses.
    free: Vec<Mapping>,
    /// Where the others lie in memory.
    lent: Vec<(Range<usize>, PathBuf)>,
}

/// A file's memory, and the file again for another bucket when this is dropped.
pub struct SharedBucket {
    /// There until it is dropped.
    mapping: Option<Mapping>,
    home: SharedBuckets,
}

/// Where tensors lie that one file holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Lying {
    pub(crate) file: PathBuf,
    /// Where each begins.
    pub(crate) offsets: Vec<usize>,
    /// Where the last one ends.
    pub(crate) end: usize,
}

impl SharedBuckets {
    /// Files in a folder that is made in `parent`, and removed when the last bucket and this are dropped.
    pub fn within(parent: impl Into<PathBuf>) -> Self {
        let parent = parent.into();
        Self(Arc::new(Mutex::new(Files {
            parent,
            folder: None,
            made: 0,
            free: Vec::new(),
            lent: Vec::new(),
        })))
    }

    /// At least `bytes` bytes, with anything in them: a file that was used before, if there is one.
    ///
    /// # Errors
    /// Those of the file system, with the file's or folder's name: there is no such folder, or no room in it.
    pub fn take(&self, bytes: usize) -> io::Result<SharedBucket> {
        let mapping = self.files().take(bytes)?;
        Ok(SharedBucket { mapping: Some(mapping), home: self.clone() })
    }

    /// Makes the folder, if it is not there yet.
    pub(crate) fn prepare(&self) -> io::Result<()> {
        self.files().folder().map(drop)
    }

    /// Where these tensors lie, if they are in one of the buckets that are in use.
    pub(crate) fn find(&self, tensors: &[NamedTensor<'_>]) -> Option<Lying> {
        let addresses = |tensor: &NamedTensor<'_>| {
            let range = tensor.bytes().as_ptr_range();
            range.start.addr()..range.end.addr()
        };
        let first = addresses(tensors.first()?);
        let files = self.files();
        let (memory, file) = files.lent.iter().find(|(memory, _)| memory.contains(&first.start))?;
        let mut lying = Lying { file: file.clone(), offsets: Vec::with_capacity(tensors.len()), end: 0 };
        for tensor in tensors {
            let tensor = addresses(tensor);
            if tensor.start < memory.start || tensor.end > memory.end {
                return None;
            }
            lying.offsets.push(tensor.start - memory.start);
            lying.end = lying.end.max(tensor.end - memory.start);
        }
        Some(lying)
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Files {
    fn folder(&mut self) -> io::Result<&StagingFolder> {
        let named = |error| named(&self.parent, "a folder for weights", error);
        self.folder.take_if(|folder| !folder.path().is_dir());
        match &mut self.folder {
            Some(folder) => Ok(folder),
            none => Ok(none.insert(StagingFolder::new(&self.parent).map_err(named)?)),
        }
    }

    fn take(&mut self, bytes: usize) -> io::Result<Mapping> {
        // An empty file cannot be mapped.
        let bytes = bytes.max(1);
        self.free.retain(Mapping::is_there);
        // The smallest that is large enough, or else the largest, which has the least to grow.
        let fits = |mapping: &Mapping| (mapping.len() < bytes, mapping.len().abs_diff(bytes));
        let best = (0..self.free.len()).min_by_key(|at| fits(&self.free[*at]));
        let what = format!("{bytes} bytes for a bucket of weights");
        let mapping = match best.map(|at| self.free.swap_remove(at)) {
            Some(mut mapping) => match mapping.grow(bytes) {
                Ok(()) => mapping,
                Err(error) => {
                    let error = named(mapping.path(), &what, error);
                    self.free.push(mapping);
                    return Err(error);
                }
            },
            None => {
                let name = format!("bucket-{:06}", self.made);
                self.made += 1;
                let path = self.folder()?.path().join(name);
                Mapping::create(path.clone(), bytes).map_err(|error| named(&path, &what, error))?
            }
        };
        let memory = mapping.as_ptr_range();
        self.lent.push((memory.start.addr()..memory.end.addr(), mapping.path().to_owned()));
        Ok(mapping)
    }
}

impl SharedBucket {
    /// The file.
    pub fn path(&self) -> &Path {
        self.mapping.as_ref().map_or(Path::new(""), Mapping::path)
    }
}

impl fmt::Debug for SharedBucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedBucket({} bytes in {})", self.len(), self.path().display())
    }
}

impl Deref for SharedBucket {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.mapping.as_deref().unwrap_or_default()
    }
}

impl DerefMut for SharedBucket {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.mapping.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for SharedBucket {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            let mut files = self.home.files();
            files.lent.retain(|(_, path)| path != mapping.path());
            files.free.push(mapping);
        }
    }
}

fn named(path: &Path, what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {what}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    fn files_in(folder: &Path) -> usize {
        let mut folders = std::fs::read_dir(folder).unwrap();
        folders.next().map_or(0, |f| std::fs::read_dir(f.unwrap().path()).unwrap().count() - 1)
    }

    #[test]
    fn files_that_somebody_has_removed_are_made_anew() {
        let parent = tempfile::tempdir().unwrap();
        let buckets = SharedBuckets::within(parent.path());
        let (first, second) = (buckets.take(100).unwrap(), buckets.take(100).unwrap());
        std::fs::remove_file(first.path()).unwrap();
        let gone = first.path().to_owned();
        drop(first);
        let third = buckets.take(100).unwrap();
        assert!(third.path() != gone && third.path().exists());
        let folder = third.path().parent().unwrap().to_owned();
        std::fs::remove_dir_all(&folder).unwrap();
        drop((second, third));
        let fourth = buckets.take(100).unwrap();
        assert!(fourth.path().exists() && fourth.path().parent() != Some(&folder), "{fourth:?}");
    }

    #[test]
    fn files_are_used_again_and_go_with_the_last_bucket() {
        let parent = tempfile::tempdir().unwrap();
        let buckets = SharedBuckets::within(parent.path());
        let (large, small) = (buckets.take(5000).unwrap(), buckets.take(10).unwrap());
        let (of_large, of_small) = (large.path().to_owned(), small.path().to_owned());
        drop((large, small));
        for (bytes, path, len) in [(11, &of_large, 5000), (10, &of_small, 10), (4999, &of_large, 5000)] {
            let bucket = buckets.take(bytes).unwrap();
            assert_eq!(
                (bucket.path(), bucket.len()),
                (path.as_path(), len),
                "the closest that is large enough"
            );
        }
        let one = buckets.take(6000).unwrap();
        assert_eq!((one.path(), one.len()), (of_large.as_path(), 6000), "the closest grows");
        let two = buckets.take(6000).unwrap();
        assert_eq!((two.path(), two.len(), files_in(parent.path())), (of_small.as_path(), 6000, 2));
        let three = buckets.take(1).unwrap();
        assert_eq!(files_in(parent.path()), 3);
        drop((buckets, one, two));
        assert_eq!(files_in(parent.path()), 3);
        drop(three);
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn tensors_in_a_bucket_are_told_from_others() {
        let parent = tempfile::tempdir().unwrap();
        let buckets = SharedBuckets::within(parent.path());
        let mut bucket = buckets.take(64).unwrap();
        bucket[16..20].copy_from_slice(&[1, 2, 3, 4]);
        assert_eq!(std::fs::read(bucket.path()).unwrap()[16..20], [1, 2, 3, 4]);
        let tensor = |bytes| NamedTensor::new("t", Dtype::U8, &[4], bytes).unwrap();
        let nothing = NamedTensor::new("n", Dtype::U8, &[0], &bucket[64..]).unwrap();
        let lying = Lying { file: bucket.path().to_owned(), offsets: vec![16, 60, 64], end: 64 };
        assert_eq!(buckets.find(&[tensor(&bucket[16..20]), tensor(&bucket[60..]), nothing]), Some(lying));
        let elsewhere = [0; 4];
        for others in [&[][..], &[tensor(&elsewhere)], &[tensor(&bucket[..4]), tensor(&elsewhere)]] {
            assert_eq!(buckets.find(others), None);
        }
        let other = buckets.take(4).unwrap();
        assert_eq!(buckets.find(&[tensor(&bucket[..4]), tensor(&other)]), None, "of two buckets");
        assert_eq!(SharedBuckets::within(parent.path()).find(&[tensor(&other)]), None, "of others' buckets");
        let addresses = other.as_ptr_range();
        drop(other);
        assert!(buckets.files().lent.iter().all(|(memory, _)| !memory.contains(&addresses.start.addr())));
    }

    #[test]
    fn what_is_not_there_is_named() {
        let error = SharedBuckets::within("/no/such/folder").take(1).unwrap_err();
        assert!(error.to_string().contains("/no/such/folder"), "{error}");
    }
}
