//! The bytes of an image or a sound, from a path or a data URL, never more than asked for.

use std::fs::File;
use std::io::Read;
use std::path::{Component, Path};

use base64::Engine;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};

use crate::decode::PathPolicy;
use crate::media::MediumProblem;

/// Reads a regular file of at most `limit` bytes that the policy allows.
pub(crate) fn read(path: &Path, policy: &PathPolicy, limit: usize) -> Result<Vec<u8>, MediumProblem> {
    if path.as_os_str().is_empty() {
        return Err(MediumProblem::Empty);
    }
    let at = match policy {
        PathPolicy::Anywhere => path.to_owned(),
        PathPolicy::Under(root) => {
            let outside = || MediumProblem::OutsideRoot { path: path.to_owned(), root: root.clone() };
            if path.components().any(|part| part == Component::ParentDir) {
                return Err(outside());
            }
            // An absolute path stands alone here; it is allowed where it leads into the folder.
            let joined = root.join(path);
            let resolved = joined.canonicalize().map_err(io("open", &joined))?;
            let root = root.canonicalize().map_err(io("open", root))?;
            if !resolved.starts_with(root) {
                return Err(outside());
            }
            resolved
        }
    };
    // Opening a pipe would wait for its writer, so the kind is asked for first.
    let kind = std::fs::metadata(&at).map_err(io("open", &at))?;
    if !kind.is_file() {
        return Err(MediumProblem::NotAFile { path: at });
    }
    if kind.len() > limit as u64 {
        return Err(MediumProblem::TooManyBytes { limit });
    }
    let file = File::open(&at).map_err(io("open", &at))?;
    let mut bytes = Vec::with_capacity(kind.len() as usize + 1);
    // It may have grown since; one byte too many is enough to know.
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(io("read", &at))?;
    Ok(bytes)
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> MediumProblem {
    let path = path.to_owned();
    move |source| MediumProblem::Io { action, path, source }
}

/// Padding is optional, as in what browsers take.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The payload of `data:image/...;base64,...`; `wanted` is the type's beginning, such as `image/`.
pub(crate) fn from_data_url(url: &str, wanted: &'static str, limit: usize) -> Result<Vec<u8>, MediumProblem> {
    let broken = |expected| MediumProblem::DataUrl { expected };
    let rest = url.split_once(':').map(|(_, rest)| rest).ok_or(broken("`data:`"))?;
    let (kind, payload) = rest.split_once(',').ok_or(broken("a comma before the data"))?;
    let mut attributes = kind.split(';').map(str::trim);
    let kind = attributes.next().unwrap_or_default().to_ascii_lowercase();
    if !kind.is_empty() && !kind.starts_with(wanted) {
        return Err(broken(if wanted == "audio/" { "a type `audio/...`" } else { "a type `image/...`" }));
    }
    if !attributes.any(|attribute| attribute.eq_ignore_ascii_case("base64")) {
        return Err(broken("`;base64`"));
    }
    if payload.len() / 4 * 3 > limit.saturating_add(2) {
        return Err(MediumProblem::TooManyBytes { limit });
    }
    BASE64.decode(payload.trim_ascii()).map_err(|_| broken("base64 after the comma"))
}
