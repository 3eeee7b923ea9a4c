//! What the fuzz targets do with any bytes. Each function panics where the crate breaks its word; one that panics inside
//! of the crate, or takes memory or time without bound, is found by whoever calls.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::PathBuf;

use lightrft_data::{
    BadLines, Dataset, Error, InputTemplate, JsonLines, JsonLinesOptions, Keys, Media, MediaColumn,
    MediaColumns, MediaSource, Mode, MultimodalInput, PromptDataset, PromptFormat, VisionTokens,
    build_multimodal_inputs, is_multimodal,
};

/// How many media each prompt has.
type Counts = Vec<Option<i64>>;

/// Takes an input apart, byte by byte; at its end there are zeros.
struct Pieces<'a>(&'a [u8]);

impl Pieces<'_> {
    fn next(&mut self, below: u8) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                first % below
            }
            None => 0,
        }
    }

    fn prompt(&mut self) -> String {
        const WORDS: [&str; 11] = [
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
            "<|video_pad|>",
            "<|vision_start|><|image_pad|><|vision_end|>",
            "<|vision_start|><|video_pad|><|vision_end|>",
            "<|image_",
            "pad|>",
            "é ",
            "<|",
            "<|AUDIO|>",
        ];
        (0..self.next(8)).map(|_| WORDS[usize::from(self.next(11))]).collect()
    }

    fn media(&mut self, deep: bool) -> Media<u8> {
        match self.next(8) {
            0 => Media::Missing,
            1..4 if deep => Media::Group((0..self.next(4)).map(|_| self.media(false)).collect()),
            _ => Media::One(self.next(250)),
        }
    }

    fn column(&mut self, prompts: usize) -> (Option<Vec<Media<u8>>>, Option<Counts>) {
        let entries = (self.next(8) > 0).then(|| (0..self.next(9)).map(|_| self.media(true)).collect());
        let counts = (self.next(8) > 0).then(|| {
            let len = if self.next(8) > 0 { prompts } else { usize::from(self.next(9)) };
            let count = |pieces: &mut Self| match pieces.next(16) {
                15 => None,
                14 => Some(i64::MIN),
                13 => Some(i64::MAX),
                12 => Some(-1),
                small => Some(i64::from(small / 3)),
            };
            (0..len).map(|_| count(self)).collect()
        });
        (entries, counts)
    }
}

/// Media and prompts of any shape: what strict mode takes is what LightRFT gives, and everything is used.
pub(crate) fn multimodal(bytes: &[u8]) {
    let mut pieces = Pieces(bytes);
    let prompts: Vec<String> = (0..pieces.next(7)).map(|_| pieces.prompt()).collect();
    let (images, image_counts) = pieces.column(prompts.len());
    let (videos, video_counts) = pieces.column(prompts.len());
    let (audios, audio_counts) = pieces.column(prompts.len());
    let images = MediaColumn { entries: images.as_deref(), counts: image_counts.as_deref() };
    let videos = MediaColumn { entries: videos.as_deref(), counts: video_counts.as_deref() };
    let audios = MediaColumn { entries: audios.as_deref(), counts: audio_counts.as_deref() };
    let media = MediaColumns { images, videos, audios };
    let any = is_multimodal(&media);
    let lightrft = build_multimodal_inputs(&prompts, media, Mode::LightRft);
    match build_multimodal_inputs(&prompts, media, Mode::Strict) {
        Ok(strict) => {
            let media = |input: &MultimodalInput<'_, u8>| {
                input.images.len() + input.videos.len() + input.audios.len()
            };
            let used: usize = strict.iter().map(media).sum();
            assert_eq!(used, ones(images.entries) + ones(videos.entries) + ones(audios.entries));
            assert!(any || used == 0);
            let vision = VisionTokens::QWEN2_VL;
            for (place, input) in strict.iter().enumerate() {
                let image = vision.image_grid(56, 28 + u32::from(pieces.next(200))).unwrap();
                let video = vision.video_grid(3, 100, 100).unwrap();
                let grids = (vec![image; input.images.len()], vec![video; input.videos.len()]);
                // Text that has several pads in a block already may have too few of them.
                if let Ok(expanded) = vision.expand(place, &input.prompt, &grids.0, &grids.1) {
                    assert_eq!(vision.expand(place, &expanded, &grids.0, &grids.1).unwrap(), expanded);
                }
            }
            assert_eq!(strict, lightrft.unwrap());
        }
        Err(Error::Media { prompt, .. }) => assert!(prompt < prompts.len().max(1)),
        Err(other) => panic!("{other}"),
    }
}

fn ones(entries: Option<&[Media<u8>]>) -> usize {
    let count = |entry: &Media<u8>| match entry {
        Media::Missing => 0,
        Media::One(_) => 1,
        Media::Group(group) => ones(Some(group)),
    };
    entries.unwrap_or_default().iter().map(count).sum()
}

/// A file of any bytes: the three ways of treating bad lines agree on which lines are samples.
pub(crate) fn json_lines(bytes: &[u8]) {
    let (limit, text) =
        bytes.split_first().map_or((0, bytes), |(first, rest)| (usize::from(*first) * 8, rest));
    let path = scratch();
    std::fs::write(&path, text).unwrap();
    let open = |bad_lines, max_line_bytes| {
        let keys = Keys { label: (limit % 16 == 0).then(|| "label".to_owned()), ..Keys::default() };
        JsonLines::open(
            &path,
            JsonLinesOptions { keys, bad_lines, max_line_bytes, threads: 1 + limit / 8 % 3 },
        )
    };
    let samples =
        |set: &JsonLines| -> Vec<_> { (0..set.len()).map(|i| (set.line(i).unwrap(), set.get(i))).collect() };
    if let Ok(late) = open(BadLines::RefuseOnRead, 64 << 20) {
        let all = samples(&late);
        assert!(all.windows(2).all(|pair| pair[0].0 < pair[1].0));
        let good: Vec<_> =
            all.iter().filter_map(|(line, result)| Some((*line, result.as_ref().ok()?.clone()))).collect();
        match open(BadLines::Skip, 64 << 20) {
            Ok(skipping) => {
                assert_eq!(skipping.len() as u64 + skipping.skipped().count, all.len() as u64);
                let kept: Vec<_> =
                    samples(&skipping).into_iter().map(|(line, result)| (line, result.unwrap())).collect();
                assert_eq!(kept, good);
            }
            Err(Error::NoSamples { bad_lines, .. }) => {
                assert!(good.is_empty() && bad_lines == all.len() as u64)
            }
            Err(other) => panic!("{other}"),
        }
        assert_eq!(open(BadLines::Refuse, 64 << 20).is_ok(), good.len() == all.len());
    }
    if let Ok(short) = open(BadLines::Skip, limit) {
        assert!(samples(&short).iter().all(|(_, result)| result.is_ok()));
    }
    if let Ok(prompts) = PromptDataset::open(&path, PromptFormat::default(), BadLines::Skip) {
        assert!((0..prompts.len()).all(|i| prompts.get(i).is_ok()));
    }
    if let Ok(text) = std::str::from_utf8(text) {
        let _ = MediaSource::parse(text);
        if let Ok(template) = InputTemplate::new(text) {
            let _ = template.fill("x");
        }
    }
    let _ = std::fs::remove_file(&path);
}

/// A file of this process's own, in memory where there is such a place.
fn scratch() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    let folder = if memory.is_dir() { memory } else { std::env::temp_dir() };
    folder.join(format!("lightrft-data-fuzz-{}-{:?}", std::process::id(), std::thread::current().id()))
}

/// An image file of any bytes: pixels of the size that its header says, or an error.
#[cfg(feature = "images")]
pub(crate) fn image(bytes: &[u8]) {
    use lightrft_data::{DecodeConfig, MediaDecoder, MediumProblem};
    let config =
        DecodeConfig { max_pixels: 1 << 16, max_bytes: 1 << 16, threads: 1, ..DecodeConfig::default() };
    let decoder = MediaDecoder::new(config).unwrap();
    let source = MediaSource::Bytes(bytes.into());
    let size = decoder.size(&source);
    match decoder.image(&source) {
        Ok(pixels) => assert_eq!(size.unwrap(), (1, pixels.height(), pixels.width())),
        Err(MediumProblem::Panicked { message }) => panic!("{message}"),
        Err(_) => {}
    }
}
