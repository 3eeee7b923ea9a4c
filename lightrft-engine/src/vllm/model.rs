//! What a model folder tells of a server's model: its vocabulary, its pad tokens, its parameters.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::{Error, HfFolder, MediaKind, Result, WeightSource};

/// What is known of a server's model.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Model {
    pub(super) vocabulary: Option<usize>,
    pub(super) image_pad: Option<u32>,
    pub(super) video_pad: Option<u32>,
    /// Shape of each parameter, by name; empty if they are not known.
    pub(super) parameters: BTreeMap<String, Vec<usize>>,
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

impl Model {
    /// Reads `config.json`, and the headers of the safetensors files if there are any.
    pub(super) fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let config: Config = serde_json::from_slice(&bytes)
            .map_err(|error| Error::Malformed { path, what: format!("no model's configuration: {error}") })?;
        let has_weights =
            ["model.safetensors", "model.safetensors.index.json"].map(|name| folder.join(name).exists());
        let mut parameters = BTreeMap::new();
        if has_weights.contains(&true) {
            let infos = HfFolder::open(folder)?.tensors().to_vec();
            parameters.extend(infos.into_iter().map(|info| (info.name, info.shape)));
        }
        Ok(Self {
            vocabulary: config.text_config.and_then(|text| text.vocab_size).or(config.vocab_size),
            image_pad: config.image_token_id,
            video_pad: config.video_token_id,
            parameters,
        })
    }

    /// The token that stands for a picture or a film in a prompt.
    pub(super) fn pad(&self, kind: MediaKind) -> Option<u32> {
        match kind {
            MediaKind::Image => self.image_pad,
            MediaKind::Video => self.video_pad,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_tells_the_vocabulary_the_pads_and_the_parameters() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.json");
        std::fs::write(
            &config,
            r#"{"text_config":{"vocab_size":320},"image_token_id":5,"video_token_id":6}"#,
        )
        .unwrap();
        assert!(Model::from_folder(folder.path()).unwrap().parameters.is_empty());
        let bytes = [0_u8; 24];
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 3], &bytes).unwrap();
        safetensors::serialize_to_file([("a", view)], None, &folder.path().join("model.safetensors"))
            .unwrap();
        let model = Model::from_folder(folder.path()).unwrap();
        assert_eq!(model.vocabulary, Some(320));
        assert_eq!((model.pad(MediaKind::Image), model.pad(MediaKind::Video)), (Some(5), Some(6)));
        assert_eq!(model.parameters, BTreeMap::from([("a".to_owned(), vec![2, 3])]));
        std::fs::write(config, r#"{"vocab_size":7}"#).unwrap();
        assert_eq!(Model::from_folder(folder.path()).unwrap().vocabulary, Some(7));
    }

    #[test]
    fn what_is_broken_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Model::from_folder(folder.path()).unwrap_err();
        assert!(error.to_string().contains("config.json"), "{error}");
        std::fs::write(folder.path().join("config.json"), "[]").unwrap();
        assert!(matches!(Model::from_folder(folder.path()), Err(Error::Malformed { .. })));
        std::fs::write(folder.path().join("config.json"), "{}").unwrap();
        std::fs::write(folder.path().join("model.safetensors"), "abc").unwrap();
        let error = Model::from_folder(folder.path()).unwrap_err();
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
}
