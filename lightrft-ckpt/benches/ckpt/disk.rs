//! What the disk does by itself: bytes written and read with nothing beside, the bound of everybody's durable saves

use std::error::Error;
use std::path::Path;
use std::thread;
use std::time::Instant;

use lightrft_ckpt::{FileSystem as _, OsFileSystem};

const THREADS: u64 = 4;
const WRITE_BYTES: u64 = 4 << 20;
const READ_BYTES: u64 = 1 << 20;
/// What writing past the page cache asks of addresses.
const ALIGN: usize = 4096;
const NAME: &str = "bytes";

/// Seconds to write so many bytes past the page cache into room set aside, and to sync them. All come from one block, which
/// no disk can compress.
pub(crate) fn write(dir: &Path, bytes: u64) -> Result<f64, Box<dyn Error>> {
    let mut random = 1u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as u8
    };
    let block: Vec<u8> = (0..WRITE_BYTES as usize + ALIGN).map(|_| next()).collect();
    let aligned = &block[block.as_ptr().align_offset(ALIGN)..];
    let begin = Instant::now();
    let file = OsFileSystem::new().create(&dir.join(NAME), bytes)?;
    in_parts(bytes, |from, to| {
        let mut at = from;
        while at < to {
            let now = WRITE_BYTES.min(to - at);
            file.write_all_at(at, &aligned[..now as usize])?;
            at += now;
        }
        Ok(())
    })?;
    file.sync_data()?;
    Ok(begin.elapsed().as_secs_f64())
}

/// Seconds to read them again, into memory that is used over and over.
pub(crate) fn read(dir: &Path, bytes: u64) -> Result<f64, Box<dyn Error>> {
    let begin = Instant::now();
    in_parts(bytes, |from, to| {
        let file = OsFileSystem::new().open(&dir.join(NAME))?;
        let mut into = vec![0; READ_BYTES as usize];
        let mut at = from;
        while at < to {
            let now = READ_BYTES.min(to - at);
            file.read_exact_at(at, &mut into[..now as usize])?;
            at += now;
        }
        Ok(())
    })?;
    Ok(begin.elapsed().as_secs_f64())
}

/// Every thread does one part of the bytes, which begins where a block of a disk does.
fn in_parts(bytes: u64, part: impl Fn(u64, u64) -> std::io::Result<()> + Sync) -> std::io::Result<()> {
    let at = |i: u64| (bytes * i / THREADS).next_multiple_of(ALIGN as u64).min(bytes);
    thread::scope(|scope| {
        let part = &part;
        let parts: Vec<_> = (0..THREADS).map(|i| scope.spawn(move || part(at(i), at(i + 1)))).collect();
        parts
            .into_iter()
            .try_for_each(|part| part.join().unwrap_or_else(|_| Err(std::io::Error::other("a panic"))))
    })
}
