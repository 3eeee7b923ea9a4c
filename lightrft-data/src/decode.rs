//! Images and videos to pixels, and sounds to their bytes, one at a time, and only within limits that are checked before
//! anything is decoded.

use std::borrow::Cow;
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fmt, thread};

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use crate::Error;
use crate::jpeg;
use crate::media::{Audio, MediaSource, MediumProblem, Pixels, shorten};
use crate::media_bytes;

/// Which files may be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PathPolicy {
    /// Any that the process may read; relative paths begin at its working folder. For data sets that are trusted.
    #[default]
    Anywhere,
    /// Those under this folder, where relative paths begin. `..` is refused, and so is a path or a symbolic link that
    /// leads out. A link that someone changes between check and opening is not seen.
    Under(PathBuf),
}

/// What a [`MediaDecoder`] accepts, and how many threads it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeConfig {
    /// Most encoded bytes of one image, frame or sound.
    pub max_bytes: usize,
    /// Most pixels of one image or frame, by its header.
    pub max_pixels: u64,
    /// Most pixels of all frames of a video.
    pub max_video_pixels: u64,
    /// Most pixels of all media of a batch together, which [`MediaDecoder::decode`] holds at 3 bytes each. They are
    /// counted by each header, before it is decoded.
    pub max_batch_pixels: u64,
    /// Most images, frames and sounds of one prompt; they are counted before anything is opened.
    pub max_media: usize,
    /// Which files may be read.
    pub paths: PathPolicy,
    /// Threads that decode, the caller's among them; each holds one image beside the results.
    pub threads: usize,
}

impl Default for DecodeConfig {
    /// 32 MiB encoded, Pillow's 89,478,485 pixels an image, four times that a video, 2^30 (3 GiB) a batch, 4,096 images,
    /// frames and sounds a prompt, any path, as many threads as there are processors but at most 8.
    fn default() -> Self {
        let max_pixels = 89_478_485;
        let threads = thread::available_parallelism().map_or(1, |n| n.get().min(8));
        Self {
            max_bytes: 32 << 20,
            max_pixels,
            max_video_pixels: 4 * max_pixels,
            max_batch_pixels: 1 << 30,
            max_media: 4096,
            paths: PathPolicy::default(),
            threads,
        }
    }
}

/// Where the bytes of an `http(s)` address come from.
///
/// # Contract
/// - `fetch` ends within a time of the implementer's choice.
/// - It reads no more than about `max_bytes`; longer content is [`MediumProblem::TooManyBytes`].
/// - Addresses come from data sets: an implementation decides which hosts may be reached.
pub trait Fetch: fmt::Debug + Send + Sync {
    /// The bytes at this address.
    ///
    /// # Errors
    /// [`MediumProblem::Fetch`] or [`MediumProblem::TooManyBytes`].
    fn fetch(&self, url: &str, max_bytes: usize) -> Result<Vec<u8>, MediumProblem>;
}

/// Decodes images (PNG, JPEG, WebP) and videos given as frames to 8-bit RGB, as Pillow's `convert("RGB")` does: alpha is
/// dropped, grey is tripled, of an animation the first picture is taken, and a rotation
/// that metadata ask for is not done. Values of 16 bits are scaled to 8 (Pillow does so for colours, but cuts 16-bit grey
/// off at 255). A file that is cut short is an error; its end is
/// never made up. Damage inside is an error where the format shows it: PNG has checksums, JPEG's scans have none. Sounds are
/// read within the same limits and handed on as they are.
///
/// ```
/// use lightrft_data::{DecodeConfig, Media, MediaDecoder, MediaSource, MultimodalInput};
///
/// let dot = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC";
/// let input = MultimodalInput {
///     prompt: "<|vision_start|><|image_pad|><|vision_end|>Which colour?".into(),
///     images: vec![Media::One(MediaSource::parse(dot)?)].into(),
///     videos: vec![].into(),
///     audios: vec![].into(),
/// };
/// let decoded = MediaDecoder::new(DecodeConfig::default())?.decode(&[input])?;
/// let pixels = &decoded[0].images[0];
/// assert_eq!((pixels.height(), pixels.width(), pixels.rgb()), (1, 1, &[255, 0, 0][..]));
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct MediaDecoder {
    pub(crate) config: DecodeConfig,
    fetch: Option<Arc<dyn Fetch>>,
}

impl MediaDecoder {
    /// A decoder of files, data URLs, bytes and tensors; addresses are refused.
    ///
    /// # Errors
    /// [`Error::Setting`] for 0 threads or a limit of 0.
    pub fn new(config: DecodeConfig) -> Result<Self, Error> {
        let limits = [
            ("max_bytes", config.max_bytes as u64),
            ("max_pixels", config.max_pixels),
            ("max_video_pixels", config.max_video_pixels),
            ("max_batch_pixels", config.max_batch_pixels),
            ("max_media", config.max_media as u64),
            ("threads", config.threads as u64),
        ];
        match limits.into_iter().find(|(_, value)| *value == 0) {
            Some((setting, _)) => Err(Error::Setting { setting, value: 0, expected: "at least 1" }),
            None => Ok(Self { config, fetch: None }),
        }
    }

    /// Lets addresses be read, through `fetch`.
    #[must_use]
    pub fn with_fetch(self, fetch: impl Fetch + 'static) -> Self {
        Self { fetch: Some(Arc::new(fetch)), ..self }
    }

    /// Decodes one image.
    ///
    /// # Errors
    /// [`MediumProblem`], [`MediumProblem::NotAnImage`] for frames.
    pub fn image(&self, source: &MediaSource) -> Result<Pixels, MediumProblem> {
        self.image_within(source, &Budget::new(u64::MAX))
    }

    pub(crate) fn image_within(
        &self,
        source: &MediaSource,
        budget: &Budget,
    ) -> Result<Pixels, MediumProblem> {
        match source {
            MediaSource::Frames(frames) => Err(MediumProblem::NotAnImage { frames: frames.len() }),
            MediaSource::Pixels(pixels) => match pixels.frames() {
                1 => self.checked(pixels, budget),
                frames => Err(MediumProblem::NotAnImage { frames }),
            },
            MediaSource::Audio(_) => Err(MediumProblem::NotPixels),
            encoded => self.decode_bytes(&self.bytes(encoded, "image/")?, budget),
        }
    }

    /// Decodes the frames of a video, or takes a tensor of them.
    ///
    /// # Errors
    /// [`MediumProblem`], inside [`MediumProblem::Frame`] where one frame is at fault.
    pub fn video(&self, source: &MediaSource) -> Result<Pixels, MediumProblem> {
        self.video_within(source, &Budget::new(u64::MAX))
    }

    pub(crate) fn video_within(
        &self,
        source: &MediaSource,
        budget: &Budget,
    ) -> Result<Pixels, MediumProblem> {
        let frames = match source {
            MediaSource::Frames(frames) => frames,
            MediaSource::Pixels(pixels) => return self.checked(pixels, budget),
            MediaSource::Audio(_) => return Err(MediumProblem::NotPixels),
            _ => return Err(MediumProblem::NotAVideo),
        };
        let mut rgb = Vec::new();
        let mut size = None;
        for (frame, source) in frames.iter().enumerate() {
            let pixels = self
                .image_within(source, budget)
                .map_err(|problem| MediumProblem::Frame { frame, problem: Box::new(problem) })?;
            let (height, width) = (pixels.height(), pixels.width());
            let (expected_height, expected_width) = *size.get_or_insert((height, width));
            if (height, width) != (expected_height, expected_width) {
                return Err(MediumProblem::FrameSize {
                    frame,
                    height,
                    width,
                    expected_height,
                    expected_width,
                });
            }
            if frame == 0 {
                // The first frame says how large all of them are together.
                self.check(frames.len(), height, width)?;
                rgb.reserve_exact(pixels.rgb().len() * frames.len());
            }
            rgb.extend_from_slice(pixels.rgb());
        }
        let (height, width) = size.ok_or(MediumProblem::Empty)?;
        Pixels::new(frames.len(), height, width, rgb)
    }

    /// Reads a sound. A file is handed on whole, and says its rate itself.
    ///
    /// # Errors
    /// [`MediumProblem`], [`MediumProblem::NotAudio`] for frames and tensors.
    pub fn audio(&self, source: &MediaSource) -> Result<Audio, MediumProblem> {
        let limit = self.config.max_bytes;
        match source {
            MediaSource::Frames(_) | MediaSource::Pixels(_) => Err(MediumProblem::NotAudio),
            MediaSource::Audio(audio) if audio.bytes().len() > limit => {
                Err(MediumProblem::TooManyBytes { limit })
            }
            MediaSource::Audio(audio) => Ok(audio.clone()),
            MediaSource::Bytes(bytes) if bytes.len() <= limit => Audio::of_file(Arc::clone(bytes)),
            encoded => Audio::of_file(self.bytes(encoded, "audio/")?.into_owned()),
        }
    }

    /// Frames, height and width of an image or a video, from the header of its first image: what
    /// [`VisionTokens`](crate::VisionTokens) needs, without decoding. The file is read, or the address fetched, whole, and
    /// again when it is decoded; where that is slow, decode first and take the size of the [`Pixels`].
    ///
    /// # Errors
    /// [`MediumProblem`].
    pub fn size(&self, source: &MediaSource) -> Result<(usize, u32, u32), MediumProblem> {
        let (frames, height, width) = match source {
            MediaSource::Frames(frames) => {
                let first = frames.first().ok_or(MediumProblem::Empty)?;
                match self.size_of_first(first)? {
                    (1, height, width) => (frames.len(), height, width),
                    (frames, ..) => return Err(MediumProblem::NotAnImage { frames }),
                }
            }
            one => self.size_of_first(one)?,
        };
        self.check(frames, height, width)?;
        Ok((frames, height, width))
    }

    fn size_of_first(&self, source: &MediaSource) -> Result<(usize, u32, u32), MediumProblem> {
        match source {
            MediaSource::Frames(frames) => Err(MediumProblem::NotAnImage { frames: frames.len() }),
            MediaSource::Pixels(pixels) => Ok((pixels.frames(), pixels.height(), pixels.width())),
            MediaSource::Audio(_) => Err(MediumProblem::NotPixels),
            encoded => guarded(|| {
                let bytes = self.bytes(encoded, "image/")?;
                let (width, height) = self.decoder(&bytes)?.dimensions();
                Ok((1, height, width))
            }),
        }
    }

    /// The encoded bytes; a data URL must be of this type (`image/`, `audio/`).
    fn bytes<'a>(&self, source: &'a MediaSource, kind: &'static str) -> Result<Cow<'a, [u8]>, MediumProblem> {
        let limit = self.config.max_bytes;
        let bytes: Cow<'a, [u8]> = match source {
            MediaSource::Path(path) => media_bytes::read(path, &self.config.paths, limit)?.into(),
            MediaSource::DataUrl(url) => media_bytes::from_data_url(url, kind, limit)?.into(),
            MediaSource::Bytes(bytes) => bytes.as_ref().into(),
            MediaSource::Url(url) => match &self.fetch {
                Some(fetch) => fetch.fetch(url, limit)?.into(),
                None => return Err(MediumProblem::UrlsAreOff { url: shorten(url) }),
            },
            // The caller has taken these apart.
            MediaSource::Frames(_) | MediaSource::Pixels(_) => return Err(MediumProblem::NotAVideo),
            MediaSource::Audio(_) => return Err(MediumProblem::NotPixels),
        };
        match bytes.len() {
            0 => Err(MediumProblem::Empty),
            len if len > limit => Err(MediumProblem::TooManyBytes { limit }),
            _ => Ok(bytes),
        }
    }

    fn check(&self, frames: usize, height: u32, width: u32) -> Result<(), MediumProblem> {
        let area = u64::from(height) * u64::from(width);
        let (max, max_video) = (self.config.max_pixels, self.config.max_video_pixels);
        if area > max {
            return Err(MediumProblem::TooManyPixels { frames: 1, height, width, limit: max });
        }
        if frames > 1 && area.checked_mul(frames as u64).is_none_or(|all| all > max_video) {
            return Err(MediumProblem::TooManyPixels { frames, height, width, limit: max_video });
        }
        Ok(())
    }

    /// Pixels that are decoded already, if they are allowed.
    fn checked(&self, pixels: &Pixels, budget: &Budget) -> Result<Pixels, MediumProblem> {
        let (frames, height, width) = (pixels.frames(), pixels.height(), pixels.width());
        self.check(frames, height, width)?;
        budget.take(frames, height, width)?;
        Ok(pixels.clone())
    }

    /// A decoder that has read the header, of a size that is allowed.
    fn decoder<'a>(&self, bytes: &'a [u8]) -> Result<impl ImageDecoder + 'a, MediumProblem> {
        let broken = |e: image::ImageError| MediumProblem::Broken { message: e.to_string() };
        let format = image::guess_format(bytes)
            .ok()
            .filter(|format| matches!(format, ImageFormat::Png | ImageFormat::Jpeg | ImageFormat::WebP));
        let format = format
            .ok_or_else(|| MediumProblem::Format { begins: bytes.iter().copied().take(12).collect() })?;
        let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
        let mut limits = image::Limits::no_limits();
        // Four 16-bit values a pixel, and as much again for what a decoder holds meanwhile.
        limits.max_alloc = Some(self.config.max_pixels.saturating_mul(16).saturating_add(1 << 20));
        reader.limits(limits);
        let decoder = reader.into_decoder().map_err(broken)?;
        let (width, height) = decoder.dimensions();
        self.check(1, height, width)?;
        Ok(decoder)
    }

    fn decode_bytes(&self, bytes: &[u8], budget: &Budget) -> Result<Pixels, MediumProblem> {
        guarded(|| {
            let decoder = self.decoder(bytes)?;
            let (width, height) = decoder.dimensions();
            budget.take(1, height, width)?;
            match image::guess_format(bytes) {
                Ok(ImageFormat::Jpeg) => return jpeg::decode(bytes),
                Ok(ImageFormat::WebP) if !is_whole_webp(bytes) => {
                    let message = "WebP: the file is shorter than it says".to_owned();
                    return Err(MediumProblem::Broken { message });
                }
                _ => {}
            }
            let image = DynamicImage::from_decoder(decoder)
                .map_err(|e| MediumProblem::Broken { message: e.to_string() })?
                .into_rgb8();
            let (width, height) = image.dimensions();
            Pixels::new(1, height, width, image.into_raw())
        })
    }
}

/// Whether a WebP file is as long as its RIFF header says, which libwebp asks for and the decoder here does not.
fn is_whole_webp(bytes: &[u8]) -> bool {
    let said = bytes.get(4..8).and_then(|said| said.try_into().ok()).map_or(0, u32::from_le_bytes);
    bytes.len() as u64 >= u64::from(said) + 8
}

/// The pixels that a batch may still have. Threads take from it before they decode.
pub(crate) struct Budget {
    left: AtomicU64,
    limit: u64,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Self {
        Self { left: AtomicU64::new(limit), limit }
    }

    fn take(&self, frames: usize, height: u32, width: u32) -> Result<(), MediumProblem> {
        let limit = self.limit;
        let wanted = (u64::from(height) * u64::from(width)).checked_mul(frames as u64);
        let left = |left: u64| left.checked_sub(wanted?);
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, left) {
            Ok(_) => Ok(()),
            Err(_) => Err(MediumProblem::TooManyPixelsInBatch { limit }),
        }
    }
}

/// The decoders read what strangers wrote, and fetching is the caller's code; should one have a defect, an image is lost
/// and not the run.
pub(crate) fn guarded<T>(decode: impl FnOnce() -> Result<T, MediumProblem>) -> Result<T, MediumProblem> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|panic| {
        let message = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
            (Some(text), _) => (*text).to_owned(),
            (_, Some(text)) => text.clone(),
            _ => "no message".to_owned(),
        };
        Err(MediumProblem::Panicked { message })
    })
}
