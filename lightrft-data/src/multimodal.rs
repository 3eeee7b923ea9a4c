//! Images, videos and sounds to the prompts they belong to, for engines that take them together.
//!
//! A batch brings its media as one list for all prompts, in either of two forms, and the number that belongs to each
//! prompt. LightRFT guesses the form per prompt and carries on when the numbers do not fit, so images drift to other
//! prompts or vanish with their placeholders. [`Mode::Strict`] settles the form for the whole batch and refuses what
//! does not fit; [`Mode::LightRft`] gives what LightRFT gives.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use crate::Error;
use crate::deal::Dealer;
use crate::placeholders::{self, Found, Places, Stripped};

/// One entry of a list of media. `M` is whatever stands for an image, a video or a sound: a path, bytes, a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Media<M> {
    /// Nothing, Python's `None`.
    Missing,
    /// One image, video or sound: an entry of the flat form.
    One(M),
    /// The media of one prompt: an entry of the nested form.
    Group(Vec<Media<M>>),
}

/// The media of one kind that come with a batch of prompts.
#[derive(Debug)]
pub struct MediaColumn<'a, M> {
    /// Flat (all media of all prompts in order) or nested (one [`Media::Group`] a prompt). `None`: this kind is absent.
    pub entries: Option<&'a [Media<M>]>,
    /// How many belong to each prompt. `None`, for the column or for a prompt, is refused where it matters.
    pub counts: Option<&'a [Option<i64>]>,
}

impl<M> MediaColumn<'_, M> {
    /// No media of this kind.
    pub const ABSENT: Self = Self { entries: None, counts: None };
}

// References to media, copied whether or not the media themselves can be.
impl<M> Clone for MediaColumn<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for MediaColumn<'_, M> {}

/// All media that come with a batch of prompts.
#[derive(Debug)]
pub struct MediaColumns<'a, M> {
    /// Images.
    pub images: MediaColumn<'a, M>,
    /// Videos.
    pub videos: MediaColumn<'a, M>,
    /// Sounds.
    pub audios: MediaColumn<'a, M>,
}

impl<M> Clone for MediaColumns<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for MediaColumns<'_, M> {}

impl<M> Default for MediaColumns<'_, M> {
    /// No media.
    fn default() -> Self {
        Self { images: MediaColumn::ABSENT, videos: MediaColumn::ABSENT, audios: MediaColumn::ABSENT }
    }
}

/// What happens where media and prompts do not fit together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// An error that names the prompt.
    #[default]
    Strict,
    /// What LightRFT does, for runs that must equal it.
    LightRft,
}

/// A prompt with its media, as an engine takes it. Text and lists are the caller's own, not copies of them, wherever
/// nothing had to be changed; [`into_owned`](Self::into_owned) makes it independent of the batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MultimodalInput<'a, M: Clone> {
    /// The text. Without any media its vision blocks have been taken out.
    pub prompt: Cow<'a, str>,
    /// Images in the order of their places in the text; in strict mode each is [`Media::One`].
    pub images: Cow<'a, [Media<M>]>,
    /// Videos, likewise.
    pub videos: Cow<'a, [Media<M>]>,
    /// Sounds, likewise.
    pub audios: Cow<'a, [Media<M>]>,
}

impl<M: Clone> MultimodalInput<'_, M> {
    /// The same with a text and lists of its own.
    pub fn into_owned(self) -> MultimodalInput<'static, M> {
        MultimodalInput {
            prompt: Cow::Owned(self.prompt.into_owned()),
            images: Cow::Owned(self.images.into_owned()),
            videos: Cow::Owned(self.videos.into_owned()),
            audios: Cow::Owned(self.audios.into_owned()),
        }
    }
}

/// Images, videos or sounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediaKind {
    /// Images.
    Image,
    /// Videos.
    Video,
    /// Sounds.
    Audio,
}

impl MediaKind {
    pub(crate) const ALL: [Self; 3] = [MediaKind::Image, MediaKind::Video, MediaKind::Audio];
}

impl fmt::Display for MediaKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MediaKind::Image => "images",
            MediaKind::Video => "videos",
            MediaKind::Audio => "audios",
        })
    }
}

/// Why media cannot be matched with a prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MediaProblem {
    /// Media came without the numbers that say whose they are.
    #[error("the batch brings {entries} entries but no counts")]
    NoCounts {
        /// Entries of the list.
        entries: usize,
    },
    /// The list of counts is not as long as the batch.
    #[error("{counts} counts for {prompts} prompts")]
    CountsLength {
        /// Counts that were given.
        counts: usize,
        /// Prompts of the batch.
        prompts: usize,
    },
    /// This prompt's count is missing.
    #[error("its count is missing")]
    MissingCount,
    /// This prompt's count is negative.
    #[error("its count is {count}")]
    NegativeCount {
        /// The count.
        count: i64,
    },
    /// Some entries are groups, one a prompt, and some single media.
    #[error("entry {entry} is {found}, the entries before it are not: a batch is either flat or nested")]
    MixedForms {
        /// The entry that differs.
        entry: usize,
        /// Its form.
        found: &'static str,
    },
    /// The nested form has one group a prompt, no more and no fewer.
    #[error("{groups} groups for {prompts} prompts")]
    GroupsLength {
        /// Groups that were given.
        groups: usize,
        /// Prompts of the batch.
        prompts: usize,
    },
    /// The list does not hold as many as the count says.
    #[error("its count is {count}, but {found} are there for it")]
    WrongCount {
        /// The count.
        count: i64,
        /// Media that are there.
        found: usize,
    },
    /// The flat list holds media that no prompt asks for.
    #[error("{left} of {entries} are left over after this last prompt")]
    LeftOver {
        /// Media that nobody takes.
        left: usize,
        /// Media in all.
        entries: usize,
    },
    /// A medium of this prompt is missing.
    #[error("number {place} of {count} is missing")]
    Missing {
        /// Which one, from 0.
        place: usize,
        /// How many belong to the prompt.
        count: usize,
    },
    /// A medium is itself a list.
    #[error("number {place} is a list")]
    Nested {
        /// Which one, from 0.
        place: usize,
    },
    /// The prompt's text has another number of places than media.
    #[error("{media} come with it, but its text has {blocks} blocks for them")]
    Placeholders {
        /// Media of the prompt.
        media: usize,
        /// Vision blocks, or runs of audio tokens, of this kind in its text.
        blocks: usize,
    },
    /// A block that is neither one pad, to be expanded, nor as many as its medium takes.
    #[error("block {place} has {pads} pads; 1 or {tokens} are expected")]
    PadCount {
        /// Which block of this kind, from 0.
        place: usize,
        /// Pads that are there.
        pads: usize,
        /// Tokens that its medium takes.
        tokens: u64,
    },
    /// A grid of more tokens than any context has.
    #[error("the medium of block {place} takes {tokens} tokens")]
    TooManyTokens {
        /// Which block of this kind, from 0.
        place: usize,
        /// Tokens that the grid says.
        tokens: u64,
    },
    /// Vision tokens that form no block: empty, mixed, bare or interrupted.
    #[error("its text has vision tokens outside of a whole block, at byte {byte}")]
    StrayTokens {
        /// Where the first one stands in the prompt, or would stand once the blocks are taken out.
        byte: usize,
    },
}

/// Whether a batch brings any media at all; without, an engine is given token ids instead of text.
pub fn is_multimodal<M>(media: &MediaColumns<'_, M>) -> bool {
    [media.images, media.videos, media.audios]
        .into_iter()
        .filter_map(|column| column.entries)
        .flatten()
        .any(|entry| !matches!(entry, Media::Missing))
}

/// Gives every prompt its media.
///
/// In strict mode a prompt with media keeps its text and has exactly one vision block
/// (`<|vision_start|><|image_pad|>...<|vision_end|>`, Qwen2-VL's) for each image and video, and one run of `<|AUDIO|>`
/// (Qwen2-Audio's) for each sound. A prompt without any media loses its vision blocks, for the engine would look for media
/// behind them; places for sounds that are not there are refused.
///
/// ```
/// use lightrft_data::{Media, MediaColumn, MediaColumns, Mode, build_multimodal_inputs};
///
/// let prompts = ["<|vision_start|><|image_pad|><|vision_end|>What is it?", "Hello"];
/// let cats = [Media::One("cat.png")];
/// let images = MediaColumn { entries: Some(&cats), counts: Some(&[Some(1), Some(0)]) };
///
/// let media = MediaColumns { images, ..MediaColumns::default() };
/// let inputs = build_multimodal_inputs(&prompts, media, Mode::Strict)?;
/// assert_eq!(*inputs[0].images, [Media::One("cat.png")]);
/// assert!(inputs[1].images.is_empty());
/// # Ok::<_, lightrft_data::Error>(())
/// ```
///
/// LightRFT itself knows images and videos; in [`Mode::LightRft`] sounds are dealt by the same rules, and their tokens stay
/// in the text.
///
/// # Errors
/// [`Error::Media`] with the prompt. In [`Mode::LightRft`] only for counts that are missing, where LightRFT raises
/// `IndexError` or `TypeError`.
pub fn build_multimodal_inputs<'a, M: Clone>(
    prompts: &'a [impl AsRef<str>],
    media: MediaColumns<'a, M>,
    mode: Mode,
) -> Result<Vec<MultimodalInput<'a, M>>, Error> {
    let dealer = |kind, column| Dealer::new(kind, column, prompts.len(), mode);
    let mut images = dealer(MediaKind::Image, media.images)?;
    let mut videos = dealer(MediaKind::Video, media.videos)?;
    let mut audios = dealer(MediaKind::Audio, media.audios)?;
    let mut inputs = Vec::with_capacity(prompts.len());
    for (place, prompt) in prompts.iter().enumerate() {
        let (images, videos, audios) = (images.deal(place)?, videos.deal(place)?, audios.deal(place)?);
        let (text, media) = (prompt.as_ref(), [images.len(), videos.len(), audios.len()]);
        let prompt = match mode {
            Mode::Strict => text_for(place, text, media)?,
            Mode::LightRft if media == [0; 3] => placeholders::strip_in_two_passes(text),
            Mode::LightRft => Cow::Borrowed(text),
        };
        let (images, videos, audios) = (images.into(), videos.into(), audios.into());
        inputs.push(MultimodalInput { prompt, images, videos, audios });
    }
    for dealer in [images, videos, audios] {
        dealer.finish()?;
    }
    Ok(inputs)
}

/// The text to send with so many media (in the order of [`MediaKind::ALL`]), or what is wrong with it.
pub(crate) fn text_for(prompt: usize, text: &str, media: [usize; 3]) -> Result<Cow<'_, str>, Error> {
    let refuse = |kind, problem| Err(Error::Media { prompt, kind, problem });
    let text_only = media == [0; 3];
    let mut places = [0; 3];
    let mut stripped = None;
    for found in Places::of(text) {
        match found {
            Found::Stray(kind, byte) => return refuse(kind, MediaProblem::StrayTokens { byte }),
            Found::Place(kind, block) => {
                places[kind as usize] += 1;
                if text_only && kind != MediaKind::Audio {
                    stripped.get_or_insert_with(|| Stripped::new(text)).take_out(block);
                }
            }
        }
    }
    for ((kind, media), blocks) in MediaKind::ALL.into_iter().zip(media).zip(places) {
        let is_stripped = text_only && kind != MediaKind::Audio;
        if media != blocks && !is_stripped {
            return refuse(kind, MediaProblem::Placeholders { media, blocks });
        }
    }
    match stripped.map(Stripped::finish) {
        None => Ok(Cow::Borrowed(text)),
        Some((text, None)) => Ok(Cow::Owned(text)),
        Some((_, Some(Found::Place(kind, Range { start: byte, .. }) | Found::Stray(kind, byte)))) => {
            refuse(kind, MediaProblem::StrayTokens { byte })
        }
    }
}
