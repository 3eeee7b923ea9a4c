//! Where an image, a video or a sound comes from, and what its pixels are once it is decoded.

use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

/// Where an image, a video or a sound comes from; nothing is opened before it is decoded.
///
/// Cloning is cheap: payloads are shared.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum MediaSource {
    /// A file of one image or sound.
    Path(PathBuf),
    /// `data:image/png;base64,...` or `data:audio/...`, whole.
    DataUrl(Arc<str>),
    /// `http://...` or `https://...`.
    Url(Arc<str>),
    /// The bytes of an image or sound file.
    Bytes(Arc<[u8]>),
    /// Pixels that are decoded already: a tensor.
    Pixels(Pixels),
    /// The frames of a video, in order; each is one image.
    Frames(Vec<MediaSource>),
    /// A sound that is read already.
    Audio(Audio),
}

impl MediaSource {
    /// Reads a string: a data URL, an `http(s)` address, a `file://` address or a path.
    ///
    /// # Errors
    /// [`MediumProblem::Empty`] for an empty string, [`MediumProblem::Scheme`] for an address of another kind.
    pub fn parse(text: &str) -> Result<Self, MediumProblem> {
        let scheme = text.split_once(':').map(|(scheme, _)| scheme.to_ascii_lowercase());
        let authority = text.split_once("://").map(|(scheme, rest)| (scheme.to_ascii_lowercase(), rest));
        match (scheme.as_deref(), authority) {
            _ if text.is_empty() => Err(MediumProblem::Empty),
            (Some("data"), _) => Ok(MediaSource::DataUrl(text.into())),
            (_, Some((scheme, _))) if scheme == "http" || scheme == "https" => {
                Ok(MediaSource::Url(text.into()))
            }
            // Whatever follows is the path, as LightRFT takes it: no host, no percent signs.
            (_, Some((scheme, path))) if scheme == "file" => Ok(MediaSource::Path(path.into())),
            (_, Some((scheme, _))) => Err(MediumProblem::Scheme { scheme: shorten(&scheme) }),
            _ => Ok(MediaSource::Path(text.into())),
        }
    }

    /// Reads what a record holds for one image or sound: a string as in [`parse`](Self::parse), or an object with it under
    /// `bytes` (as a data URL), `image`, `audio`, `url`, `path`, `image_url` or `audio_url` (`{"url": ...}` inside of
    /// these), the first that is not null. A list is a video of such frames.
    ///
    /// # Errors
    /// [`MediumProblem::NotAMedium`] for anything else, and those of [`parse`](Self::parse).
    pub fn from_json(value: &Value) -> Result<Self, MediumProblem> {
        match value {
            Value::Array(frames) => {
                frames.iter().map(Self::one_from_json).collect::<Result<_, _>>().map(MediaSource::Frames)
            }
            one => Self::one_from_json(one),
        }
    }

    fn one_from_json(value: &Value) -> Result<Self, MediumProblem> {
        let found = crate::prompt::type_name(value);
        let inner = match value {
            Value::Object(fields) => ["bytes", "image", "audio", "url", "path", "image_url", "audio_url"]
                .iter()
                .find_map(|key| fields.get(*key).filter(|inner| !inner.is_null()))
                .map(|inner| inner.get("url").unwrap_or(inner)),
            other => Some(other),
        };
        match inner {
            Some(Value::String(text)) => Self::parse(text),
            _ => Err(MediumProblem::NotAMedium { found }),
        }
    }
}

impl MediaSource {
    /// A name for messages.
    #[cfg(feature = "images")]
    pub(crate) fn describe(&self) -> String {
        match self {
            MediaSource::Path(path) => path.display().to_string(),
            MediaSource::DataUrl(url) => format!("data URL of {} bytes", url.len()),
            MediaSource::Url(url) => shorten(url),
            MediaSource::Bytes(bytes) => format!("{} bytes", bytes.len()),
            MediaSource::Pixels(_) => "pixels".to_owned(),
            MediaSource::Frames(frames) => format!("{} frames", frames.len()),
            MediaSource::Audio(audio) => format!("sound of {} bytes", audio.bytes().len()),
        }
    }
}

impl fmt::Debug for MediaSource {
    /// Payloads by their length, long addresses by their beginning.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MediaSource::Path(path) => write!(f, "Path({path:?})"),
            MediaSource::DataUrl(url) => write!(f, "DataUrl({:?}, {} bytes)", shorten(url), url.len()),
            MediaSource::Url(url) => write!(f, "Url({:?})", shorten(url)),
            MediaSource::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
            MediaSource::Pixels(pixels) => pixels.fmt(f),
            MediaSource::Frames(frames) => f.debug_tuple("Frames").field(frames).finish(),
            MediaSource::Audio(audio) => audio.fmt(f),
        }
    }
}

/// The beginning of a text, for messages.
pub(crate) fn shorten(text: &str) -> String {
    const SHOWN: usize = 64;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// Decoded pixels: 8-bit RGB of shape `[frames, height, width, 3]`, rows from the top. An image has one frame.
#[derive(Clone, PartialEq, Eq)]
pub struct Pixels {
    frames: usize,
    height: u32,
    width: u32,
    /// Shared as the decoder made it: a slice in an `Arc` would be a copy of every image.
    rgb: Arc<Vec<u8>>,
}

impl Pixels {
    /// Wraps a tensor; a vector is not copied.
    ///
    /// # Errors
    /// [`MediumProblem::Shape`] where a side is 0 or `rgb` has another length than the shape says.
    pub fn new(
        frames: usize,
        height: u32,
        width: u32,
        rgb: impl Into<Vec<u8>>,
    ) -> Result<Self, MediumProblem> {
        let rgb: Vec<u8> = rgb.into();
        let expected = [height as usize, width as usize, 3]
            .into_iter()
            .try_fold(frames, usize::checked_mul)
            .filter(|&bytes| bytes > 0 && bytes == rgb.len());
        match expected {
            Some(_) => Ok(Self { frames, height, width, rgb: Arc::new(rgb) }),
            None => Err(MediumProblem::Shape { frames, height, width, bytes: rgb.len() }),
        }
    }

    /// Frames; 1 for an image.
    pub fn frames(&self) -> usize {
        self.frames
    }

    /// Rows.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Columns.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// The values, frame by frame and row by row.
    pub fn rgb(&self) -> &[u8] {
        &self.rgb
    }
}

impl fmt::Debug for Pixels {
    /// The shape only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pixels([{}, {}, {}, 3])", self.frames, self.height, self.width)
    }
}

/// A sound as an engine takes it: bytes that this crate does not look into, and their sample rate where the bytes do not say
/// it themselves.
#[derive(Clone, PartialEq, Eq)]
pub struct Audio {
    bytes: Arc<[u8]>,
    sample_rate: Option<NonZeroU32>,
}

impl Audio {
    /// Wraps samples, with how many of them there are a second.
    ///
    /// # Errors
    /// [`MediumProblem::Empty`] without bytes, [`MediumProblem::SampleRate`] for a rate of 0.
    pub fn new(bytes: impl Into<Arc<[u8]>>, sample_rate: u32) -> Result<Self, MediumProblem> {
        let sample_rate = NonZeroU32::new(sample_rate);
        let audio = Self { sample_rate, ..Self::of_file(bytes)? };
        if sample_rate.is_none() { Err(MediumProblem::SampleRate) } else { Ok(audio) }
    }

    /// Wraps the bytes of a file (WAV, FLAC, MP3), which says its rate itself.
    ///
    /// # Errors
    /// [`MediumProblem::Empty`] without bytes.
    pub fn of_file(bytes: impl Into<Arc<[u8]>>) -> Result<Self, MediumProblem> {
        let bytes = bytes.into();
        if bytes.is_empty() { Err(MediumProblem::Empty) } else { Ok(Self { bytes, sample_rate: None }) }
    }

    /// The bytes, as they came.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Samples a second, in Hz; `None` for a file, which says it itself.
    pub fn sample_rate(&self) -> Option<u32> {
        self.sample_rate.map(NonZeroU32::get)
    }
}

impl fmt::Debug for Audio {
    /// Length and rate.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.sample_rate {
            Some(rate) => write!(f, "Audio({} bytes, {rate} Hz)", self.bytes.len()),
            None => write!(f, "Audio({} bytes, a file)", self.bytes.len()),
        }
    }
}

/// Why one image, video or sound cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MediumProblem {
    /// Nothing is there: no bytes, an empty path, a video without frames.
    #[error("it is empty")]
    Empty,
    /// An address that is neither a file nor `http(s)` nor data.
    #[error(
        "addresses of the kind `{scheme}:` are not read; a path, file://, http(s):// or data: is expected"
    )]
    Scheme {
        /// What stands before the colon.
        scheme: String,
    },
    /// A record holds something else where an image should be.
    #[error(
        "expected a path, an address or an object with one under `image`, `audio`, `url` or `path`, found {found}"
    )]
    NotAMedium {
        /// The JSON type that stands there.
        found: &'static str,
    },
    /// A tensor whose length and shape disagree, or with a side of 0.
    #[error("{bytes} bytes are no tensor of shape [{frames}, {height}, {width}, 3]")]
    Shape {
        /// Frames that were said.
        frames: usize,
        /// Rows that were said.
        height: u32,
        /// Columns that were said.
        width: u32,
        /// Bytes that were given.
        bytes: usize,
    },
    /// Sound with 0 samples a second.
    #[error("a sample rate of 0 Hz")]
    SampleRate,
    /// The operating system refused to open or read a file.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A folder, a pipe or a device, which might never end.
    #[error("{} is not a regular file", path.display())]
    NotAFile {
        /// What was named.
        path: PathBuf,
    },
    /// A path that leads out of the folder that media are read from.
    #[error("{} leads out of {}", path.display(), root.display())]
    OutsideRoot {
        /// What was named.
        path: PathBuf,
        /// The folder that is allowed.
        root: PathBuf,
    },
    /// More encoded bytes than allowed; they were not read to the end.
    #[error("more than {limit} bytes")]
    TooManyBytes {
        /// The limit that was set.
        limit: usize,
    },
    /// More pixels than allowed, by what the file says of itself; nothing was decoded.
    #[error("{frames} x {height} x {width} pixels (frames x height x width) are more than {limit}")]
    TooManyPixels {
        /// Frames.
        frames: usize,
        /// Rows.
        height: u32,
        /// Columns.
        width: u32,
        /// The limit that was set.
        limit: u64,
    },
    /// More pixels in the batch than allowed, by the headers of its media; those beyond were not decoded.
    #[error("the media of the batch have more than {limit} pixels, with this one among them")]
    TooManyPixelsInBatch {
        /// The limit that was set.
        limit: u64,
    },
    /// More images, frames and sounds in one prompt than allowed; nothing was opened.
    #[error("the prompt has more than {limit} images, frames and sounds")]
    TooManyMedia {
        /// The limit that was set.
        limit: usize,
    },
    /// The frames of a video differ in size.
    #[error(
        "frame {frame} has {height} x {width} pixels, those before it {expected_height} x {expected_width}"
    )]
    FrameSize {
        /// The frame that differs, from 0.
        frame: usize,
        /// Its rows.
        height: u32,
        /// Its columns.
        width: u32,
        /// Rows of the frames before it.
        expected_height: u32,
        /// Columns of the frames before it.
        expected_width: u32,
    },
    /// One frame of a video cannot be had.
    #[error("frame {frame}: {problem}")]
    Frame {
        /// Which one, from 0.
        frame: usize,
        /// Why.
        #[source]
        problem: Box<MediumProblem>,
    },
    /// A list of frames, or a tensor of several, where one image is expected.
    #[error("{frames} frames where one image is expected")]
    NotAnImage {
        /// Frames that are there.
        frames: usize,
    },
    /// A single image where a video is expected.
    #[error("one image where the frames of a video are expected")]
    NotAVideo,
    /// A sound where an image or a video is expected.
    #[error("a sound where pixels are expected")]
    NotPixels,
    /// Frames or a tensor where a sound is expected.
    #[error("pixels where a sound is expected")]
    NotAudio,
    /// Too long and narrow for the vision encoder.
    #[error("{height} x {width} pixels (height x width): one side is more than {limit} times the other")]
    AspectRatio {
        /// Rows.
        height: u32,
        /// Columns.
        width: u32,
        /// The largest ratio that is allowed.
        limit: u32,
    },
    /// The bytes are of no format that is read here.
    #[error("neither PNG nor JPEG nor WebP; it begins with {begins:02x?}")]
    Format {
        /// The first bytes.
        begins: Vec<u8>,
    },
    /// The decoder found the bytes broken.
    #[error("broken: {message}")]
    Broken {
        /// What the decoder said.
        message: String,
    },
    /// A data URL that is not one.
    #[error("a broken data URL: {expected} expected")]
    DataUrl {
        /// What should be there.
        expected: &'static str,
    },
    /// Addresses are off unless a fetcher is given.
    #[error("{url} is not fetched: addresses are off unless a fetcher is set")]
    UrlsAreOff {
        /// The beginning of the address.
        url: String,
    },
    /// Fetching failed.
    #[error("cannot fetch {url}: {message}")]
    Fetch {
        /// The beginning of the address.
        url: String,
        /// What went wrong.
        message: String,
    },
    /// The decoder, or the fetcher, panicked; it has a defect.
    #[error("fetching or decoding panicked: {message}")]
    Panicked {
        /// What the panic said.
        message: String,
    },
}
