//! One update of all replicas: every bucket goes to each of them, from the same bytes.

use super::engine::Shared;
use super::replica::{Member, Record};
use super::threads::{Failure, side_by_side};
use crate::{Cache, Engine, Error, NamedTensor, Result, State, Update, Version};

const OPERATION: &str = "update weights";

/// An update under way on every replica that lives.
#[derive(Debug)]
pub(super) struct AllUpdate<'a> {
    parts: Vec<Part<'a>>,
    shared: &'a mut Shared,
    to: Version,
    cache: Cache,
    /// Some have taken a bucket that others have not: they no longer go together.
    broken: bool,
}

/// The update of one replica.
#[derive(Debug)]
struct Part<'a> {
    update: Box<dyn Update + 'a>,
    record: &'a mut Record,
}

impl<'a> AllUpdate<'a> {
    /// Begins on every living replica; `last` is what the last attempt to restart one ended with.
    pub(super) fn begin(
        members: &'a mut [Member],
        shared: &'a mut Shared,
        to: Version,
        cache: Cache,
        last: Option<Error>,
    ) -> Result<Self> {
        let count = members.len();
        let (mut records, mut engines) = (Vec::new(), Vec::new());
        for member in members.iter_mut().filter(|member| member.living().is_some()) {
            engines.extend(member.engine.as_deref_mut());
            records.push(&mut member.record);
        }
        // The engine is the update's from now on, also where it could not begin: only the error tells of a death.
        let begin = |engine: &'a mut (dyn Engine + 'static)| {
            engine.begin_update(to).map_err(|e| Failure::new(e, None))
        };
        let begun = side_by_side(OPERATION, engines, begin);
        shared.alone = State::Stale { cache };
        shared.made = None;
        let mut this = Self { parts: Vec::new(), shared, to, cache, broken: false };
        let (mut failed, mut died) = (None, last);
        for (record, begun) in records.into_iter().zip(begun) {
            match begun {
                Ok(update) => this.parts.push(Part { update, record }),
                Err(Failure::Died(error)) => {
                    record.lose(OPERATION, &error, this.shared);
                    died = Some(error);
                }
                Err(failure @ Failure::Failed(_)) => {
                    failed.get_or_insert(failure.of(record.index));
                }
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        this.someone_is_left(count, died)?;
        Ok(this)
    }

    fn someone_is_left(&self, count: usize, died: Option<Error>) -> Result<()> {
        match died {
            Some(error) if self.parts.is_empty() => {
                Err(Error::NoReplica { operation: OPERATION, count, source: Box::new(error) })
            }
            _ if self.parts.is_empty() => Err(broken()),
            _ => Ok(()),
        }
    }
}

impl Update for AllUpdate<'_> {
    fn push(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        if self.broken {
            return Err(broken());
        }
        let count = self.parts.len();
        let updates: Vec<_> = self.parts.iter_mut().map(|part| &mut part.update).collect();
        let pushed = side_by_side(OPERATION, updates, |update| {
            update.push(bucket).map_err(|error| Failure::new(error, None))
        });
        let (mut died, mut failed, mut taken) = (None, Vec::new(), 0);
        let mut left = Vec::with_capacity(count);
        for (part, pushed) in std::mem::take(&mut self.parts).into_iter().zip(pushed) {
            match pushed {
                Err(Failure::Died(error)) => {
                    part.record.lose(OPERATION, &error, self.shared);
                    died = Some(error);
                    continue;
                }
                Err(Failure::Failed(error)) => failed.push((part.record.index, error)),
                Ok(()) => taken += 1,
            }
            left.push(part);
        }
        self.parts = left;
        self.someone_is_left(count, died)?;
        let refused = taken == 0 && failed.iter().all(|(_, error)| is_refusal(error));
        let Some((replica, error)) = failed.into_iter().next() else { return Ok(()) };
        if refused {
            // All alike: none of them has taken anything.
            return Err(error);
        }
        self.broken = true;
        Err(Error::Replica { replica, source: Box::new(error) })
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        if self.broken {
            return Err(broken());
        }
        let (to, parts) = (self.to, std::mem::take(&mut self.parts));
        let count = parts.len();
        let (records, updates): (Vec<_>, Vec<_>) =
            parts.into_iter().map(|part| (part.record, part.update)).unzip();
        let commit =
            |update: Box<dyn Update + '_>| update.commit().map_err(|error| Failure::new(error, None));
        let committed = side_by_side(OPERATION, updates, commit);
        let (mut died, mut failed, mut done) = (None, Vec::new(), 0);
        for (record, committed) in records.into_iter().zip(committed) {
            match committed {
                Ok(()) => {
                    record.behind = false;
                    done += 1;
                }
                Err(Failure::Died(error)) => {
                    record.lose(OPERATION, &error, self.shared);
                    died = Some(error);
                }
                Err(Failure::Failed(error)) => failed.push((record.index, error)),
            }
        }
        if done > 0 {
            // Whoever failed is stale, and with it the handle, until another update.
            self.shared.version = to;
        }
        let alike = done == 0 && died.is_none() && failed.iter().all(|(_, error)| is_refusal(error));
        match (failed.into_iter().next(), died) {
            (Some((_, error)), _) if alike => Err(error),
            (Some((replica, error)), _) => Err(Error::Replica { replica, source: Box::new(error) }),
            (None, Some(error)) if done == 0 => {
                Err(Error::NoReplica { operation: OPERATION, count, source: Box::new(error) })
            }
            (None, _) => {
                self.shared.alone = State::Awake { cache: self.cache };
                Ok(())
            }
        }
    }
}

impl Drop for AllUpdate<'_> {
    fn drop(&mut self) {
        // Side by side: to abandon an update, a server may have to be told.
        let parts = std::mem::take(&mut self.parts);
        let updates = parts.into_iter().map(|part| part.update).collect();
        let dropped = side_by_side(OPERATION, updates, |update| {
            drop(update);
            Ok(())
        });
        for failure in dropped.into_iter().filter_map(Result::err) {
            tracing::warn!(?failure, "an update could not be abandoned");
        }
    }
}

/// Whether the error is about what the caller pushed, so that engines of one model give the same.
fn is_refusal(error: &Error) -> bool {
    matches!(
        error,
        Error::UnknownTensor { .. }
            | Error::WrongModel { .. }
            | Error::RepeatedTensor { .. }
            | Error::Shape { .. }
            | Error::Dtype { .. }
            | Error::MissingTensors { .. }
    )
}

fn broken() -> Error {
    let source = "an earlier bucket of this update failed: drop it and begin another".into();
    Error::Backend { engine: "data parallel", operation: OPERATION, source }
}
