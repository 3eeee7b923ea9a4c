//! What a model folder tells of a server's model: its vocabulary, its pad tokens, its parameters.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use crate::{Error, HfFolder, MediaKind, Result, WeightSource};

/// What is known of a server's model.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Model {
    pub(crate) vocabulary: Option<usize>,
    pub(crate) image_pad: Option<u32>,
    pub(crate) video_pad: Option<u32>,
    /// Shape of each parameter, by name; empty if they are not known.
    pub(crate) parameters: BTreeMap<String, Vec<usize>>,
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
    pub(crate) fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let io = |source| Error::Io { path: path.clone(), source };
        let config: Config = serde_json::from_slice(&std::fs::read(&path).map_err(io)?)
            .map_err(|error| Error::Malformed { path: path.clone(), what: error.to_string() })?;
        let mut parameters = BTreeMap::new();
        let names = ["model.safetensors", "model.safetensors.index.json"];
        if names.iter().any(|name| folder.join(name).exists()) {
            let weights = HfFolder::open(folder)?;
            let infos = weights.tensors().iter();
            parameters = infos.map(|t| (t.name.clone(), t.shape.clone())).collect();
        }
        Ok(Self {
            vocabulary: config.text_config.and_then(|text| text.vocab_size).or(config.vocab_size),
            image_pad: config.image_token_id,
            video_pad: config.video_token_id,
            parameters,
        })
    }

    /// The token that stands for a picture or a film in a prompt.
    pub(crate) fn pad(&self, kind: MediaKind) -> Option<u32> {
        match kind {
            MediaKind::Image => self.image_pad,
            MediaKind::Video => self.video_pad,
        }
    }
}

/// Most pictures and films of one prompt that a server takes, where that is known.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct MediaLimits {
    pub(crate) images: Option<usize>,
    pub(crate) videos: Option<usize>,
}

impl MediaLimits {
    /// Refuses a request with more of a kind: the server would, with others of the same call under way.
    pub(crate) fn check(self, request: usize, kind: MediaKind, count: usize) -> Result<()> {
        let (most, name) = match kind {
            MediaKind::Image => (self.images, "images"),
            MediaKind::Video => (self.videos, "videos"),
        };
        match most {
            Some(most) if count > most => {
                let value = format!("{count} {name} of at most {most}");
                let expected = "as many as the server was started for were expected (`images_per_prompt`, \
                                `videos_per_prompt`)";
                Err(Error::Request { request, field: "media", value, expected })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use safetensors::Dtype;

    use super::*;

    fn write(folder: &Path, name: &str, text: &str) {
        fs::write(folder.join(name), text).unwrap();
    }

    #[test]
    fn a_folder_tells_the_vocabulary_the_pads_and_the_parameters() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let config =
            r#"{"text_config":{"vocab_size":320},"image_token_id":5,"video_token_id":6,"vocab_size":9}"#;
        write(path, "config.json", config);
        let bytes = [0_u8; 24];
        let view =
            |shape: Vec<usize>| safetensors::tensor::TensorView::new(Dtype::F32, shape, &bytes).unwrap();
        let tensors = [("a", view(vec![2, 3])), ("lm_head.weight", view(vec![6]))];
        safetensors::serialize_to_file(tensors, None, &path.join("model.safetensors")).unwrap();
        let model = Model::from_folder(path).unwrap();
        assert_eq!(model.vocabulary, Some(320));
        assert_eq!((model.pad(MediaKind::Image), model.pad(MediaKind::Video)), (Some(5), Some(6)));
        let expected = [("a", vec![2, 3]), ("lm_head.weight", vec![6])];
        assert!(model.parameters.iter().map(|(n, p)| (n.as_str(), p.clone())).eq(expected));

        write(path, "config.json", r#"{"vocab_size":9,"tie_word_embeddings":true}"#);
        let tied = Model::from_folder(path).unwrap();
        assert_eq!((tied.vocabulary, tied.parameters.len()), (Some(9), 1), "a tied head is no parameter");
        write(path, "config.json", r#"{"vocab_size":9,"text_config":{"tie_word_embeddings":true}}"#);
        assert_eq!(Model::from_folder(path).unwrap(), tied);
    }

    #[test]
    fn what_is_broken_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Model::from_folder(folder.path()).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("config.json")), "{error:?}");
        write(folder.path(), "config.json", "[]");
        assert!(matches!(Model::from_folder(folder.path()), Err(Error::Malformed { .. })));
        write(folder.path(), "config.json", r#"{"vocab_size":7}"#);
        assert_eq!(Model::from_folder(folder.path()).unwrap().vocabulary, Some(7));
        write(folder.path(), "model.safetensors", "abc");
        let error = Model::from_folder(folder.path()).unwrap_err();
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
}
