//! Prompts to token ids, and what happens to those that are too long.

use std::path::Path;

use tokenizers::{Encoding, Tokenizer};

use crate::Error;

/// What happens to a prompt of more than the tokens allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Truncation {
    /// An error that names the prompt.
    #[default]
    Refuse,
    /// Its last tokens are kept: the question and the header of the answer stay.
    KeepEnd,
    /// Its first tokens are kept. LightRFT does this: it tokenizes with `truncation=True` and the tokenizer's
    /// `truncation_side`, which is `right` unless a model says otherwise. A chat prompt so cut has lost the header of
    /// the answer.
    KeepStart,
}

/// How prompts are tokenized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenizeConfig {
    /// Most tokens of a prompt (LightRFT's `prompt_max_len`).
    pub max_tokens: usize,
    /// What happens to longer ones.
    pub truncation: Truncation,
}

/// A tokenizer of a model (`tokenizer.json`), used as LightRFT uses it for prompts: no special tokens are added, for the
/// chat template has written them; no padding.
#[derive(Clone, Debug)]
pub struct PromptTokenizer {
    tokenizer: Tokenizer,
    config: TokenizeConfig,
}

impl PromptTokenizer {
    /// Reads the `tokenizer.json` of a checkpoint's folder, as [`from_file`](Self::from_file).
    ///
    /// # Errors
    /// As there.
    pub fn from_folder(folder: impl AsRef<Path>, config: TokenizeConfig) -> Result<Self, Error> {
        Self::from_file(folder.as_ref().join("tokenizer.json"), config)
    }

    /// Reads a `tokenizer.json`. Truncation and padding that it asks for are left aside.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]; [`Error::Setting`] for a limit of 0.
    pub fn from_file(path: impl AsRef<Path>, config: TokenizeConfig) -> Result<Self, Error> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|source| Error::Io {
            action: "read",
            path: path.to_owned(),
            source,
        })?;
        Self::from_bytes(&bytes, config).map_err(|error| match error {
            Error::Tokenizer { message } => {
                Error::Tokenizer { message: format!("{}: {message}", path.display()) }
            }
            other => other,
        })
    }

    /// As [`from_file`](Self::from_file), from its content.
    ///
    /// # Errors
    /// As there.
    pub fn from_bytes(json: &[u8], config: TokenizeConfig) -> Result<Self, Error> {
        if config.max_tokens == 0 {
            return Err(Error::Setting { setting: "max_tokens", value: 0, expected: "at least 1" });
        }
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(failed)?;
        tokenizer.with_truncation(None).map_err(failed)?.with_padding(None);
        Ok(Self { tokenizer, config })
    }

    /// The ids of one prompt.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] for prompt 0, [`Error::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(failed)?;
        self.cut(0, text, &encoding)
    }

    /// The ids of a batch, by all threads that the `tokenizers` crate takes.
    ///
    /// # Errors
    /// [`Error::PromptTooLong`] with the prompt's place, [`Error::Tokenizer`].
    pub fn encode_batch(&self, texts: &[impl AsRef<str> + Sync]) -> Result<Vec<Vec<u32>>, Error> {
        let inputs: Vec<&str> = texts.iter().map(AsRef::as_ref).collect();
        let encodings = self.tokenizer.encode_batch_fast(inputs.clone(), false).map_err(failed)?;
        let pairs = inputs.into_iter().zip(&encodings).enumerate();
        pairs.map(|(prompt, (text, encoding))| self.cut(prompt, text, encoding)).collect()
    }

    fn cut(&self, prompt: usize, text: &str, encoding: &Encoding) -> Result<Vec<u32>, Error> {
        let ids = encoding.get_ids();
        let max = self.config.max_tokens;
        let Some(over) = ids.len().checked_sub(max).filter(|over| *over > 0) else { return Ok(ids.to_vec()) };
        // Cutting through a vision block, or cutting one off, leaves an image without its tokens.
        let with_vision = text.contains("<|vision_start|>");
        let hint = match (self.config.truncation, with_vision) {
            (Truncation::KeepEnd, false) => return Ok(ids[over..].to_vec()),
            (Truncation::KeepStart, false) => return Ok(ids[..max].to_vec()),
            (Truncation::Refuse, _) => "",
            (_, true) => "; it has vision blocks and is not cut",
        };
        Err(Error::PromptTooLong { prompt, tokens: ids.len(), max, hint })
    }
}

fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenizer { message: error.to_string() }
}
