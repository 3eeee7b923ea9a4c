//! Files written past the page cache where the system allows it, and through it where not.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::aligned::{ALIGN, is_aligned};
use crate::fs::WriteFile;

/// One file behind two descriptors: one that goes through the page cache, one that goes past it.
///
/// What is aligned goes past; the rest, which is the end of the file, goes through. No page of a file is written both
/// ways at the same time: the end follows what goes before it in its block, and blocks are multiples of pages.
pub(crate) struct DirectFile<F> {
    file: F,
    direct: Option<F>,
    /// What the system wants offsets, lengths and addresses to be multiples of, a power of two.
    align: usize,
    /// The file system opened the file for direct writes, and then would not have one.
    refused: AtomicBool,
}

impl<F: FileExt> DirectFile<F> {
    pub(crate) fn new(file: F, direct: Option<F>) -> Self {
        DirectFile { file, direct, align: ALIGN, refused: AtomicBool::new(false) }
    }

    /// With the alignment that a system is said to want, to see what it makes of a wrong one.
    #[cfg(test)]
    pub(crate) fn with_align(self, align: usize) -> Self {
        DirectFile { align, ..self }
    }

    /// How much of `bytes` can go past the page cache, and by which descriptor.
    fn direct_part(&self, offset: u64, bytes: &[u8]) -> Option<(&F, usize)> {
        let direct = self.direct.as_ref().filter(|_| !self.refused.load(Ordering::Relaxed))?;
        let part = bytes.len() - bytes.len() % self.align;
        let fits = part > 0 && offset.is_multiple_of(self.align as u64) && is_aligned(bytes, self.align);
        fits.then_some((direct, part))
    }

    fn write_all(&self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        // A write that was cut short where it is no longer aligned goes on through the page cache.
        while let Some((direct, part)) = self.direct_part(offset, bytes) {
            match direct.write_at(&bytes[..part], offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => (offset, bytes) = (offset + n as u64, &bytes[n..]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
                    tracing::debug!(%e, "direct writes are refused here; going through the page cache");
                    self.refused.store(true, Ordering::Relaxed);
                }
                Err(e) => return Err(e),
            }
        }
        self.file.write_all_at(bytes, offset)
    }
}

impl<F> fmt::Debug for DirectFile<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direct = self.direct.is_some() && !self.refused.load(Ordering::Relaxed);
        f.debug_struct("DirectFile").field("direct", &direct).finish_non_exhaustive()
    }
}

impl WriteFile for DirectFile<File> {
    fn write_all_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all(offset, bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        // Of the file, not of the descriptor: what went past the page cache needs the disk's own cache flushed, and
        // its extents recorded.
        self.file.sync_data()
    }
}

/// Opens a file that is there for writes past the page cache; `None` where the system would not.
pub(crate) fn open(path: &Path) -> Option<File> {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        let flags = rustix::fs::OFlags::DIRECT.bits().cast_signed();
        match std::fs::OpenOptions::new().write(true).custom_flags(flags).open(path) {
            Ok(direct) => return Some(direct),
            Err(e) => tracing::debug!(path = %path.display(), %e, "not opened for direct writes"),
        }
    }
    let _ = path;
    None
}

/// Sets room aside for a new file, which then has that length: so a full disk is told before anything is written, the
/// file lies in few pieces, and direct writes by several threads need not wait for each other to extend it.
///
/// # Errors
/// When there is no room. A file system that cannot set room aside is no error.
pub(crate) fn set_aside(file: &File, bytes: u64) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    if bytes > 0 {
        use rustix::io::Errno;
        match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes) {
            Ok(()) => {}
            Err(e @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::IO)) => return Err(e.into()),
            // Not possible here, or interrupted: whatever is wrong will show when the bytes are written.
            Err(e) => tracing::debug!(%e, bytes, "no room set aside"),
        }
    }
    let _ = (file, bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::aligned::AlignedBuf;

    /// A descriptor that answers writes from a list of bytes to take or errors, then takes all; and notes what it took.
    #[derive(Default)]
    struct Scripted {
        answers: Mutex<Vec<io::Result<usize>>>,
        took: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl Scripted {
        fn answering(answers: Vec<io::Result<usize>>) -> Self {
            Scripted { answers: Mutex::new(answers), ..Scripted::default() }
        }

        fn took(&self) -> Taken {
            self.took.lock().unwrap().iter().map(|(at, bytes)| (*at, bytes.len())).collect()
        }
    }

    impl FileExt for Scripted {
        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
            Err(io::ErrorKind::Unsupported.into())
        }

        fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
            let mut answers = self.answers.lock().unwrap();
            let n = if answers.is_empty() { Ok(bytes.len()) } else { answers.remove(0) }?.min(bytes.len());
            self.took.lock().unwrap().push((offset, bytes[..n].to_vec()));
            Ok(n)
        }
    }

    fn file(direct: Vec<io::Result<usize>>, plain: Vec<io::Result<usize>>) -> DirectFile<Scripted> {
        DirectFile::new(Scripted::answering(plain), Some(Scripted::answering(direct)))
    }

    fn memory(bytes: usize) -> AlignedBuf {
        let mut memory = AlignedBuf::default();
        memory.set_len(bytes).unwrap();
        memory.bytes_mut().iter_mut().enumerate().for_each(|(i, b)| *b = (i % 251) as u8);
        memory
    }

    /// Offsets and lengths of what went past the page cache, and of what went through it.
    fn took(file: &DirectFile<Scripted>) -> (Taken, Taken) {
        (file.direct.as_ref().unwrap().took(), file.file.took())
    }

    type Taken = Vec<(u64, usize)>;

    const A: u64 = ALIGN as u64;

    #[test]
    fn what_is_aligned_goes_past_the_page_cache_and_the_end_through_it() {
        let bytes = memory(3 * ALIGN + 5);
        let whole = file(vec![], vec![]);
        whole.write_all(A, bytes.bytes()).unwrap();
        assert_eq!(took(&whole), (vec![(A, 3 * ALIGN)], vec![(4 * A, 5)]));

        for (offset, part) in [(A + 1, 0..2 * ALIGN), (A, 1..2 * ALIGN + 1), (0, 0..ALIGN - 1)] {
            let through = file(vec![], vec![]);
            through.write_all(offset, &bytes.bytes()[part.clone()]).unwrap();
            assert_eq!(took(&through), (vec![], vec![(offset, part.len())]));
        }
    }

    #[test]
    fn a_direct_write_cut_short_goes_on_and_where_it_is_not_aligned_through_the_page_cache() {
        let bytes = memory(4 * ALIGN);
        let aligned = file(vec![Ok(ALIGN), Err(io::ErrorKind::Interrupted.into())], vec![]);
        aligned.write_all(0, bytes.bytes()).unwrap();
        assert_eq!(took(&aligned), (vec![(0, ALIGN), (A, 3 * ALIGN)], vec![]));

        let uneven = file(vec![Ok(ALIGN + 7)], vec![Err(io::ErrorKind::Interrupted.into()), Ok(100)]);
        uneven.write_all(0, bytes.bytes()).unwrap();
        let rest = 3 * ALIGN - 7;
        assert_eq!(took(&uneven), (vec![(0, ALIGN + 7)], vec![(A + 7, 100), (A + 107, rest - 100)]));
    }

    #[test]
    fn a_file_system_that_refuses_direct_writes_is_asked_once() {
        let bytes = memory(2 * ALIGN);
        for refusal in [io::ErrorKind::InvalidInput, io::ErrorKind::Unsupported] {
            let refused = file(vec![Err(refusal.into())], vec![]);
            refused.write_all(0, bytes.bytes()).unwrap();
            refused.write_all(2 * A, bytes.bytes()).unwrap();
            assert_eq!(took(&refused), (vec![], vec![(0, 2 * ALIGN), (2 * A, 2 * ALIGN)]));
        }
    }

    #[test]
    fn another_error_is_returned_and_not_hidden_by_a_second_try() {
        let bytes = memory(2 * ALIGN);
        let full = file(vec![Ok(ALIGN), Err(io::ErrorKind::StorageFull.into())], vec![]);
        assert_eq!(full.write_all(0, bytes.bytes()).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(took(&full), (vec![(0, ALIGN)], vec![]));
        let stuck = file(vec![Ok(0)], vec![]);
        assert_eq!(stuck.write_all(0, bytes.bytes()).unwrap_err().kind(), io::ErrorKind::WriteZero);
    }

    proptest! {
        #[test]
        fn whatever_is_cut_short_every_byte_arrives_once_and_in_its_place(
            len in 0usize..5 * ALIGN,
            cuts in prop::collection::vec(1usize..2 * ALIGN, 0..6),
            at in 0u64..3,
        ) {
            let bytes = memory(len);
            let file = file(cuts.into_iter().map(Ok).collect(), vec![]);
            file.write_all(at * A, bytes.bytes()).unwrap();
            let mut next = at * A;
            let mut content = Vec::new();
            let taken = [file.direct.as_ref().unwrap(), &file.file];
            for (offset, part) in taken.iter().flat_map(|f| f.took.lock().unwrap().clone()) {
                prop_assert_eq!(offset, next);
                next += part.len() as u64;
                content.extend(part);
            }
            prop_assert_eq!(&content[..], bytes.bytes());
        }
    }
}
