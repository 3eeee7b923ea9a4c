//! What a checkpoint holds: step, world, tensors, where their bytes lie, checksums. Parsed with suspicion.
//!
//! `docs/CHECKPOINT_FORMAT.md` describes the bytes; change one, look at the other.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::element::{element_bytes, element_count};
use crate::error::{Error, Result};
use crate::fs::{FileSystem, ReadFile};
use crate::region::{Region, Span, Uneven, partition};
use crate::safetensors::MAX_HEADER_BYTES;

/// The manifest's name in a checkpoint's directory.
pub(crate) const MANIFEST: &str = "manifest.json";

/// The version written. Older ones stay readable; a newer one is refused by number.
pub(crate) const FORMAT_VERSION: u32 = 1;

/// Bytes of a region behind one checksum. A rank that needs part of a region reads up to one block too much at either
/// end: of a third of a 16 MiB tensor that is at most 0.6 %, and 2.4 % when its elements lie in four regions. The
/// checksums are 0.05 % of the data. Readers take any size.
pub(crate) const BLOCK_BYTES: usize = 16 * 1024;

/// A reader has a buffer for one block: no manifest may ask for more than this.
const MAX_BLOCK_BYTES: usize = 1 << 30;

/// What a shard calls the table of its blocks' checksums, which lies after its tensors.
pub(crate) const SUMS: &str = "lightrft-ckpt.xxh3";

/// Bytes of one checksum in that table: XXH3-64, little-endian.
pub(crate) const SUM_BYTES: usize = 8;

/// The first line of a manifest, its summary, is no longer than this: one read of a listing takes it in.
const MAX_HEAD_BYTES: usize = 4096;

/// A manifest longer than this is taken for damage before it is read.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// The same for a shard's header: its length, and what the safetensors format allows.
const MAX_SHARD_HEADER_BYTES: u64 = 8 + MAX_HEADER_BYTES;

/// And for a shard's table of checksums, which is in memory while the shard is read: 1 GiB of them, those of 2 TiB.
const MAX_SUMS: u64 = (1 << 30) / SUM_BYTES as u64;

const HEAD: &str = "{\"format\":\"lightrft-checkpoint\",\"version\":";
const SUM: &str = ",\"xxh3\":\"";
const SUMMARY: &str = "\",\"summary\":";
const LINE_END: &str = ",\n";
const BODY: &str = "\"manifest\":";
const TAIL: &str = "}\n";

/// What a listing and the order of checkpoints need, on the manifest's first line with a checksum of its own: a
/// thousand of them are read in the time that one large manifest takes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    pub(crate) tag: String,
    pub(crate) step: u64,
    pub(crate) world_size: usize,
    /// When it was committed, in milliseconds since 1970. Orders checkpoints of one step, and nothing else.
    pub(crate) saved_unix_ms: u64,
    /// Total of the files' lengths, without the manifest.
    pub(crate) data_bytes: u64,
    /// Length and checksum of the rest of the manifest. Filled in when it is written.
    pub(crate) manifest_bytes: u64,
    pub(crate) manifest_xxh3: String,
    /// Checksum of this summary as it was read: of two checkpoints whose tensors are equal but whose steps are not, it
    /// differs.
    #[serde(skip)]
    pub(crate) xxh3: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    #[serde(skip)]
    pub(crate) summary: Summary,
    pub(crate) block_bytes: usize,
    pub(crate) files: Vec<FileRecord>,
    pub(crate) tensors: Vec<TensorRecord>,
    /// State common to all ranks (LightRFT's `client_state`).
    pub(crate) shared: Value,
    /// State of each rank, in rank order.
    pub(crate) ranks: Vec<Value>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct FileRecord {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// Length of what precedes the tensors' bytes.
    pub(crate) header_bytes: u64,
    /// Checksum of it.
    pub(crate) header_xxh3: String,
    /// Checksum of the table of checksums at the file's end.
    pub(crate) sums_xxh3: String,
    /// Checksums in that table. Follows from the regions.
    #[serde(skip)]
    pub(crate) sums: usize,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct TensorRecord {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) regions: Vec<RegionRecord>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RegionRecord {
    #[serde(flatten)]
    pub(crate) place: Place,
    /// Index into the manifest's files.
    pub(crate) file: usize,
    /// First byte in that file.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// The place of its first block's checksum in the file's table. Follows from the order of the file's regions.
    #[serde(skip)]
    pub(crate) first_sum: usize,
}

/// A [`Region`] as it is written down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Place {
    #[serde(rename = "flat")]
    Flat([usize; 2]),
    #[serde(rename = "box")]
    Box { start: Vec<usize>, extent: Vec<usize> },
}

impl From<&Span> for Place {
    fn from(span: &Span) -> Place {
        match span {
            Span::Flat(r) => Place::Flat([r.start, r.end]),
            Span::Block { start, extent } => Place::Box { start: start.clone(), extent: extent.clone() },
        }
    }
}

impl Place {
    /// The elements that it names of a tensor of that shape; the error says which numbers do not fit.
    pub(crate) fn span(&self, shape: &[usize]) -> Result<Span, String> {
        match self {
            Place::Flat([start, end]) => Region::Flat(*start..*end),
            Place::Box { start, extent } => Region::Box { start: start.clone(), extent: extent.clone() },
        }
        .resolve(shape)
    }
}

impl RegionRecord {
    pub(crate) fn span(&self, shape: &[usize]) -> Result<Span, String> {
        self.place.span(shape)
    }
}

/// The name of a rank's file.
pub(crate) fn rank_file(rank: usize) -> String {
    format!("rank-{rank:05}.safetensors")
}

/// Whether a directory entry has the name of a part of a checkpoint.
pub(crate) fn is_part_name(name: &str) -> bool {
    let rank = name.strip_prefix("rank-").and_then(|n| n.strip_suffix(".safetensors"));
    name == MANIFEST || rank.is_some_and(|n| n.len() >= 5 && n.bytes().all(|b| b.is_ascii_digit()))
}

/// The checksum of a header or of a table, as the manifest writes it.
pub(crate) fn hex_sum(bytes: &[u8]) -> String {
    format!("{:016x}", xxh3_64(bytes))
}

impl Manifest {
    /// The bytes of the manifest's file: one JSON object on two lines, the summary and the rest.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let body = serde_json::to_string(self)?;
        let mut summary = self.summary.clone();
        summary.manifest_bytes = body.len() as u64;
        summary.manifest_xxh3 = format!("{:032x}", xxh3_128(body.as_bytes()));
        let summary = serde_json::to_string(&summary)?;
        let sum = xxh3_128(summary.as_bytes());
        let text =
            format!("{HEAD}{FORMAT_VERSION}{SUM}{sum:032x}{SUMMARY}{summary}{LINE_END}{BODY}{body}{TAIL}");
        Ok(text.into_bytes())
    }

    /// Parses and checks everything that can be checked without the files: after this, every length, offset and
    /// name in it can be believed to be consistent.
    ///
    /// `path` is only for messages.
    pub(crate) fn from_bytes(bytes: &[u8], path: &Path) -> Result<Manifest> {
        let damaged = |reason: String| Error::damaged(path, reason);
        let (summary, line) = framed_summary(bytes, bytes.len() as u64).map_err(damaged)?;
        let body = framed_body(&bytes[line..], &summary).map_err(damaged)?;
        let mut manifest: Manifest =
            serde_json::from_str(body).map_err(|e| Error::damaged(path, format!("not a manifest: {e}")))?;
        manifest.summary = summary;
        manifest.check().map_err(|reason| Error::damaged(path, reason))?;
        Ok(manifest)
    }

    fn check(&mut self) -> Result<(), String> {
        let Summary { world_size, data_bytes, .. } = self.summary;
        check_tag(&self.summary.tag)?;
        if world_size == 0 || self.ranks.len() != world_size {
            return Err(format!("{} rank states for {world_size} ranks", self.ranks.len()));
        }
        if !(1..=MAX_BLOCK_BYTES).contains(&self.block_bytes) {
            return Err(format!(
                "block_bytes = {}; from 1 to {MAX_BLOCK_BYTES} are possible",
                self.block_bytes
            ));
        }
        let mut total = 0u64;
        let mut names = HashSet::with_capacity(self.files.len());
        for file in &self.files {
            if file.name == MANIFEST || !is_part_name(&file.name) {
                return Err(format!("`{}` is not the name of a rank's file", file.name));
            }
            if !names.insert(file.name.as_str()) {
                return Err(format!("file `{}` is listed twice", file.name));
            }
            if file.header_bytes > file.bytes {
                return Err(format!("`{}` is shorter than its header", file.name));
            }
            if file.header_bytes > MAX_SHARD_HEADER_BYTES {
                let (name, bytes) = (&file.name, file.header_bytes);
                return Err(format!(
                    "`{name}`: a header of {bytes} bytes; {MAX_SHARD_HEADER_BYTES} are believed"
                ));
            }
            total = total.checked_add(file.bytes).ok_or("the files' lengths overflow")?;
        }
        if total != data_bytes {
            return Err(format!("the files' lengths add up to {total}, not to data_bytes = {data_bytes}"));
        }
        let mut names: Vec<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        names.sort_unstable();
        if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("tensor `{}` is listed twice", twice[0]));
        }
        for tensor in &self.tensors {
            self.check_tensor(tensor).map_err(|reason| format!("tensor `{}`: {reason}", tensor.name))?;
        }
        self.check_tiling()
    }

    fn check_tensor(&self, tensor: &TensorRecord) -> Result<(), String> {
        let size = element_bytes(tensor.dtype).ok_or_else(|| format!("dtype {:?}", tensor.dtype))?;
        element_count(&tensor.shape)
            .and_then(|n| n.checked_mul(size))
            .ok_or_else(|| format!("shape {:?} has too many bytes", tensor.shape))?;
        let mut spans = Vec::with_capacity(tensor.regions.len());
        for region in &tensor.regions {
            let span = region.span(&tensor.shape)?;
            let bytes = (span.len() * size) as u64;
            if region.bytes != bytes {
                return Err(format!("a region of {bytes} bytes is said to have {}", region.bytes));
            }
            spans.push(span);
        }
        partition(&tensor.shape, &spans.iter().collect::<Vec<_>>()).map_err(|uneven| match uneven {
            Uneven::Overlap(i, j) => format!("regions {i} and {j} overlap"),
            Uneven::Missing(n) => format!("{n} elements are in no region"),
            Uneven::TooManyBoxes(n) => format!("{n} boxes are too many"),
        })
    }

    /// Every byte of every file must belong to its header, to one region or to the checksums: what no checksum covers
    /// could rot unseen. Notes where each region's checksums lie.
    fn check_tiling(&mut self) -> Result<(), String> {
        let block_bytes = self.block_bytes as u64;
        // (end of what was laid out, checksums so far), per file.
        let mut ends: Vec<(u64, u64)> = self.files.iter().map(|f| (f.header_bytes, 0)).collect();
        let mut first_sums = Vec::new();
        for (tensor, place) in self.by_offset()? {
            let region = &self.tensors[tensor].regions[place];
            let (end, sums) = &mut ends[region.file];
            if region.offset != *end {
                let name = &self.files[region.file].name;
                return Err(format!("`{name}`: a region begins at {}, not at {end}", region.offset));
            }
            first_sums.push((tensor, place, *sums as usize));
            *end = end.checked_add(region.bytes).ok_or("an offset overflows")?;
            *sums += region.bytes.div_ceil(block_bytes);
        }
        for (file, (end, sums)) in self.files.iter_mut().zip(ends) {
            let expected = sums.checked_mul(SUM_BYTES as u64).and_then(|table| end.checked_add(table));
            if expected != Some(file.bytes) {
                return Err(format!(
                    "`{}`: regions end at {end}, {sums} checksums do not fill the rest of {} bytes",
                    file.name, file.bytes
                ));
            }
            if sums > MAX_SUMS {
                return Err(format!("`{}`: {sums} checksums; at most {MAX_SUMS} are believed", file.name));
            }
            file.sums = sums as usize;
        }
        for (tensor, place, first) in first_sums {
            self.tensors[tensor].regions[place].first_sum = first;
        }
        Ok(())
    }

    /// The regions that hold bytes, as (tensor, region of it), by file and offset.
    fn by_offset(&self) -> Result<Vec<(usize, usize)>, String> {
        let mut all = Vec::new();
        for (t, tensor) in self.tensors.iter().enumerate() {
            for (r, region) in tensor.regions.iter().enumerate().filter(|(_, r)| r.bytes > 0) {
                if region.file >= self.files.len() {
                    return Err(format!("a region lies in file {} of {}", region.file, self.files.len()));
                }
                all.push((t, r));
            }
        }
        all.sort_by_key(|&(t, r)| (self.tensors[t].regions[r].file, self.tensors[t].regions[r].offset));
        Ok(all)
    }
}

/// Reads and checks the manifest in `dir`. `Ok(None)` when there is none.
pub(crate) fn read_manifest(fs: &dyn FileSystem, dir: &Path) -> Result<Option<Manifest>> {
    let path = dir.join(MANIFEST);
    let Some((file, bytes)) = open(fs, &path)? else { return Ok(None) };
    let mut content = vec![0; bytes as usize];
    file.read_exact_at(0, &mut content).map_err(Error::io("read", &path))?;
    Ok(Some(Manifest::from_bytes(&content, &path)?))
}

/// Reads and checks only the summary of the manifest in `dir`, and that the manifest is as long as it says. Returns
/// that length too. `Ok(None)` when there is no manifest.
pub(crate) fn read_summary(fs: &dyn FileSystem, dir: &Path) -> Result<Option<(Summary, u64)>> {
    let path = dir.join(MANIFEST);
    let Some((file, bytes)) = open(fs, &path)? else { return Ok(None) };
    let mut content = vec![0; bytes.min(MAX_HEAD_BYTES as u64) as usize];
    file.read_exact_at(0, &mut content).map_err(Error::io("read", &path))?;
    let damaged = |reason| Error::damaged(&path, reason);
    let (summary, _) = framed_summary(&content, bytes).map_err(damaged)?;
    check_tag(&summary.tag).map_err(damaged)?;
    Ok(Some((summary, bytes)))
}

/// Whether the manifest in `dir` begins as those of this crate do, of whatever version and however damaged after that.
pub(crate) fn begins_as_manifest(fs: &dyn FileSystem, dir: &Path) -> bool {
    let mut begin = [0; HEAD.len()];
    fs.open(&dir.join(MANIFEST)).and_then(|file| file.read_exact_at(0, &mut begin)).is_ok()
        && begin == *HEAD.as_bytes()
}

fn open(fs: &dyn FileSystem, path: &Path) -> Result<Option<(Box<dyn ReadFile>, u64)>> {
    let file = match fs.open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(Error::io("open", path))?,
    };
    let bytes = file.bytes().map_err(Error::io("measure", path))?;
    if bytes > MAX_MANIFEST_BYTES {
        let reason = format!("{bytes} bytes; at most {MAX_MANIFEST_BYTES} are believed");
        return Err(Error::damaged(path, reason));
    }
    Ok(Some((file, bytes)))
}

/// Takes the frame off the first line and verifies the summary's checksum, and that the file has the length that
/// follows from it. Returns where the second line begins.
///
/// The frame is compared byte by byte, so that no flipped bit in it passes for harmless formatting.
fn framed_summary(content: &[u8], file_bytes: u64) -> Result<(Summary, usize), String> {
    let content = &content[..content.len().min(MAX_HEAD_BYTES)];
    let line = content.iter().position(|&b| b == b'\n').ok_or("its first line does not end")? + 1;
    let rest = text(&content[..line])?.strip_prefix(HEAD).ok_or("it does not begin as a manifest does")?;
    let (version, rest) = rest.split_once(SUM).ok_or("no checksum after the version")?;
    if version != FORMAT_VERSION.to_string() {
        return Err(format!("format version `{version}`; this program reads version {FORMAT_VERSION}"));
    }
    let (sum, rest) = rest.split_once(SUMMARY).ok_or("no summary after the checksum")?;
    let inner = rest.strip_suffix(LINE_END).ok_or("its first line does not end as a manifest's does")?;
    same_sum("the summary", sum, inner)?;
    let mut summary: Summary = serde_json::from_str(inner).map_err(|e| format!("not a summary: {e}"))?;
    sum.clone_into(&mut summary.xxh3);
    let expected = summary.manifest_bytes.checked_add((line + BODY.len() + TAIL.len()) as u64);
    if expected != Some(file_bytes) {
        return Err(format!("{file_bytes} bytes, but its summary says {expected:?}: cut off?"));
    }
    Ok((summary, line))
}

/// Takes the frame off the second line and verifies its checksum.
fn framed_body<'a>(line: &'a [u8], summary: &Summary) -> Result<&'a str, String> {
    let rest = text(line)?.strip_prefix(BODY).ok_or("its second line does not begin as a manifest's does")?;
    let body = rest.strip_suffix(TAIL).ok_or("it does not end as a manifest does")?;
    same_sum("the manifest", &summary.manifest_xxh3, body)?;
    Ok(body)
}

fn text(bytes: &[u8]) -> Result<&str, String> {
    std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8 at byte {}", e.valid_up_to()))
}

fn same_sum(what: &str, recorded: &str, text: &str) -> Result<(), String> {
    let actual = format!("{:032x}", xxh3_128(text.as_bytes()));
    if recorded == actual {
        return Ok(());
    }
    Err(format!("{what} has checksum {actual}, recorded is {recorded}"))
}

/// Whether a tag can be the name of a directory and is none of the names that this crate gives to other things.
pub(crate) fn check_tag(tag: &str) -> Result<(), String> {
    let wrong = tag.is_empty()
        || tag.len() > 180
        || tag.starts_with('.')
        || tag == LATEST
        || tag.contains(['/', '\\'])
        || tag.contains(char::is_control)
        || tag != tag.trim()
        || tag.contains(TMP_INFIX)
        || tag.contains(REPLACED_INFIX);
    if wrong {
        return Err(format!(
            "tag {tag:?} cannot name a directory here: 1 to 180 bytes, no slash or control character, no white space at its \
             ends, not `{LATEST}`, not beginning with `.`, without `{TMP_INFIX}` and `{REPLACED_INFIX}`"
        ));
    }
    Ok(())
}

/// The file that names the checkpoint saved last.
pub(crate) const LATEST: &str = "latest";
/// Between a tag and a random suffix: a checkpoint that is being written.
pub(crate) const TMP_INFIX: &str = ".tmp-";
/// Between a tag and a random suffix: a whole checkpoint whose tag is being saved again.
pub(crate) const REPLACED_INFIX: &str = ".replaced-";
/// Before a random suffix and a tag: a checkpoint that is being deleted.
pub(crate) const TRASH_PREFIX: &str = ".trash-";
/// The lock that the one saver of a directory holds.
pub(crate) const LOCK: &str = ".lightrft-ckpt.lock";
