//! How many tokens an image or a video takes in a prompt, by the rules of Qwen2-VL's processors.
//!
//! An image is resized so that both sides are multiples of `patch * merge` and its area lies within bounds; each patch
//! of the resized image is one vector, and `merge * merge` of them become one token. The rules are those of
//! transformers' `Qwen2VLImageProcessor` and `Qwen2VLVideoProcessor` (`smart_resize`, `patchify`), which Qwen2.5-VL
//! uses as well; the recorded values come from transformers 5.19. (From 5.22 on it is to share a budget of pixels among
//! the frames of a long video, its `cap_pixels_per_frame`; a smaller [`PixelBounds::max`] says the same by hand.)

use serde_json::Value;

use crate::Error;
use crate::media::MediumProblem;
use crate::multimodal::{MediaKind, MediaProblem};
use crate::placeholders::{Found, Places, pad_of, pads_of};

/// Bounds on the pixels of one image, or of one frame, after resizing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PixelBounds {
    /// Fewer are enlarged to this many.
    pub min: u64,
    /// More are reduced to this many.
    pub max: u64,
}

/// The settings of a vision processor that decide how many tokens its media take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VisionTokens {
    /// Side of a patch in pixels (`patch_size`).
    pub patch: u32,
    /// Frames that make one patch in time (`temporal_patch_size`).
    pub temporal_patch: u32,
    /// Patches on each side of the square that becomes one token (`merge_size`).
    pub merge: u32,
    /// Bounds for images (`size` of the image processor).
    pub image: PixelBounds,
    /// Bounds for each frame of a video (`size` of the video processor).
    pub video: PixelBounds,
}

impl VisionTokens {
    /// The defaults of Qwen2-VL's classes in transformers 5.19: patches of 14, merged 2 x 2, two frames each; images of 4 to
    /// 1,280 tokens, frames of 128 to 768.
    ///
    /// Published checkpoints set bounds of their own (`Qwen/Qwen2-VL-*-Instruct`: 3,136 to 12,845,056 pixels for images and
    /// frames), with which large media take many times more tokens: read them with
    /// [`from_preprocessor_config`](Self::from_preprocessor_config).
    pub const QWEN2_VL: Self = Self {
        patch: 14,
        temporal_patch: 2,
        merge: 2,
        image: PixelBounds { min: 56 * 56, max: 28 * 28 * 1280 },
        video: PixelBounds { min: 128 * 28 * 28, max: 28 * 28 * 768 },
    };

    /// Reads a checkpoint's `preprocessor_config.json` and, where it has one, its `video_preprocessor_config.json`; without
    /// the second, videos go by the first, as in transformers. Bounds are `min_pixels` and `max_pixels`, else
    /// `size.shortest_edge` and `size.longest_edge`. What a file leaves open is as in [`QWEN2_VL`](Self::QWEN2_VL).
    ///
    /// ```
    /// use lightrft_data::{PixelBounds, VisionTokens};
    ///
    /// let vision = VisionTokens::from_preprocessor_config(r#"{"min_pixels": 3136, "max_pixels": 12845056}"#, None)?;
    /// assert_eq!(vision.image, PixelBounds { min: 3136, max: 12_845_056 });
    /// # Ok::<_, lightrft_data::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Other`] where a text is no JSON object, or a value is no whole number from 1 on that fits; where patches of
    /// videos and of images differ, which this type cannot say.
    pub fn from_preprocessor_config(json: &str, video_json: Option<&str>) -> Result<Self, Error> {
        let default = Self::QWEN2_VL;
        let read = |json: &str, bounds: PixelBounds| {
            let config: Value = serde_json::from_str(json)
                .map_err(|e| Error::other(format!("preprocessor configuration: {e}")))?;
            if !config.is_object() {
                return Err(Error::other("preprocessor configuration: an object is expected"));
            }
            let side = |key: &str, or: u32| -> Result<u32, Error> {
                let value = positive(config.get(key), key)?.unwrap_or(or.into());
                u32::try_from(value).map_err(|_| not_positive(key))
            };
            let pixels = |key: &str, edge: &str, or: u64| -> Result<u64, Error> {
                let of_size = positive(config.get("size").and_then(|size| size.get(edge)), edge)?;
                Ok(positive(config.get(key), key)?.or(of_size).unwrap_or(or))
            };
            let bounds = PixelBounds {
                min: pixels("min_pixels", "shortest_edge", bounds.min)?,
                max: pixels("max_pixels", "longest_edge", bounds.max)?,
            };
            let patch = side("patch_size", default.patch)?;
            let temporal_patch = side("temporal_patch_size", default.temporal_patch)?;
            Ok((bounds, (patch, temporal_patch, side("merge_size", default.merge)?)))
        };
        let (image, patches) = read(json, default.image)?;
        let (video, of_video) = read(video_json.unwrap_or(json), default.video)?;
        if patches != of_video {
            return Err(Error::other(
                "preprocessor configuration: patch_size, temporal_patch_size or merge_size of images and videos differ",
            ));
        }
        let (patch, temporal_patch, merge) = patches;
        Ok(Self { patch, temporal_patch, merge, image, video })
    }

    /// The grid of an image of this size, in pixels.
    ///
    /// # Errors
    /// Those of [`smart_resize`].
    pub fn image_grid(&self, height: u32, width: u32) -> Result<Grid, MediumProblem> {
        self.grid(1, height, width, self.image)
    }

    /// The grid of a video. A number of frames that is no multiple of `temporal_patch` is filled up with copies of
    /// the last.
    ///
    /// # Errors
    /// [`MediumProblem::Empty`] without frames, and those of [`smart_resize`].
    pub fn video_grid(&self, frames: usize, height: u32, width: u32) -> Result<Grid, MediumProblem> {
        let patches = (frames as u64).div_ceil(u64::from(self.temporal_patch.max(1)));
        if patches == 0 {
            return Err(MediumProblem::Empty);
        }
        self.grid(patches, height, width, self.video)
    }

    fn grid(&self, t: u64, height: u32, width: u32, bounds: PixelBounds) -> Result<Grid, MediumProblem> {
        let factor = self.patch.saturating_mul(self.merge);
        let (height, width) = smart_resize(height, width, factor, bounds)?;
        let patch = u64::from(self.patch.max(1));
        Ok(Grid { t, h: height / patch, w: width / patch })
    }

    /// Tokens that a medium with this grid takes in the prompt.
    pub fn tokens(&self, grid: Grid) -> u64 {
        let merged = u64::from(self.merge).pow(2).max(1);
        grid.t.saturating_mul(grid.h).saturating_mul(grid.w) / merged
    }

    /// Repeats the pad in each vision block as often as its medium has tokens, as the processor does before it
    /// tokenizes. Engines do that themselves; training needs it. A block that has the right number of pads already
    /// stays as it is.
    ///
    /// `prompt` is the prompt's place in the batch, for the error. Audio tokens stay as they are.
    ///
    /// ```
    /// use lightrft_data::VisionTokens;
    ///
    /// let vision = VisionTokens::QWEN2_VL;
    /// let grid = vision.image_grid(84, 112)?; // 3 x 4 tokens
    /// let text = "<|vision_start|><|image_pad|><|vision_end|>What is it?";
    /// let expanded = vision.expand(0, text, &[grid], &[])?;
    /// assert_eq!(expanded.matches("<|image_pad|>").count(), 12);
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Media`] where the blocks of the text are not as many as the grids, where one has another number of
    /// pads than 1 or the right one, or where there are vision tokens outside of a block.
    pub fn expand(
        &self,
        prompt: usize,
        text: &str,
        images: &[Grid],
        videos: &[Grid],
    ) -> Result<String, Error> {
        let problem = |kind, problem| Error::Media { prompt, kind, problem };
        let mut blocks = Vec::new();
        for found in Places::of(text) {
            match found {
                Found::Place(MediaKind::Audio, _) => {}
                Found::Place(kind, block) => blocks.push((kind, block)),
                Found::Stray(kind, byte) => return Err(problem(kind, MediaProblem::StrayTokens { byte })),
            }
        }
        for (kind, grids) in [(MediaKind::Image, images), (MediaKind::Video, videos)] {
            let of_kind = blocks.iter().filter(|(of, _)| *of == kind).count();
            if grids.len() != of_kind {
                let (media, blocks) = (grids.len(), of_kind);
                return Err(problem(kind, MediaProblem::Placeholders { media, blocks }));
            }
        }
        let mut expanded = String::new();
        let mut from = 0;
        let (mut next_image, mut next_video) = (images.iter().enumerate(), videos.iter().enumerate());
        for (kind, block) in blocks {
            let pads = pads_of(&block);
            let next = if kind == MediaKind::Video { next_video.next() } else { next_image.next() };
            let Some((place, &grid)) = next else { break }; // as many blocks as grids, by the check above
            let (tokens, there) = (self.tokens(grid), pads.len() / pad_of(kind).len());
            if there != 1 && there as u64 != tokens {
                return Err(problem(kind, MediaProblem::PadCount { place, pads: there, tokens }));
            }
            let repeat = usize::try_from(tokens).ok().filter(|n| *n <= MOST_TOKENS);
            let repeat =
                repeat.ok_or_else(|| problem(kind, MediaProblem::TooManyTokens { place, tokens }))?;
            expanded.push_str(&text[from..pads.start]);
            for _ in 0..repeat {
                expanded.push_str(pad_of(kind));
            }
            from = pads.end;
        }
        expanded.push_str(&text[from..]);
        Ok(expanded)
    }
}

fn not_positive(key: &str) -> Error {
    Error::other(format!("preprocessor configuration: `{key}` must be a whole number from 1 on that fits"))
}

/// A number from 1 on, if there is one.
fn positive(value: Option<&Value>, key: &str) -> Result<Option<u64>, Error> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().filter(|value| *value > 0) {
            Some(value) => Ok(Some(value)),
            None => Err(not_positive(key)),
        },
    }
}

/// No context is longer; a grid that asks for more tokens was made up, and must not become gigabytes of text.
const MOST_TOKENS: usize = 1 << 24;

/// Patches of a medium along time, height and width (`image_grid_thw`, `video_grid_thw`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Along time; 1 for an image.
    pub t: u64,
    /// Along the height.
    pub h: u64,
    /// Along the width.
    pub w: u64,
}

/// The longest side may be this many times the shortest.
const MAX_ASPECT_RATIO: u32 = 200;

/// Height and width after resizing: multiples of `factor` (rounded half to even, as Python rounds), about the same
/// shape, and an area within bounds wherever multiples of `factor` allow it.
///
/// ```
/// use lightrft_data::{PixelBounds, smart_resize};
///
/// let bounds = PixelBounds { min: 56 * 56, max: 28 * 28 * 1280 };
/// assert_eq!(smart_resize(42, 70, 28, bounds)?, (56, 56)); // 1.5 and 2.5 both round to 2
/// # Ok::<_, lightrft_data::MediumProblem>(())
/// ```
///
/// # Errors
/// [`MediumProblem::Empty`] where a side, `factor` or a bound is 0; [`MediumProblem::AspectRatio`] beyond 200.
pub fn smart_resize(
    height: u32,
    width: u32,
    factor: u32,
    bounds: PixelBounds,
) -> Result<(u64, u64), MediumProblem> {
    if height == 0 || width == 0 || factor == 0 || bounds.min == 0 || bounds.max == 0 {
        return Err(MediumProblem::Empty);
    }
    let (long, short) = (height.max(width), height.min(width));
    if u64::from(long) > u64::from(short) * u64::from(MAX_ASPECT_RATIO) {
        return Err(MediumProblem::AspectRatio { height, width, limit: MAX_ASPECT_RATIO });
    }
    let (h, w, f) = (f64::from(height), f64::from(width), f64::from(factor));
    let area = h * w; // exact below 2^53
    // Each product and quotient is in Python's order, so that it rounds as Python's does.
    let nearest = |side: f64| (side / f).round_ties_even() as u64 * u64::from(factor);
    let sides = (nearest(h), nearest(w));
    let resized_area = u128::from(sides.0) * u128::from(sides.1);
    if resized_area > u128::from(bounds.max) {
        let beta = (area / bounds.max as f64).sqrt();
        let down = |side: f64| ((side / beta / f).floor() as u64 * u64::from(factor)).max(factor.into());
        Ok((down(h), down(w)))
    } else if resized_area < u128::from(bounds.min) {
        let beta = (bounds.min as f64 / area).sqrt();
        let up = |side: f64| (side * beta / f).ceil() as u64 * u64::from(factor);
        Ok((up(h), up(w)))
    } else {
        Ok(sides)
    }
}
