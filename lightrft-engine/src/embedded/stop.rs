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

/// Tokens whose text is read again and again, at most, while it ends in no whole character. A character of bytes is whole
/// after four.
const MOST_PENDING: usize = 16;

/// As many of the last tokens as a character that is not whole may lie in, and one more.
const LATEST: usize = 4;

/// The end of a completion's text.
///
/// A token's text may depend on those before it, so new tokens are read together with some before them. Where their text
/// ends in U+FFFD it may be a character that is not whole yet: that much of it is taken when other tokens have come.
#[derive(Clone, Debug, Default)]
pub(super) struct Tail {
    /// As much text as a stop text may have begun in.
    text: String,
    /// Where the tokens begin that are read together.
    context: usize,
    /// Bytes of their text that were taken.
    taken: usize,
    /// Where the tokens ended when `context` was last moved.
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
        let text_from = |context| detokenizer.text(tokens.get(context..).unwrap_or_default());
        let text = text_from(self.context)?;
        let whole = text.trim_end_matches('\u{FFFD}');
        // Text may become shorter: some decoders give a U+FFFD for every byte of a run that is not whole.
        let new = whole.get(whole.ceil_char_boundary(self.taken)..).unwrap_or_default();
        let old = self.text.len();
        self.text.push_str(new);
        self.taken = self.taken.max(whole.len());
        let context = if whole.len() == text.len() && !new.is_empty() {
            Some(self.read)
        } else if tokens.len() - self.read.min(tokens.len()) > MOST_PENDING {
            Some(tokens.len() - LATEST)
        } else {
            None
        };
        if let Some(context) = context {
            (self.context, self.read) = (context, tokens.len());
            self.taken = text_from(context)?.trim_end_matches('\u{FFFD}').len();
        }
        let completed = |stop: &String| {
            // A text that was complete before is not completed now.
            let from = self.text.ceil_char_boundary((old + 1).saturating_sub(stop.len()));
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
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use proptest::prelude::*;

    /// Tokens are pieces of bytes, as in a byte-level tokenizer. Counts the tokens that it reads.
    #[derive(Debug)]
    struct Pieces(Vec<Vec<u8>>, AtomicUsize);

    impl Detokenize for Pieces {
        fn text(&self, tokens: &[u32]) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
            self.1.fetch_add(tokens.len(), Ordering::Relaxed);
            let bytes: Vec<u8> = tokens.iter().flat_map(|t| self.0[*t as usize].clone()).collect();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
    }

    /// Tokens are bytes, and a run of them is whole or worth nothing, as where bytes are a tokenizer's last resort.
    #[derive(Debug)]
    struct Fallback(Vec<u8>);

    impl Detokenize for Fallback {
        fn text(&self, tokens: &[u32]) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
            let bytes: Vec<u8> = tokens.iter().map(|t| self.0[*t as usize]).collect();
            Ok(String::from_utf8(bytes).unwrap_or_else(|_| "\u{FFFD}".repeat(tokens.len())))
        }
    }

    /// After how many of the tokens 0, 1, .. which stop text is found.
    fn found(
        detokenizer: &dyn Detokenize,
        count: usize,
        stops: &[String],
        heeded_from: usize,
    ) -> Option<(usize, usize)> {
        let tokens: Vec<u32> = (0..count as u32).collect();
        let mut tail = Tail::default();
        (1..=count).find_map(|n| {
            let heed = if n > heeded_from { Stops::Heeded } else { Stops::Ignored };
            Some((n, tail.read(detokenizer, &tokens[..n], stops, heed).unwrap()?))
        })
    }

    fn pieces(pieces: Vec<Vec<u8>>) -> Pieces {
        Pieces(pieces, AtomicUsize::new(0))
    }

    fn first_stop(bytes: &[u8], stops: &[String], heeded_from: usize) -> Option<(usize, usize)> {
        let bytes = pieces(bytes.iter().map(|b| vec![*b]).collect());
        found(&bytes, bytes.0.len(), stops, heeded_from)
    }

    /// The first stop text that ends in what a token brings, the text before a character that is not whole.
    fn expected(pieces: &[Vec<u8>], stops: &[String], heeded_from: usize) -> Option<(usize, usize)> {
        let whole = |n: usize| {
            let text = String::from_utf8_lossy(&pieces[..n].concat()).into_owned();
            text.trim_end_matches('\u{FFFD}').as_bytes().to_vec()
        };
        (heeded_from + 1..=pieces.len()).find_map(|n| {
            let (before, now) = (whole(n - 1).len(), whole(n));
            let ends =
                |stop: &String| (before + 1..=now.len()).any(|end| now[..end].ends_with(stop.as_bytes()));
            Some((n, stops.iter().position(ends)?))
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

    #[test]
    fn a_text_of_wide_characters_completed_too_early_does_not_count_later() {
        let stops = ["é".to_owned()];
        let text = pieces(vec!["é".into(), "x".into(), "yé".into()]);
        assert_eq!(found(&text, 3, &stops, 1), Some((3, 0)));
    }

    #[test]
    fn a_text_before_a_character_that_is_not_whole_is_found_at_once() {
        let text = pieces(vec![b"stop\xe4".to_vec(), b"\xb8".to_vec(), b"\x96".to_vec()]);
        assert_eq!(found(&text, 3, &["stop".to_owned()], 0), Some((1, 0)));
    }

    #[test]
    fn tokens_without_a_whole_character_are_read_a_few_times_only() {
        let count = 2000;
        let mut text = vec![vec![0xff]; count];
        text.extend([b"ab".to_vec()]);
        let text = pieces(text);
        assert_eq!(found(&text, count + 1, &["ab".to_owned()], 0), Some((count + 1, 0)));
        let read = text.1.load(Ordering::Relaxed);
        assert!(read < 40 * count, "{read} tokens were read");
    }

    fn stops() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[ab\u{e9}\u{4e16}]{1,4}", 1..4)
    }

    proptest! {
        #[test]
        fn the_first_token_that_completes_a_stop_text_is_found(
            text in prop::collection::vec(
                prop_oneof![
                    4 => "[ab\u{e9}\u{4e16}]".prop_map(String::into_bytes),
                    1 => prop::sample::select(vec![0xff_u8, 0xe4, 0x96]).prop_map(|byte| vec![byte]),
                ],
                0..60,
            ),
            lengths in prop::collection::vec(1..5_usize, 1..20),
            stops in stops(),
            heeded_from in 0..6_usize,
        ) {
            let (bytes, mut tokens) = (text.concat(), Vec::new());
            let mut rest = bytes.as_slice();
            for length in lengths.iter().cycle() {
                let (token, after) = rest.split_at((*length).min(rest.len()));
                if token.is_empty() {
                    break;
                }
                tokens.push(token.to_vec());
                rest = after;
            }
            let expected = expected(&tokens, &stops, heeded_from);
            let text = pieces(tokens);
            prop_assert_eq!(found(&text, text.0.len(), &stops, heeded_from), expected);
        }

        #[test]
        fn characters_of_bytes_that_mean_nothing_alone_are_found_when_they_are_whole(
            text in "[ab\u{e9}\u{4e16}]{0,24}", stops in stops(), heeded_from in 0..6_usize,
        ) {
            let bytes: Vec<Vec<u8>> = text.bytes().map(|byte| vec![byte]).collect();
            let expected = expected(&bytes, &stops, heeded_from);
            prop_assert_eq!(found(&Fallback(text.clone().into_bytes()), text.len(), &stops, heeded_from), expected);
        }
    }
}
