//! Text to token ids and back, with a Hugging Face `tokenizer.json`.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The tokenizer of a model folder.
#[derive(Clone, Debug)]
pub struct Text {
    tokenizer: tokenizers::Tokenizer,
    source: PathBuf,
}

impl Text {
    /// Reads `tokenizer.json` of a model folder.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] names the file.
    pub fn from_folder(folder: &Path) -> Result<Self> {
        let source = folder.join("tokenizer.json");
        let tokenizer = tokenizers::Tokenizer::from_file(&source)
            .map_err(|e| Error::Tokenizer(format!("{}: {e}", source.display())))?;
        Ok(Self { tokenizer, source })
    }

    /// Parses the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn from_json(json: &str) -> Result<Self> {
        let source = PathBuf::from("tokenizer.json");
        let tokenizer = json.parse().map_err(|e| Error::Tokenizer(format!("{}: {e}", source.display())))?;
        Ok(Self { tokenizer, source })
    }

    /// The file it came from.
    pub fn source(&self) -> &Path {
        &self.source
    }

    /// Token ids of a text, without special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the text cannot be encoded, or holds characters that the tokenizer has no token for.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self
            .tokenizer
            .encode(text, false)
            .map_err(|e| Error::Tokenizer(format!("cannot encode {text:?}: {e}")))?;
        let unknown = self.tokenizer.token_to_id("<unk>");
        if let Some(at) = encoding.get_ids().iter().position(|id| Some(*id) == unknown) {
            let (start, end) = encoding.get_offsets()[at];
            return Err(Error::Tokenizer(format!(
                "{:?} in {text:?} is in no token of {}",
                text.get(start..end).unwrap_or_default(),
                self.source.display()
            )));
        }
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of token ids, special tokens left out.
    ///
    /// # Errors
    /// [`Error::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(|e| Error::Tokenizer(format!("cannot decode {ids:?}: {e}")))
    }
}
