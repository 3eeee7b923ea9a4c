//! Vision blocks in a prompt's text: `<|vision_start|>`, pads of one kind, `<|vision_end|>`.

use std::ops::Range;

use crate::multimodal::MediaKind;

const START: &str = "<|vision_start|>";
const END: &str = "<|vision_end|>";
const IMAGE_PAD: &str = "<|image_pad|>";
const VIDEO_PAD: &str = "<|video_pad|>";

/// The token that stands for one part of a medium.
pub(crate) fn pad_of(kind: MediaKind) -> &'static str {
    match kind {
        MediaKind::Image => IMAGE_PAD,
        MediaKind::Video => VIDEO_PAD,
    }
}

/// `text.find(token)` for a token that begins with `<`. Looking for one byte is many times faster than preparing a search
/// for a string, which is done anew for every place that is found.
fn find(text: &str, token: &str) -> Option<usize> {
    let mut at = 0;
    loop {
        at += text[at..].find('<')?;
        if text[at..].starts_with(token) {
            return Some(at);
        }
        at += 1;
    }
}

/// The length of the whole block of this kind that `text` begins with, if it begins with one.
fn block_at_start(text: &str, kind: MediaKind) -> Option<usize> {
    let pad = pad_of(kind);
    let mut rest = text.strip_prefix(START)?.strip_prefix(pad)?;
    while let Some(after) = rest.strip_prefix(pad) {
        rest = after;
    }
    Some(text.len() - rest.strip_prefix(END)?.len())
}

/// Takes out image blocks, then video blocks: what LightRFT's two regular expressions do. The second pass also takes
/// out video blocks that the first has joined together.
pub(crate) fn strip_in_two_passes(text: &str) -> String {
    strip(&strip(text, MediaKind::Image), MediaKind::Video)
}

fn strip(text: &str, kind: MediaKind) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = find(rest, START) {
        let (before, from) = rest.split_at(at);
        kept.push_str(before);
        let taken = block_at_start(from, kind).unwrap_or_else(|| {
            kept.push_str(START);
            START.len()
        });
        rest = &from[taken..];
    }
    kept + rest
}

/// The blocks of a text, found in one pass over the original.
pub(crate) struct Placeholders {
    blocks: Vec<(MediaKind, Range<usize>)>,
    /// Where the first vision token outside of every block stands, and of which kind it is if it is a pad.
    pub(crate) stray: Option<(usize, MediaKind)>,
}

impl Placeholders {
    pub(crate) fn find(text: &str) -> Self {
        let mut found = Self { blocks: Vec::new(), stray: None };
        let mut at = 0;
        while let Some(next) = find(&text[at..], "<|") {
            at += next;
            let rest = &text[at..];
            let starts = rest.starts_with(START);
            let block = [MediaKind::Image, MediaKind::Video]
                .into_iter()
                .filter(|_| starts)
                .find_map(|kind| Some((kind, block_at_start(rest, kind)?)));
            if let Some((kind, len)) = block {
                found.blocks.push((kind, at..at + len));
                at += len;
                continue;
            }
            if found.stray.is_none()
                && (starts || [END, IMAGE_PAD, VIDEO_PAD].iter().any(|t| rest.starts_with(t)))
            {
                // An empty or an unfinished block belongs to the kind of the pad that it begins with, if to any.
                let inner = rest.strip_prefix(START).unwrap_or(rest);
                let kind = if inner.starts_with(VIDEO_PAD) { MediaKind::Video } else { MediaKind::Image };
                found.stray = Some((at, kind));
            }
            at += "<|".len();
        }
        found
    }

    /// Where the first vision token stands, in a block or not, and its kind.
    pub(crate) fn first(&self) -> Option<(usize, MediaKind)> {
        let block = self.blocks.first().map(|(kind, range)| (range.start, *kind));
        self.stray.into_iter().chain(block).min_by_key(|(byte, _)| *byte)
    }

    /// Whole blocks of one kind.
    pub(crate) fn count(&self, kind: MediaKind) -> usize {
        self.blocks.iter().filter(|(of, _)| *of == kind).count()
    }

    /// Where the pads of each block lie, in order.
    pub(crate) fn pads(&self) -> impl Iterator<Item = (MediaKind, Range<usize>)> {
        self.blocks.iter().map(|(kind, block)| (*kind, block.start + START.len()..block.end - END.len()))
    }

    /// The text without its blocks.
    pub(crate) fn without_blocks(&self, text: &str) -> String {
        let mut kept = String::with_capacity(text.len());
        let mut from = 0;
        for (_, block) in &self.blocks {
            kept.push_str(&text[from..block.start]);
            from = block.end;
        }
        kept + &text[from..]
    }
}
