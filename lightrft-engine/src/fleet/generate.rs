//! Generation in rounds: what is open is dealt to those in service, and what one that dies leaves is open again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use super::deal::{Piece, deal, pieces};
use super::engine::DataParallel;
use super::replica::{Member, ReplicaEvent};
use super::threads::{Failure, caught, spawn};
use crate::generate::check_fields;
use crate::{Completion, Engine, Error, Event, Progress, Request, Result, Version, Watch};

const OPERATION: &str = "generate";

/// Replicas that may die with a request under way before it is taken for the cause.
const MOST_DEATHS: usize = 3;

/// What a replica's thread tells of its call.
enum Told {
    Progress(Progress),
    Ended(Result<Vec<Completion>, Failure>),
}

/// A piece that has not been answered.
#[derive(Clone, Copy, Debug)]
struct Open {
    piece: Piece,
    /// Replicas that died with it.
    deaths: usize,
}

/// What one replica is asked.
struct Share {
    open: Vec<Open>,
    requests: Vec<Request>,
}

/// What was heard of it.
#[derive(Default)]
struct Heard {
    progress: Progress,
    ended: Option<Result<Vec<Completion>, Failure>>,
}

impl Share {
    fn new(open: Vec<Open>, all: &[Request]) -> Self {
        let ask = |open: &Open| {
            let Piece { request, first, samples, .. } = open.piece;
            let asked = &all[request];
            Request {
                samples,
                first_sample: asked.first_sample + first,
                // The index in the caller's call, not in this one.
                id: Some(asked.id.unwrap_or(request as u64)),
                ..asked.clone()
            }
        };
        let requests = open.iter().map(ask).collect();
        Self { open, requests }
    }

    /// The completions under the caller's numbers, if they are all that was asked and of these weights.
    fn answers(&self, found: Vec<Completion>, version: Version) -> Result<Vec<Completion>> {
        let asked = self.requests.iter().enumerate().flat_map(|(at, request)| {
            let first = request.first_sample;
            (first..first + request.samples).map(move |sample| (at, sample))
        });
        let wrong = |what: String| {
            Err(Error::Backend { engine: "data parallel", operation: OPERATION, source: what.into() })
        };
        if !asked.eq(found.iter().map(|c| (c.request, c.sample))) {
            return wrong(format!(
                "{} completions that are not those asked for, in their order",
                found.len()
            ));
        }
        if let Some(other) = found.iter().find(|c| c.version != version) {
            return wrong(format!("a completion drawn by {}, its weights are of {version}", other.version));
        }
        let renumbered = |c: Completion| Completion { request: self.open[c.request].piece.request, ..c };
        Ok(found.into_iter().map(renumbered).collect())
    }

    /// An error under the caller's numbers. What is wrong with a request is wrong on every replica.
    fn error(&self, replica: usize, error: Error) -> Error {
        let number = |at: usize| self.open.get(at).map_or(at, |open| open.piece.request);
        match error {
            Error::Request { request, field, value, expected } => {
                Error::Request { request: number(request), field, value, expected }
            }
            Error::ContextExceeded { request, prompt_tokens, max_new_tokens, context_tokens } => {
                Error::ContextExceeded {
                    request: number(request),
                    prompt_tokens,
                    max_new_tokens,
                    context_tokens,
                }
            }
            Error::CacheExceeded { request, tokens, needed_bytes, cache_bytes } => {
                Error::CacheExceeded { request: number(request), tokens, needed_bytes, cache_bytes }
            }
            Error::OutsideVocabulary { request, field, position, token, vocabulary } => {
                Error::OutsideVocabulary { request: number(request), field, position, token, vocabulary }
            }
            Error::Logits { request, sample, position, reason } => {
                let source = Error::Logits { request: number(request), sample, position, reason };
                Error::Replica { replica, source: Box::new(source) }
            }
            error => Error::Replica { replica, source: Box::new(error) },
        }
    }
}

impl DataParallel {
    pub(super) fn generate_all(
        &mut self,
        requests: &[Request],
        watch: &mut Watch<'_>,
    ) -> Result<Vec<Completion>> {
        self.bury_the_dead(OPERATION);
        self.state().after(Event::Generate)?;
        check_fields(requests, self.limits())?;
        let mut progress =
            Progress { total: requests.iter().map(|r| r.samples).sum(), ..Progress::default() };
        watch.report(progress)?;
        // Never falls: what a replica had drawn when it died does not count back.
        let mut furthest = progress;
        // Where all of them die, the handle still stands here.
        self.shared.alone = self.state();
        let others = self.in_service().next().is_some();
        let mut last = match others && watch.left() < self.shared.making {
            true => None,
            false => self.restart(Event::Generate),
        };
        let in_service = self.in_service().count();
        let mut open: Vec<Open> =
            pieces(requests, in_service).into_iter().map(|piece| Open { piece, deaths: 0 }).collect();
        let mut answers = Vec::with_capacity(progress.total);
        while !open.is_empty() {
            if self.in_service().next().is_none() {
                let failure = self.restart(Event::Generate);
                last = failure.or(last);
                if self.in_service().next().is_none() {
                    let source = Box::new(last.unwrap_or_else(nobody));
                    return Err(Error::NoReplica { operation: OPERATION, count: self.members.len(), source });
                }
            }
            let found = self.round(requests, std::mem::take(&mut open), progress, &mut furthest, watch)?;
            for completion in found.answers {
                progress.done += 1;
                progress.tokens += completion.tokens.len();
                answers.push(completion);
            }
            open = found.open;
            last = found.died.or(last);
            if let Some(deadly) = open.iter().find(|open| open.deaths >= MOST_DEATHS) {
                let (request, deaths) = (deadly.piece.request, deadly.deaths);
                return Err(Error::Deadly { request, deaths, source: Box::new(last.unwrap_or_else(nobody)) });
            }
            if !open.is_empty() {
                watch.report(furthest)?;
            }
        }
        watch.report(progress)?;
        answers.sort_unstable_by_key(|completion| (completion.request, completion.sample));
        Ok(answers)
    }

    /// One call on every replica in service at once, with its share of what is open.
    fn round(
        &mut self,
        requests: &[Request],
        open: Vec<Open>,
        before: Progress,
        furthest: &mut Progress,
        watch: &mut Watch<'_>,
    ) -> Result<Found> {
        let mut members: Vec<&mut Member> =
            self.members.iter_mut().filter(|member| member.is_in_service()).collect();
        let costs: Vec<Piece> = open.iter().map(|open| open.piece).collect();
        let dealt = deal(&costs, members.len());
        let shares: Vec<Share> = dealt
            .into_iter()
            .map(|share| Share::new(share.into_iter().map(|at| open[at]).collect(), requests))
            .collect();
        let mut heard: Vec<Heard> = shares.iter().map(|_| Heard::default()).collect();
        let stop = AtomicBool::new(false);
        let left = watch.left();
        let (tell, told) = mpsc::channel();
        let late = thread::scope(|scope| {
            for (at, (member, share)) in members.iter_mut().zip(&shares).enumerate() {
                let Some(engine) = member.engine.as_deref_mut().filter(|_| !share.requests.is_empty()) else {
                    continue;
                };
                let (mine, tell, stop) = (share.requests.as_slice(), tell.clone(), &stop);
                let also = tell.clone();
                let work = move || {
                    let mut listener = |progress| drop(tell.send((at, Told::Progress(progress))));
                    let ended = caught(OPERATION, || {
                        let mut watch = Watch::within(left).telling(&mut listener).until(stop);
                        let done = engine.generate(mine, &mut watch);
                        done.map_err(|error| Failure::new(error, Some(engine.state())))
                    });
                    drop(tell.send((at, Told::Ended(ended))));
                };
                if let Err(failure) = spawn(scope, OPERATION, work) {
                    drop(also.send((at, Told::Ended(Err(failure)))));
                }
            }
            drop(tell);
            listen(&mut heard, told, before, furthest, &stop, watch)
        });
        let version = self.shared.version;
        let mut found = Found::default();
        let mut failed = None;
        for ((member, share), heard) in members.into_iter().zip(shares).zip(heard) {
            let replica = member.record.index;
            let answers = |found| share.answers(found, version).map_err(Failure::Failed);
            let ended = heard.ended.map(|ended| ended.and_then(answers));
            match ended {
                None => {}
                Some(Ok(answers)) => {
                    member.record.restarts = 0;
                    found.answers.extend(answers);
                }
                Some(Err(Failure::Died(error))) => {
                    member.record.lose(OPERATION, &error, &mut self.shared);
                    let requests = share.open.len();
                    tracing::warn!(replica, requests, "its requests are dealt to other replicas");
                    self.shared.tell(&ReplicaEvent::Repeated { replica, requests });
                    found.open.extend(share.open.iter().map(|o| Open { deaths: o.deaths + 1, ..*o }));
                    found.died = Some(error);
                }
                // Those that were stopped come to their deadline: they are not the reason.
                Some(Err(Failure::Failed(error @ Error::Deadline { .. }))) => {
                    failed.get_or_insert(error);
                }
                Some(Err(Failure::Failed(error))) => match failed {
                    None | Some(Error::Deadline { .. }) => failed = Some(share.error(replica, error)),
                    Some(_) => {}
                },
            }
        }
        self.bury_the_dead(OPERATION);
        match (failed, late) {
            // Late, but whoever was not done by then died: the next look at the clock tells.
            (None, _) => Ok(found),
            (Some(Error::Deadline { .. }), Err(late)) => Err(late),
            (Some(Error::Deadline { waited, .. }), Ok(())) => {
                let (done, total) = (before.done + found.answers.len(), before.total);
                Err(Error::Deadline { operation: OPERATION, waited, done, total })
            }
            (Some(error), _) => Err(error),
        }
    }
}

/// What a round brought.
#[derive(Default)]
struct Found {
    answers: Vec<Completion>,
    open: Vec<Open>,
    died: Option<Error>,
}

/// Hears all replicas out, and tells the caller how far they are together. The first failure stops the others.
fn listen(
    heard: &mut [Heard],
    told: mpsc::Receiver<(usize, Told)>,
    before: Progress,
    furthest: &mut Progress,
    stop: &AtomicBool,
    watch: &mut Watch<'_>,
) -> Result<()> {
    let mut late = Ok(());
    for (at, told) in told {
        match told {
            Told::Progress(progress) => heard[at].progress = progress,
            Told::Ended(ended) => {
                if matches!(ended, Err(Failure::Failed(_))) {
                    stop.store(true, Ordering::Relaxed);
                }
                heard[at].ended = Some(ended);
                // The last progress of a share that is done was told already.
                continue;
            }
        }
        let together = heard.iter().fold(before, |sum, heard| Progress {
            done: sum.done + heard.progress.done,
            tokens: sum.tokens + heard.progress.tokens,
            ..sum
        });
        // The last word is the caller's, when all are in order.
        furthest.done = furthest.done.max(together.done).min(furthest.total.saturating_sub(1));
        furthest.tokens = furthest.tokens.max(together.tokens);
        if late.is_ok() && !stop.load(Ordering::Relaxed) {
            late = watch.report(*furthest);
            if late.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
        }
    }
    late
}

fn nobody() -> Error {
    Error::Backend {
        engine: "data parallel",
        operation: OPERATION,
        source: "no replica can be restarted".into(),
    }
}
