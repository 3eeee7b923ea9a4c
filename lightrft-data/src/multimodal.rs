//! Images and videos to the prompts they belong to, for engines that take both together.
//!
//! A batch brings its media as one list for all prompts, in either of two forms, and the number that belongs to each
//! prompt. LightRFT guesses the form per prompt and carries on when the numbers do not fit, so images drift to other
//! prompts or vanish with their placeholders. [`Mode::Strict`] settles the form for the whole batch and refuses what
//! does not fit; [`Mode::LightRft`] gives what LightRFT gives.

use std::fmt;

use crate::Error;
use crate::placeholders::{self, Placeholders};

/// One entry of a list of media. `M` is whatever stands for an image or a video: a path, bytes, a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Media<M> {
    /// Nothing, Python's `None`.
    Missing,
    /// One image or video: an entry of the flat form.
    One(M),
    /// The media of one prompt: an entry of the nested form.
    Group(Vec<Media<M>>),
}

/// The media of one kind that come with a batch of prompts.
#[derive(Clone, Copy, Debug)]
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

/// What happens where media and prompts do not fit together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// An error that names the prompt.
    #[default]
    Strict,
    /// What LightRFT does, for runs that must equal it.
    LightRft,
}

/// A prompt with its media, as an engine takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MultimodalInput<M> {
    /// The text. Without any media its vision blocks have been taken out.
    pub prompt: String,
    /// Images in the order of their placeholders; in strict mode each is [`Media::One`].
    pub images: Vec<Media<M>>,
    /// Videos, likewise.
    pub videos: Vec<Media<M>>,
}

/// Images or videos.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MediaKind {
    /// Images.
    Image,
    /// Videos.
    Video,
}

impl fmt::Display for MediaKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MediaKind::Image => "images",
            MediaKind::Video => "videos",
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
        /// Vision blocks of this kind in its text.
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
pub fn is_multimodal<M>(images: &MediaColumn<'_, M>, videos: &MediaColumn<'_, M>) -> bool {
    [images, videos]
        .into_iter()
        .filter_map(|column| column.entries)
        .flatten()
        .any(|entry| !matches!(entry, Media::Missing))
}

/// Gives every prompt its media.
///
/// In strict mode a prompt with media keeps its text and has exactly one vision block
/// (`<|vision_start|><|image_pad|>...<|vision_end|>`, Qwen2-VL's) for each of them; a prompt without any loses its
/// blocks, for the engine would look for media behind them.
///
/// ```
/// use lightrft_data::{Media, MediaColumn, Mode, build_multimodal_inputs};
///
/// let prompts = ["<|vision_start|><|image_pad|><|vision_end|>What is it?".to_owned(), "Hello".to_owned()];
/// let cats = [Media::One("cat.png")];
/// let images = MediaColumn { entries: Some(&cats), counts: Some(&[Some(1), Some(0)]) };
///
/// let inputs = build_multimodal_inputs(&prompts, images, MediaColumn::ABSENT, Mode::Strict)?;
/// assert_eq!(inputs[0].images, [Media::One("cat.png")]);
/// assert!(inputs[1].images.is_empty());
/// # Ok::<_, lightrft_data::Error>(())
/// ```
///
/// # Errors
/// [`Error::Media`] with the prompt. In [`Mode::LightRft`] only for counts that are missing, where LightRFT raises
/// `IndexError` or `TypeError`.
pub fn build_multimodal_inputs<M: Clone>(
    prompts: &[String],
    images: MediaColumn<'_, M>,
    videos: MediaColumn<'_, M>,
    mode: Mode,
) -> Result<Vec<MultimodalInput<M>>, Error> {
    let deal = |kind, column| match mode {
        Mode::Strict => deal_strictly(kind, column, prompts.len()),
        Mode::LightRft => deal_as_lightrft(kind, column, prompts.len()),
    };
    // LightRFT looks at both kinds of one prompt before the next prompt; which error comes first is all that differs.
    let images = deal(MediaKind::Image, images)?;
    let videos = deal(MediaKind::Video, videos)?;
    let mut inputs = Vec::with_capacity(prompts.len());
    for (place, ((text, images), videos)) in prompts.iter().zip(images).zip(videos).enumerate() {
        let prompt = match mode {
            Mode::LightRft if images.is_empty() && videos.is_empty() => {
                placeholders::strip_in_two_passes(text)
            }
            Mode::LightRft => text.clone(),
            Mode::Strict => check_text(place, text, images.len(), videos.len())?,
        };
        inputs.push(MultimodalInput { prompt, images, videos });
    }
    Ok(inputs)
}

/// The text to send with so many media, or what is wrong with it.
fn check_text(prompt: usize, text: &str, images: usize, videos: usize) -> Result<String, Error> {
    let found = Placeholders::find(text);
    if let Some((byte, kind)) = found.stray {
        return Err(Error::Media { prompt, kind, problem: MediaProblem::StrayTokens { byte } });
    }
    if images == 0 && videos == 0 {
        if found.first().is_none() {
            return Ok(text.to_owned());
        }
        let stripped = found.without_blocks(text);
        // Taking a block out of the middle of a word can spell a token.
        if let Some((byte, kind)) = Placeholders::find(&stripped).first() {
            return Err(Error::Media { prompt, kind, problem: MediaProblem::StrayTokens { byte } });
        }
        return Ok(stripped);
    }
    for (kind, media) in [(MediaKind::Image, images), (MediaKind::Video, videos)] {
        let blocks = found.count(kind);
        if media != blocks {
            return Err(Error::Media { prompt, kind, problem: MediaProblem::Placeholders { media, blocks } });
        }
    }
    Ok(text.to_owned())
}

/// Strict: one form for the whole batch, and everything given is used exactly once.
fn deal_strictly<M: Clone>(
    kind: MediaKind,
    column: MediaColumn<'_, M>,
    prompts: usize,
) -> Result<Vec<Vec<Media<M>>>, Error> {
    let problem = |prompt, problem| Error::Media { prompt, kind, problem };
    let last = prompts.saturating_sub(1);
    let entries = column.entries.unwrap_or_default();
    let Some(counts) = column.counts else {
        return match entries.iter().position(|entry| !matches!(entry, Media::Missing)) {
            None => Ok((0..prompts).map(|_| Vec::new()).collect()),
            // Flat or nested, the entry's own number is the nearest there is to a prompt's.
            Some(entry) => Err(problem(entry.min(last), MediaProblem::NoCounts { entries: entries.len() })),
        };
    };
    if counts.len() != prompts {
        let shorter = counts.len().min(last);
        return Err(problem(shorter, MediaProblem::CountsLength { counts: counts.len(), prompts }));
    }
    let mut wanted = Vec::with_capacity(prompts);
    for (prompt, count) in counts.iter().enumerate() {
        let count = count.ok_or_else(|| problem(prompt, MediaProblem::MissingCount))?;
        // A count that no usize holds cannot be met either; the list is looked at next.
        let width =
            usize::try_from(count).map_err(|_| problem(prompt, MediaProblem::NegativeCount { count }))?;
        wanted.push((width, count));
    }

    let first_group = entries.iter().position(|entry| matches!(entry, Media::Group(_)));
    let first_one = entries.iter().position(|entry| matches!(entry, Media::One(_)));
    if let (Some(group), Some(one)) = (first_group, first_one) {
        let (entry, found) = if group > one { (group, "a group") } else { (one, "a single medium") };
        return Err(problem(entry.min(last), MediaProblem::MixedForms { entry, found }));
    }
    // Without a single medium, one `Missing` a prompt is how a batch says that there is none.
    let nested = first_group.is_some() || (first_one.is_none() && entries.len() == prompts);
    if nested && entries.len() != prompts {
        let shorter = entries.len().min(last);
        return Err(problem(shorter, MediaProblem::GroupsLength { groups: entries.len(), prompts }));
    }

    let mut dealt = Vec::with_capacity(prompts);
    let mut rest = entries;
    for (prompt, &(width, count)) in wanted.iter().enumerate() {
        let mine = if nested {
            match entries.get(prompt) {
                Some(Media::Group(group)) => group.as_slice(),
                _ => &[],
            }
        } else {
            let (mine, after) = rest.split_at(width.min(rest.len()));
            rest = after;
            mine
        };
        if mine.len() != width {
            return Err(problem(prompt, MediaProblem::WrongCount { count, found: mine.len() }));
        }
        for (place, medium) in mine.iter().enumerate() {
            match medium {
                Media::One(_) => {}
                Media::Missing => return Err(problem(prompt, MediaProblem::Missing { place, count: width })),
                Media::Group(_) => return Err(problem(prompt, MediaProblem::Nested { place })),
            }
        }
        dealt.push(mine.to_vec());
    }
    if !nested && !rest.is_empty() {
        let (left, entries) = (rest.len(), entries.len());
        return Err(problem(last, MediaProblem::LeftOver { left, entries }));
    }
    Ok(dealt)
}

/// LightRFT: the form is guessed for each prompt, and slices are cut as Python cuts them.
fn deal_as_lightrft<M: Clone>(
    kind: MediaKind,
    column: MediaColumn<'_, M>,
    prompts: usize,
) -> Result<Vec<Vec<Media<M>>>, Error> {
    let mut dealt = Vec::with_capacity(prompts);
    let mut start = 0i64;
    for prompt in 0..prompts {
        let problem = |problem| Error::Media { prompt, kind, problem };
        let count = match column.counts {
            None => 0,
            Some(counts) => {
                let too_short = MediaProblem::CountsLength { counts: counts.len(), prompts };
                let count = counts.get(prompt).ok_or_else(|| problem(too_short))?;
                count.ok_or_else(|| problem(MediaProblem::MissingCount))?
            }
        };
        let entries = column.entries.unwrap_or_default();
        let mine = match entries.get(prompt) {
            Some(Media::Group(group)) if usize::try_from(count) == Ok(group.len()) => group.as_slice(),
            _ => python_slice(entries, start, start.saturating_add(count)),
        };
        start = start.saturating_add(count);
        // A leading `None` makes LightRFT take the whole group for absent; a later one it does not see.
        let absent = matches!(mine.first(), None | Some(Media::Missing));
        dealt.push(if absent { Vec::new() } else { mine.to_vec() });
    }
    Ok(dealt)
}

/// `list[start:stop]`: negative bounds count from the end, and both are cut to the list.
fn python_slice<T>(list: &[T], start: i64, stop: i64) -> &[T] {
    let bound = |index: i64| {
        let from_end = usize::try_from(index.unsigned_abs()).unwrap_or(usize::MAX);
        if index < 0 { list.len().saturating_sub(from_end) } else { from_end.min(list.len()) }
    };
    list.get(bound(start)..bound(stop)).unwrap_or_default()
}
