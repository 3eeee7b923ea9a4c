//! Texts that end a completion, found while its tokens are drawn.

use std::fmt;

/// Token ids to text, for [`Sampling::stop_strings`](crate::Sampling::stop_strings).
pub trait Detokenize: fmt::Debug + Send + Sync {
    /// The text of a run of tokens. An incomplete character at its end is U+FFFD.
    ///
    /// # Errors
    /// Whatever keeps it from giving one.
    fn text(&self, tokens: &[u32]) -> Result<String, Box<dyn std::error::Error + Send + Sync>>;
}

/// Special tokens have no text: stop at them by their ids.
impl Detokenize for tokenizers::Tokenizer {
    fn text(&self, tokens: &[u32]) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
        self.decode(tokens, true)
    }
}

/// The end of a completion's text.
///
/// A token's text may depend on those before it, so a token is read together with those that were new the last time.
#[derive(Clone, Debug, Default)]
pub(super) struct Tail {
    /// As much text as a stop text may have begun in.
    text: String,
    /// Where the tokens that were read last begin, and where they end.
    context: usize,
    read: usize,
}

/// Which stop texts count now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stops {
    /// It is too early for any: they are read over.
    Ignored,
    /// The first that is found ends the completion.
    Heeded,
}

impl Tail {
    /// Reads `tokens`, those of the whole completion, as far as they are new; gives the lowest index in `stops` of a
    /// text that the new tokens complete.
    pub(super) fn read(
        &mut self,
        detokenizer: &dyn Detokenize,
        tokens: &[u32],
        stops: &[String],
        heed: Stops,
    ) -> Result<Option<usize>, Box<dyn std::error::Error + Send + Sync>> {
        let known = detokenizer.text(tokens.get(self.context..self.read).unwrap_or_default())?;
        let text = detokenizer.text(tokens.get(self.context..).unwrap_or_default())?;
        if text.ends_with('\u{FFFD}') {
            return Ok(None);
        }
        let Some(new) = text.get(known.len()..).filter(|new| !new.is_empty()) else { return Ok(None) };
        let old = self.text.len();
        self.text.push_str(new);
        (self.context, self.read) = (self.read, tokens.len());
        let completed = |stop: &String| {
            // A text that was complete before is not completed now.
            let from = self.text.floor_char_boundary((old + 1).saturating_sub(stop.len()));
            self.text[from..].contains(stop.as_str())
        };
        let found = if heed == Stops::Heeded { stops.iter().position(completed) } else { None };
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        let keep = self.text.floor_char_boundary(self.text.len().saturating_sub(longest));
        self.text.drain(..keep);
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Tokens are bytes, as in a byte-level tokenizer.
    #[derive(Debug)]
    struct Bytes;

    impl Detokenize for Bytes {
        fn text(&self, tokens: &[u32]) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
            let bytes: Vec<u8> = tokens.iter().map(|t| *t as u8).collect();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
    }

    fn first_stop(bytes: &[u8], stops: &[String], heeded_from: usize) -> Option<(usize, usize)> {
        let tokens: Vec<u32> = bytes.iter().map(|b| u32::from(*b)).collect();
        let mut tail = Tail::default();
        (1..=tokens.len()).find_map(|n| {
            let heed = if n > heeded_from { Stops::Heeded } else { Stops::Ignored };
            Some((n, tail.read(&Bytes, &tokens[..n], stops, heed).unwrap()?))
        })
    }

    #[test]
    fn characters_of_several_tokens_are_read_when_they_are_whole() {
        let stops = ["é!".to_owned(), "né".to_owned()];
        assert_eq!(first_stop("année!".as_bytes(), &stops, 0), Some((5, 1)));
        assert_eq!(first_stop("été!".as_bytes(), &stops, 0), Some((6, 0)));
    }

    #[test]
    fn a_text_completed_too_early_does_not_count_later() {
        let stops = ["ab".to_owned()];
        assert_eq!(first_stop(b"xabyyab", &stops, 3), Some((7, 0)));
        assert_eq!(first_stop(b"xabyyab", &stops, 2), Some((3, 0)));
        assert_eq!(first_stop(b"xabyy", &stops, 3), None);
    }

    proptest! {
        #[test]
        fn the_first_token_that_completes_a_stop_text_is_found(
            text in "[ab\u{e9}\u{4e16}]{0,24}",
            stops in prop::collection::vec("[ab\u{e9}\u{4e16}]{1,4}", 1..4),
        ) {
            let bytes = text.as_bytes();
            let expected = (1..=bytes.len()).find_map(|n| {
                let so_far = std::str::from_utf8(&bytes[..n]).ok()?;
                Some((n, stops.iter().position(|s| so_far.contains(s.as_str()))?))
            });
            prop_assert_eq!(first_stop(bytes, &stops, 0), expected);
        }
    }
}
