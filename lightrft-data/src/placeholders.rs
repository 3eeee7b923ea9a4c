//! Places for media in a prompt's text: vision blocks (`<|vision_start|>`, pads of one kind, `<|vision_end|>`), and runs of
//! `<|AUDIO|>`.

use std::borrow::Cow;
use std::ops::Range;

use crate::multimodal::MediaKind;

const START: &str = "<|vision_start|>";
const END: &str = "<|vision_end|>";
const IMAGE_PAD: &str = "<|image_pad|>";
const VIDEO_PAD: &str = "<|video_pad|>";
/// Qwen2-Audio's and Qwen2.5-Omni's. What stands around it (`<|audio_bos|>`, `<|audio_eos|>`) is optional there.
const AUDIO: &str = "<|AUDIO|>";

/// The token that stands for one part of a medium.
pub(crate) fn pad_of(kind: MediaKind) -> &'static str {
    match kind {
        MediaKind::Image => IMAGE_PAD,
        MediaKind::Video => VIDEO_PAD,
        MediaKind::Audio => AUDIO,
    }
}

/// Where the next token stands, from `at` on, that may be one of ours: `<|` before `v`, before `A`, or two bytes before `a`.
/// The tokens around each message of a chat are none of these. Blocks of 32 places are looked at in one go, which is
/// several times faster than stopping at every `<`; the last block reaches back over places that have been looked at.
fn next_token(text: &str, mut at: usize) -> Option<usize> {
    const PLACES: usize = 32;
    const MORE: usize = 4;
    let bytes = text.as_bytes();
    let Some(last) = bytes.len().checked_sub(PLACES + MORE) else {
        return bytes.get(at..)?.windows(2).position(|two| two == b"<|").map(|i| at + i);
    };
    // No token of ours is so short that it begins behind the last block's places.
    const { assert!(AUDIO.len() > MORE) };
    while at < last + PLACES {
        let begin = at.min(last);
        let block = bytes[begin..].first_chunk::<{ PLACES + MORE }>()?;
        // Numbers instead of branches, so that it is compiled to vector instructions.
        let may_begin = |i: usize| {
            let is = |ahead: usize, byte: u8| u8::from(block[i + ahead] == byte);
            is(0, b'<') & is(1, b'|') & (is(2, b'v') | is(2, b'A') | is(4, b'a'))
        };
        let mut any = 0;
        for i in 0..PLACES {
            any |= may_begin(i);
        }
        if any != 0 {
            let found = (at - begin..PLACES).find(|i| may_begin(*i) != 0);
            if let Some(i) = found {
                return Some(begin + i);
            }
        }
        at = begin + PLACES;
    }
    None
}

/// What follows the pads that `text` begins with, if there is at least one.
fn after_pads<'t>(text: &'t str, pad: &str) -> Option<&'t str> {
    let mut rest = text.strip_prefix(pad)?;
    while let Some(after) = rest.strip_prefix(pad) {
        rest = after;
    }
    Some(rest)
}

/// The length of the whole vision block of this kind that `text` begins with, if it begins with one.
fn block_at_start(text: &str, kind: MediaKind) -> Option<usize> {
    let rest = after_pads(text.strip_prefix(START)?, pad_of(kind))?;
    Some(text.len() - rest.strip_prefix(END)?.len())
}

/// Takes out image blocks, then video blocks: what LightRFT's two regular expressions do. The second pass also takes
/// out video blocks that the first has joined together.
pub(crate) fn strip_in_two_passes(text: &str) -> Cow<'_, str> {
    match strip(text, MediaKind::Image) {
        None => strip(text, MediaKind::Video).map_or(Cow::Borrowed(text), Cow::Owned),
        Some(text) => Cow::Owned(strip(&text, MediaKind::Video).unwrap_or(text)),
    }
}

/// The text without its blocks of this kind, where it has some.
fn strip(text: &str, kind: MediaKind) -> Option<String> {
    let mut kept: Option<String> = None;
    let (mut from, mut at) = (0, 0);
    while let Some(next) = next_token(text, at) {
        match block_at_start(&text[next..], kind) {
            Some(len) => {
                kept.get_or_insert_with(|| String::with_capacity(text.len())).push_str(&text[from..next]);
                at = next + len;
                from = at;
            }
            None => at = next + "<|".len(),
        }
    }
    kept.map(|kept| kept + &text[from..])
}

/// What a text has for media.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    /// A place for one medium: a whole vision block, or a run of audio tokens.
    Place(MediaKind, Range<usize>),
    /// A vision token outside of every block, where it stands, and of which kind it is if it is a pad.
    Stray(MediaKind, usize),
}

/// Finds the places of a text, in one pass over the original.
pub(crate) struct Places<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Places<'t> {
    pub(crate) fn of(text: &'t str) -> Self {
        Self { text, at: 0 }
    }
}

impl Iterator for Places<'_> {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        loop {
            let at = next_token(self.text, self.at)?;
            let rest = &self.text[at..];
            self.at = at + "<|".len();
            // Most tokens of a chat are none of these, and are told apart by one byte.
            match rest.as_bytes().get("<|".len()) {
                Some(b'A') => {
                    if let Some(after) = after_pads(rest, AUDIO) {
                        self.at = self.text.len() - after.len();
                        return Some(Found::Place(MediaKind::Audio, at..self.at));
                    }
                }
                Some(b'v') if rest.starts_with(START) => {
                    let block = |kind| Some((kind, block_at_start(rest, kind)?));
                    if let Some((kind, len)) = block(MediaKind::Image).or_else(|| block(MediaKind::Video)) {
                        self.at = at + len;
                        return Some(Found::Place(kind, at..self.at));
                    }
                    // An empty or an unfinished block belongs to the kind of the pad that it begins with, if to any.
                    let is_video = rest[START.len()..].starts_with(VIDEO_PAD);
                    let kind = if is_video { MediaKind::Video } else { MediaKind::Image };
                    return Some(Found::Stray(kind, at));
                }
                Some(b'v') if rest.starts_with(VIDEO_PAD) => return Some(Found::Stray(MediaKind::Video, at)),
                Some(b'v') if rest.starts_with(END) => return Some(Found::Stray(MediaKind::Image, at)),
                Some(b'i') if rest.starts_with(IMAGE_PAD) => return Some(Found::Stray(MediaKind::Image, at)),
                _ => {}
            }
        }
    }
}

/// The pads of a vision block.
pub(crate) fn pads_of(block: &Range<usize>) -> Range<usize> {
    block.start + START.len()..block.end - END.len()
}

/// A text that blocks are taken out of, one after the other.
pub(crate) struct Stripped<'t> {
    text: &'t str,
    kept: String,
    /// Where in `text` the last block ended.
    from: usize,
    may_spell: bool,
}

impl<'t> Stripped<'t> {
    pub(crate) fn new(text: &'t str) -> Self {
        Self { text, kept: String::with_capacity(text.len()), from: 0, may_spell: false }
    }

    /// Takes out a block behind those before it.
    pub(crate) fn take_out(&mut self, block: Range<usize>) {
        self.kept.push_str(&self.text[self.from..block.start]);
        self.from = block.end;
        let before = &self.kept.as_bytes()[self.kept.len().saturating_sub(START.len())..];
        self.may_spell |= before.contains(&b'<');
    }

    /// What is left, and the first token of ours in it. Where all that the text had were in the blocks, that is one which
    /// taking a block out of the middle of a word has spelled; it begins at most a token's length before the block, and no
    /// token is longer than `<|vision_start|>`.
    pub(crate) fn finish(self) -> (String, Option<Found>) {
        let kept = self.kept + &self.text[self.from..];
        let spelled = if self.may_spell { Places::of(&kept).next() } else { None };
        (kept, spelled)
    }
}
