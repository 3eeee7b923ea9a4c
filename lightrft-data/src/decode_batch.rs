//! The media of a whole batch, decoded in parallel: every result in its own prompt's place, whatever the threads do.

use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::Error;
use crate::decode::{Budget, MediaDecoder, guarded};
use crate::media::{Audio, MediaSource, MediumProblem, Pixels};
use crate::multimodal::{Media, MediaKind, MultimodalInput};

/// A prompt with its media as an engine takes them, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodedInput<'a> {
    /// The text.
    pub prompt: Cow<'a, str>,
    /// Images in the order of their places in the text.
    pub images: Vec<Pixels>,
    /// Videos, likewise.
    pub videos: Vec<Pixels>,
    /// Sounds, likewise.
    pub audios: Vec<Audio>,
}

impl MediaDecoder {
    /// Decodes all media of a batch. Order and numbers are kept; at most `threads` media are decoded at a time.
    ///
    /// # Errors
    /// [`Error::Medium`] with prompt, kind and place; of several, the first in the order of the batch. Where the pixels of
    /// the batch are too many, it names one of those that were too much.
    pub fn decode<'a>(
        &self,
        inputs: &[MultimodalInput<'a, MediaSource>],
    ) -> Result<Vec<DecodedInput<'a>>, Error> {
        let jobs = inputs.iter().enumerate().map(|(prompt, input)| self.jobs(prompt, input));
        let jobs = jobs.collect::<Result<Vec<_>, _>>()?.concat();
        let mut results = self.run(&jobs, OnFailure::Stop).into_iter();
        inputs.iter().map(|input| gather(input, &mut results)).collect()
    }

    /// As [`decode`](Self::decode), with a result for each prompt: what is broken costs its own prompt, and the others are
    /// given. A prompt with several broken media has the error of the first.
    ///
    /// ```
    /// use lightrft_data::{DecodeConfig, Media, MediaDecoder, MediaSource, MultimodalInput};
    ///
    /// let input = |path: &str| -> Result<_, lightrft_data::MediumProblem> {
    ///     let images = vec![Media::One(MediaSource::parse(path)?)].into();
    ///     Ok(MultimodalInput { prompt: "?".into(), images, videos: vec![].into(), audios: vec![].into() })
    /// };
    /// let dot = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC";
    /// let decoder = MediaDecoder::new(DecodeConfig::default())?;
    /// let each = decoder.decode_each(&[input("/nowhere/cat.png")?, input(dot)?])?;
    /// let error = each[0].as_ref().unwrap_err().to_string();
    /// assert!(error.starts_with("prompt 0: images: number 0 (/nowhere/cat.png): "));
    /// assert!(each[1].is_ok());
    /// # Ok::<_, Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`MediumProblem::TooManyPixelsInBatch`], which is no single prompt's fault; broken media count with the size that
    /// their headers say.
    pub fn decode_each<'a>(
        &self,
        inputs: &[MultimodalInput<'a, MediaSource>],
    ) -> Result<Vec<Result<DecodedInput<'a>, Error>>, Error> {
        let mut jobs = Vec::new();
        let mut refused = Vec::with_capacity(inputs.len());
        for (prompt, input) in inputs.iter().enumerate() {
            match self.jobs(prompt, input) {
                Ok(more) => {
                    jobs.extend(more);
                    refused.push(None);
                }
                Err(error) => refused.push(Some(error)),
            }
        }
        let mut results = self.run(&jobs, OnFailure::GoOn);
        if let Some(at) = results.iter().position(|result| result.as_ref().is_err_and(is_of_batch)) {
            return Err(results.swap_remove(at).err().unwrap_or_else(|| Error::other("no error")));
        }
        let mut results = results.into_iter();
        let each = inputs.iter().zip(refused).map(|(input, refused)| match refused {
            Some(error) => Err(error),
            None => gather(input, &mut results),
        });
        Ok(each.collect())
    }

    /// What is to be done for one prompt, unless that is too much.
    fn jobs<'i>(
        &self,
        prompt: usize,
        input: &'i MultimodalInput<'_, MediaSource>,
    ) -> Result<Vec<Job<'i>>, Error> {
        let limit = self.config.max_media;
        let mut jobs = Vec::new();
        let mut found = 0usize;
        for kind in MediaKind::ALL {
            for (place, medium) in media_of(input, kind).iter().enumerate() {
                let job = Job { prompt, kind, place, medium };
                found = found.saturating_add(match medium {
                    Media::One(MediaSource::Frames(frames)) => frames.len(),
                    Media::One(MediaSource::Pixels(pixels)) => pixels.frames(),
                    _ => 1,
                });
                if found > limit {
                    return Err(job.failed(MediumProblem::TooManyMedia { limit }));
                }
                jobs.push(job);
            }
        }
        Ok(jobs)
    }

    /// The results of the jobs in order. With [`OnFailure::Stop`] those behind one that failed may say that they were lost.
    fn run(&self, jobs: &[Job<'_>], on_failure: OnFailure) -> Vec<Result<Decoded, Error>> {
        let budget = Budget::new(self.config.max_batch_pixels);
        let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(usize::MAX));
        // Jobs are taken in order, so every job before the first that fails is taken and brought to its end.
        let work = || {
            let mut done = Vec::new();
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(job) = jobs.get(at).filter(|_| at < failed.load(Ordering::Relaxed)) else {
                    return done;
                };
                let result = job.decode(self, &budget);
                if result.is_err() && on_failure == OnFailure::Stop {
                    failed.fetch_min(at, Ordering::Relaxed);
                }
                done.push((at, result));
            }
        };
        let mut done = thread::scope(|scope| {
            let others = self.config.threads.min(jobs.len()).saturating_sub(1);
            // Where no further thread can be had, those that there are do the work.
            let others: Vec<_> = (0..others)
                .map_while(|_| thread::Builder::new().name("media".into()).spawn_scoped(scope, work).ok())
                .collect();
            let mut done = work();
            for other in others {
                // Jobs catch panics. Should a thread be lost all the same, its jobs are missed below.
                done.extend(other.join().unwrap_or_default());
            }
            done
        });
        done.sort_unstable_by_key(|(at, _)| *at);
        let mut done = done.into_iter().peekable();
        // Places are matched one by one: no medium may slide into the place of one that was lost.
        let in_order =
            jobs.iter().enumerate().map(|(at, job)| match done.next_if(|(found, _)| *found == at) {
                Some((_, result)) => result,
                None => {
                    let message = "the thread that decoded it is gone".to_owned();
                    Err(job.failed(MediumProblem::Panicked { message }))
                }
            });
        in_order.collect()
    }
}

enum Decoded {
    Pixels(Pixels),
    Audio(Audio),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum OnFailure {
    Stop,
    GoOn,
}

fn media_of<'i>(input: &'i MultimodalInput<'_, MediaSource>, kind: MediaKind) -> &'i [Media<MediaSource>] {
    match kind {
        MediaKind::Image => &input.images,
        MediaKind::Video => &input.videos,
        MediaKind::Audio => &input.audios,
    }
}

/// Takes the results of one prompt, all of them, and puts them in their places.
fn gather<'a>(
    input: &MultimodalInput<'a, MediaSource>,
    results: &mut impl Iterator<Item = Result<Decoded, Error>>,
) -> Result<DecodedInput<'a>, Error> {
    let prompt = input.prompt.clone();
    let mut decoded = DecodedInput { prompt, images: Vec::new(), videos: Vec::new(), audios: Vec::new() };
    let mut first_error = None;
    for kind in MediaKind::ALL {
        for result in results.by_ref().take(media_of(input, kind).len()) {
            match result {
                Ok(Decoded::Audio(audio)) => decoded.audios.push(audio),
                Ok(Decoded::Pixels(pixels)) if kind == MediaKind::Video => decoded.videos.push(pixels),
                Ok(Decoded::Pixels(pixels)) => decoded.images.push(pixels),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
    }
    first_error.map_or(Ok(decoded), Err)
}

/// Whether it is the batch that has too much, rather than a prompt that is at fault.
fn is_of_batch(error: &Error) -> bool {
    let Error::Medium { problem, .. } = error else { return false };
    let mut problem = problem.as_ref();
    while let MediumProblem::Frame { problem: inner, .. } = problem {
        problem = inner;
    }
    matches!(problem, MediumProblem::TooManyPixelsInBatch { .. })
}

#[derive(Clone, Copy)]
struct Job<'a> {
    prompt: usize,
    kind: MediaKind,
    place: usize,
    medium: &'a Media<MediaSource>,
}

impl Job<'_> {
    fn decode(&self, decoder: &MediaDecoder, budget: &Budget) -> Result<Decoded, Error> {
        // All of it is guarded: fetching is the caller's code, and may panic as well.
        let decoded = guarded(|| match (self.medium, self.kind) {
            (Media::One(source), MediaKind::Image) => {
                decoder.image_within(source, budget).map(Decoded::Pixels)
            }
            (Media::One(source), MediaKind::Video) => {
                decoder.video_within(source, budget).map(Decoded::Pixels)
            }
            (Media::One(source), MediaKind::Audio) => decoder.audio(source).map(Decoded::Audio),
            (Media::Missing, _) => Err(MediumProblem::NotAMedium { found: "nothing" }),
            (Media::Group(_), _) => Err(MediumProblem::NotAMedium { found: "a list" }),
        });
        decoded.map_err(|problem| self.failed(problem))
    }

    fn failed(&self, problem: MediumProblem) -> Error {
        let Job { prompt, kind, place, .. } = *self;
        let at = match (self.medium, &problem) {
            (Media::One(MediaSource::Frames(frames)), MediumProblem::Frame { frame, .. }) => {
                frames.get(*frame).map_or_else(String::new, MediaSource::describe)
            }
            (Media::One(source), _) => source.describe(),
            (Media::Missing | Media::Group(_), _) => "no medium".to_owned(),
        };
        Error::Medium { prompt, kind, place, at, problem: Box::new(problem) }
    }
}
