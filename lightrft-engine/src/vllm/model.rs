//! What a model folder tells of a server's model: its vocabulary, its pad tokens, its parameters.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::{Error, MediaKind, Result};

/// The longest header of a safetensors file, as the format's own library has it.
const LONGEST_HEADER: u64 = 100_000_000;

/// What is known of a server's model.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Model {
    pub(super) vocabulary: Option<usize>,
    pub(super) image_pad: Option<u32>,
    pub(super) video_pad: Option<u32>,
    /// Type and shape of each parameter, by name; empty if they are not known.
    pub(super) parameters: BTreeMap<String, (Dtype, Vec<usize>)>,
}

#[derive(Deserialize)]
struct Config {
    vocab_size: Option<usize>,
    text_config: Option<TextConfig>,
    image_token_id: Option<u32>,
    video_token_id: Option<u32>,
}

#[derive(Deserialize)]
struct TextConfig {
    vocab_size: Option<usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Model {
    /// Reads `config.json`, and the headers of the safetensors files if there are any.
    pub(super) fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let config: Config = parse(&path, &fs::read(&path).map_err(|source| io_error(&path, source))?)?;
        let text = config.text_config.and_then(|text| text.vocab_size);
        let mut model = Self {
            vocabulary: text.or(config.vocab_size),
            image_pad: config.image_token_id,
            video_pad: config.video_token_id,
            parameters: BTreeMap::new(),
        };
        for file in weight_files(folder)? {
            let metadata: Metadata = parse(&file, &header(&file)?)?;
            for (name, info) in metadata.tensors() {
                model.parameters.insert(name, (info.dtype, info.shape.clone()));
            }
        }
        Ok(model)
    }

    /// The token that stands for a picture or a film in a prompt.
    pub(super) fn pad(&self, kind: MediaKind) -> Option<u32> {
        match kind {
            MediaKind::Image => self.image_pad,
            MediaKind::Video => self.video_pad,
        }
    }
}

/// The files that hold the weights: those that the index names, or the only one, or none.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join("model.safetensors.index.json");
    if index.exists() {
        let bytes = fs::read(&index).map_err(|source| io_error(&index, source))?;
        let mut names: Vec<String> = parse::<Index>(&index, &bytes)?.weight_map.into_values().collect();
        names.sort();
        names.dedup();
        return Ok(names.into_iter().map(|name| folder.join(name)).collect());
    }
    let single = folder.join("model.safetensors");
    Ok(if single.exists() { vec![single] } else { Vec::new() })
}

/// The JSON at the beginning of a safetensors file.
fn header(path: &Path) -> Result<Vec<u8>> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let bytes = u64::from_le_bytes(length);
        if bytes > LONGEST_HEADER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a header of {bytes} bytes")));
        }
        let mut header = Vec::new();
        file.take(bytes).read_to_end(&mut header)?;
        if header.len() as u64 != bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(header)
    };
    read().map_err(|source| io_error(path, source))
}

fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| malformed(path, &error))
}

fn malformed(path: &Path, error: &dyn std::fmt::Display) -> Error {
    io_error(path, io::Error::new(io::ErrorKind::InvalidData, error.to_string()))
}

fn io_error(path: &Path, source: io::Error) -> Error {
    let source = io::Error::new(source.kind(), format!("{}: {source}", path.display()));
    Error::Backend { engine: "vLLM", operation: "read the model's folder", source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, name: &str, text: &str) {
        fs::write(folder.join(name), text).unwrap();
    }

    #[test]
    fn a_folder_tells_the_vocabulary_the_pads_and_the_parameters() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        write(
            path,
            "config.json",
            r#"{"text_config":{"vocab_size":320},"image_token_id":5,"video_token_id":6}"#,
        );
        let bytes = [0_u8; 24];
        let view =
            |shape: Vec<usize>| safetensors::tensor::TensorView::new(Dtype::F32, shape, &bytes).unwrap();
        safetensors::serialize_to_file([("a", view(vec![2, 3]))], None, &path.join("1.safetensors")).unwrap();
        safetensors::serialize_to_file([("b", view(vec![6]))], None, &path.join("2.safetensors")).unwrap();
        write(
            path,
            "model.safetensors.index.json",
            r#"{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#,
        );
        let model = Model::from_folder(path).unwrap();
        assert_eq!(model.vocabulary, Some(320));
        assert_eq!((model.pad(MediaKind::Image), model.pad(MediaKind::Video)), (Some(5), Some(6)));
        let expected = [("a", (Dtype::F32, vec![2, 3])), ("b", (Dtype::F32, vec![6]))];
        assert!(model.parameters.iter().map(|(n, p)| (n.as_str(), p.clone())).eq(expected));
    }

    #[test]
    fn what_is_broken_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Model::from_folder(folder.path()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
        write(folder.path(), "config.json", r#"{"vocab_size":7}"#);
        assert_eq!(Model::from_folder(folder.path()).unwrap().vocabulary, Some(7));
        for bytes in [
            &b"abc"[..],
            b"\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x08\0\0\0\0\0\0\0{}",
            b"\x02\0\0\0\0\0\0\0[]",
        ] {
            fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
            let error = Model::from_folder(folder.path()).unwrap_err();
            assert!(error.to_string().contains("model.safetensors"), "{error}");
        }
    }
}
