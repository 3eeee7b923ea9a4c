//! What a checkpoint holds: step, world, tensors, where their bytes lie, checksums. Parsed with suspicion.
//!
//! `docs/CHECKPOINT_FORMAT.md` describes the bytes; change one, look at the other.

use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use crate::element::{element_bytes, element_count};
use crate::error::{Error, Result};
use crate::region::{Region, Span, Uneven, partition};

/// The manifest's name in a checkpoint's directory.
pub(crate) const MANIFEST: &str = "manifest.json";

/// The version written. Older ones stay readable; a newer one is refused by number.
pub(crate) const FORMAT_VERSION: u32 = 1;

/// Bytes of a region behind one checksum: small, so that a rank which needs part of a region reads little more.
pub(crate) const BLOCK_BYTES: usize = 256 * 1024;

/// A manifest longer than this is taken for damage before it is read.
const MAX_MANIFEST_BYTES: u64 = 1 << 30;

const HEAD: &str = "{\"format\":\"lightrft-checkpoint\",\"version\":";
const SUM: &str = ",\"xxh3\":\"";
const BODY: &str = "\",\"manifest\":";
const TAIL: &str = "}\n";

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) tag: String,
    pub(crate) step: u64,
    pub(crate) world_size: usize,
    /// When it was committed, in milliseconds since 1970. Orders checkpoints of one step, and nothing else.
    pub(crate) saved_unix_ms: u64,
    /// Total of the files' lengths, without this manifest.
    pub(crate) data_bytes: u64,
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
    /// Checksums of the region's blocks, 16 hexadecimal digits each, one after the other.
    pub(crate) xxh3: String,
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

impl RegionRecord {
    pub(crate) fn span(&self, shape: &[usize]) -> Result<Span, String> {
        match &self.place {
            Place::Flat([start, end]) => Region::Flat(*start..*end),
            Place::Box { start, extent } => Region::Box { start: start.clone(), extent: extent.clone() },
        }
        .resolve(shape)
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

/// The checksum of one block, as the manifest writes it.
pub(crate) fn block_sum(block: &[u8]) -> String {
    format!("{:016x}", xxh3_64(block))
}

impl Manifest {
    /// The bytes of the manifest's file: one JSON object, whose checksum is over the inner object's bytes.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        let body = serde_json::to_string(self)?;
        let sum = xxh3_128(body.as_bytes());
        Ok(format!("{HEAD}{FORMAT_VERSION}{SUM}{sum:032x}{BODY}{body}{TAIL}").into_bytes())
    }

    /// Parses and checks everything that can be checked without the files: after this, every length, offset and
    /// name in it can be believed to be consistent.
    ///
    /// `path` is only for messages.
    pub(crate) fn from_bytes(bytes: &[u8], path: &Path) -> Result<Manifest> {
        let damaged = |reason: String| Error::damaged(path, reason);
        let body = framed_body(bytes).map_err(damaged)?;
        let manifest: Manifest =
            serde_json::from_str(body).map_err(|e| Error::damaged(path, format!("not a manifest: {e}")))?;
        manifest.check().map_err(|reason| Error::damaged(path, reason))?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        check_tag(&self.tag)?;
        if self.world_size == 0 || self.ranks.len() != self.world_size {
            return Err(format!("{} rank states for {} ranks", self.ranks.len(), self.world_size));
        }
        if self.block_bytes == 0 {
            return Err("block_bytes = 0".into());
        }
        let mut total = 0u64;
        for (i, file) in self.files.iter().enumerate() {
            if file.name == MANIFEST || !is_part_name(&file.name) {
                return Err(format!("`{}` is not the name of a rank's file", file.name));
            }
            if self.files[..i].iter().any(|f| f.name == file.name) {
                return Err(format!("file `{}` is listed twice", file.name));
            }
            if file.header_bytes > file.bytes {
                return Err(format!("`{}` is shorter than its header", file.name));
            }
            total = total.checked_add(file.bytes).ok_or("the files' lengths overflow")?;
        }
        if total != self.data_bytes {
            return Err(format!(
                "the files' lengths add up to {total}, not to data_bytes = {}",
                self.data_bytes
            ));
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
            let sums = region.bytes.div_ceil(self.block_bytes as u64);
            if Some(region.xxh3.len() as u64) != sums.checked_mul(16) || !region.xxh3.is_ascii() {
                return Err(format!(
                    "{sums} checksums of 16 digits expected, {} digits found",
                    region.xxh3.len()
                ));
            }
            spans.push(span);
        }
        partition(&tensor.shape, &spans.iter().collect::<Vec<_>>()).map_err(|uneven| match uneven {
            Uneven::Overlap(i, j) => format!("regions {i} and {j} overlap"),
            Uneven::Missing(n) => format!("{n} elements are in no region"),
            Uneven::TooManyBoxes(n) => format!("{n} boxes are too many"),
        })
    }

    /// Every byte of every file must belong to its header or to one region: what no checksum covers could rot unseen.
    fn check_tiling(&self) -> Result<(), String> {
        for (file, regions) in self.files.iter().zip(self.regions_by_file()?) {
            let mut next = file.header_bytes;
            for region in regions {
                if region.offset != next {
                    return Err(format!(
                        "`{}`: a region begins at {}, not at {next}",
                        file.name, region.offset
                    ));
                }
                next = next.checked_add(region.bytes).ok_or("an offset overflows")?;
            }
            if next != file.bytes {
                return Err(format!("`{}`: regions end at {next} of {} bytes", file.name, file.bytes));
            }
        }
        Ok(())
    }

    /// The regions that hold bytes, per file, in the order they lie there.
    pub(crate) fn regions_by_file(&self) -> Result<Vec<Vec<&RegionRecord>>, String> {
        let mut by_file: Vec<Vec<&RegionRecord>> = vec![Vec::new(); self.files.len()];
        for region in self.tensors.iter().flat_map(|t| &t.regions).filter(|r| r.bytes > 0) {
            let files = self.files.len();
            by_file
                .get_mut(region.file)
                .ok_or_else(|| format!("a region lies in file {} of {files}", region.file))?
                .push(region);
        }
        by_file.iter_mut().for_each(|regions| regions.sort_by_key(|r| r.offset));
        Ok(by_file)
    }
}

/// Reads and checks the manifest in `dir`. `Ok(None)` when there is none.
pub(crate) fn read_manifest(fs: &dyn crate::FileSystem, dir: &Path) -> Result<Option<(Manifest, u64)>> {
    let path = dir.join(MANIFEST);
    let file = match fs.open(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(Error::io("open", &path))?,
    };
    let bytes = file.bytes().map_err(Error::io("measure", &path))?;
    if bytes > MAX_MANIFEST_BYTES {
        return Err(Error::damaged(
            path,
            format!("{bytes} bytes; at most {MAX_MANIFEST_BYTES} are believed"),
        ));
    }
    let mut content = vec![0; bytes as usize];
    file.read_exact_at(0, &mut content).map_err(Error::io("read", &path))?;
    Ok(Some((Manifest::from_bytes(&content, &path)?, bytes)))
}

/// Takes the frame off and verifies the checksum. The frame is compared byte by byte, so that no flipped bit in it
/// passes for harmless formatting.
fn framed_body(bytes: &[u8]) -> Result<&str, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8 at byte {}", e.valid_up_to()))?;
    let rest = text.strip_prefix(HEAD).ok_or("it does not begin as a manifest does")?;
    let (version, rest) = rest.split_once(SUM).ok_or("no checksum after the version")?;
    if version != FORMAT_VERSION.to_string() {
        return Err(format!("format version `{version}`; this program reads version {FORMAT_VERSION}"));
    }
    let (sum, rest) = rest.split_once(BODY).ok_or("no body after the checksum")?;
    let body = rest.strip_suffix(TAIL).ok_or("it does not end as a manifest does: cut off?")?;
    let actual = format!("{:032x}", xxh3_128(body.as_bytes()));
    if sum != actual {
        return Err(format!("checksum {actual}, recorded {sum}"));
    }
    Ok(body)
}

/// Whether a tag can be the name of a directory and is none of the names that this crate gives to other things.
pub(crate) fn check_tag(tag: &str) -> Result<(), String> {
    let wrong = tag.is_empty()
        || tag.len() > 180
        || tag.starts_with('.')
        || tag == LATEST
        || tag.contains(['/', '\\'])
        || tag.contains(char::is_control)
        || tag.contains(TMP_INFIX)
        || tag.contains(REPLACED_INFIX);
    if wrong {
        return Err(format!(
            "tag {tag:?} cannot name a directory here: 1 to 180 bytes, no slash or control character, not `{LATEST}`, \
             not beginning with `.`, without `{TMP_INFIX}` and `{REPLACED_INFIX}`"
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

#[cfg(test)]
mod tests {
    use super::*;

    /// One file of 4096 bytes of header and a tensor of 6 floats, cut in two.
    fn manifest() -> Manifest {
        let region = |start: usize, end: usize| RegionRecord {
            place: Place::Flat([start, end]),
            file: 0,
            offset: 4096 + 4 * start as u64,
            bytes: 4 * (end - start) as u64,
            xxh3: block_sum(b""),
        };
        Manifest {
            tag: "global_step1".into(),
            step: 1,
            world_size: 1,
            saved_unix_ms: 0,
            data_bytes: 4096 + 24,
            block_bytes: BLOCK_BYTES,
            files: vec![FileRecord {
                name: rank_file(0),
                bytes: 4096 + 24,
                header_bytes: 4096,
                header_xxh3: block_sum(b""),
            }],
            tensors: vec![TensorRecord {
                name: "w".into(),
                dtype: Dtype::F32,
                shape: vec![2, 3],
                regions: vec![region(0, 2), region(2, 6)],
            }],
            shared: Value::Null,
            ranks: vec![Value::Null],
        }
    }

    fn parsed(manifest: &Manifest) -> Result<Manifest> {
        Manifest::from_bytes(&manifest.to_bytes().unwrap(), Path::new("manifest.json"))
    }

    #[test]
    fn what_is_written_is_read() {
        let read = parsed(&manifest()).unwrap();
        assert_eq!(read.to_bytes().unwrap(), manifest().to_bytes().unwrap());
    }

    /// The checksum is right in all of these: they are made up, not rotten.
    #[test]
    fn a_made_up_manifest_is_refused() {
        type Lie = (&'static str, fn(&mut Manifest));
        let lies: [Lie; 22] = [
            ("a file outside", |m| m.files[0].name = "../rank-00000.safetensors".into()),
            ("an absolute file", |m| m.files[0].name = "/etc/passwd".into()),
            ("the manifest as a file", |m| m.files[0].name = MANIFEST.into()),
            ("a file twice", |m| m.files.push(m.files[0].clone())),
            ("a tag outside", |m| m.tag = "../up".into()),
            ("no ranks", |m| m.world_size = 0),
            ("more ranks than states", |m| m.world_size = usize::MAX),
            ("a huge shape", |m| m.tensors[0].shape = vec![usize::MAX, 3]),
            ("a huge shape with a zero", |m| m.tensors[0].shape = vec![usize::MAX, 0]),
            ("a shape too large for its regions", |m| m.tensors[0].shape = vec![2, 4]),
            ("a region outside", |m| m.tensors[0].regions[1].place = Place::Flat([4, 8])),
            ("regions that overlap", |m| m.tensors[0].regions[1].place = Place::Flat([1, 5])),
            ("a region too few", |m| drop(m.tensors[0].regions.pop())),
            ("a length that is not its extent's", |m| m.tensors[0].regions[0].bytes = u64::MAX),
            ("a file that is not there", |m| m.tensors[0].regions[0].file = 7),
            ("an offset beyond", |m| m.tensors[0].regions[0].offset = u64::MAX),
            ("too few checksums", |m| m.tensors[0].regions[0].xxh3.clear()),
            ("checksums of no digits", |m| m.tensors[0].regions[0].xxh3 = "\u{e9}".repeat(8)),
            ("no block size", |m| m.block_bytes = 0),
            ("a header longer than its file", |m| m.files[0].header_bytes = u64::MAX),
            ("bytes that no checksum covers", |m| {
                m.files[0].bytes += 1;
                m.data_bytes += 1;
            }),
            ("a tensor twice", |m| m.tensors.push(m.tensors[0].clone())),
        ];
        for (lie, tell) in lies {
            let mut made_up = manifest();
            tell(&mut made_up);
            assert!(matches!(parsed(&made_up), Err(Error::Damaged { .. })), "{lie}");
        }
    }
}
