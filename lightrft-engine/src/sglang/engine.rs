//! The `SGLang` engine: the seam's contract over a server.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::control::{Control, ServerInfo, tags, woken};
use super::flight::{Requests, call_id};
use super::settings::{Attach, Driver, MemorySaver, Seeds, Start, bad};
use super::transfer::{Transport, transport};
use super::update::SglangUpdate;
use super::wire::{Asked, ask, body, check, completions};
#[cfg(feature = "cuda")]
use crate::cuda::GpuBucket;
use crate::generate::check_fields;
use crate::server::{
    Ask, Flight, Http, Job, MediaLimits, MetricNames, Model, OwnedFolder, PROBE, ServerProcess, Verify,
    autopsy, in_parallel, jobs, on_port,
};
use crate::transfer::Checksums;
use crate::{
    Call, Completion, Engine, Error, Event, HfFolder, Level, Limits, MemoryBytes, Metrics, NamedTensor,
    Parts, Progress, Request, Result, ServerError, StartProgress, State, Update, Version, Watch,
    WeightSource,
};

const NAMES: MetricNames = MetricNames {
    running: "sglang:num_running_reqs",
    waiting: "sglang:num_queue_reqs",
    cache_share: "sglang:token_usage",
    prompt_tokens: "sglang:prompt_tokens_total",
    generated_tokens: "sglang:generation_tokens_total",
};

/// A limit that is not known: no request reaches it.
const UNKNOWN: usize = u32::MAX as usize;

/// Whether a server draws nothing until it is told to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paused {
    No,
    /// A call by which it was told so, or to go on, failed.
    Perhaps,
    Yes,
}

/// An `SGLang` server.
#[derive(Debug)]
pub struct SglangEngine {
    control: Control,
    requests: Requests,
    flight: Arc<Flight>,
    model: Model,
    limits: Limits,
    media: MediaLimits,
    driver: Driver,
    transport: Box<dyn Transport>,
    seeds: Seeds,
    saver: MemorySaver,
    shards: usize,
    state: State,
    version: Version,
    /// The server has a name for its weights: one that says it has none is another, started anew.
    named: bool,
    paused: Paused,
    /// An update's session was opened and not closed.
    session: bool,
    /// What was released and not taken again. Anything else must not be asked for.
    asleep: Vec<&'static str>,
    /// Last, so that it ends when nothing calls it any more.
    process: Option<ServerProcess>,
}

impl SglangEngine {
    /// Starts a server and waits until it is ready; `tell` hears of it meanwhile. It ends when the engine is dropped, or
    /// with this process.
    ///
    /// # Errors
    /// Before anything is started: [`Error::Settings`], those of a broken model folder. [`Error::Server`] if it does not
    /// start, ends, or is not ready in time, with the last lines of its log.
    pub fn start(start: &Start, tell: &mut dyn FnMut(&StartProgress)) -> Result<Self> {
        start.check()?;
        let transport = transport(&start.driver.transfer)?;
        let model = Model::from_folder(&start.model)?;
        if model.vocabulary.is_none() {
            let value = start.model.display().to_string();
            return bad("model", value, "a config.json with its vocab_size was expected");
        }
        let (process, control) =
            on_port("SGLang", start.port, start.log.as_deref(), |port| launch(start, port, tell))?;
        control.check_serves(&start.model)?;
        let second = Http::new("SGLang", control.http.base(), start.key.clone())?;
        let info = control.server_info()?;
        Self::assemble(control, second, &info, model, start.driver.clone(), transport, Some(process))
    }

    /// Takes a running server. Of one that draws, the weights are taken for whole.
    ///
    /// One that is paused, since another trainer is in the middle of something or died there, may have lost its weights.
    /// Without `--enable-memory-saver` the engine is [`State::Stale`], and an update mends it; attaching changes nothing.
    /// With it, the server is refused: it may sleep, does not say which of its memory is released, and dies where any is
    /// taken again that was not. Attach again when it draws: once the other trainer has it go on, or, where that one is
    /// gone, once it was started anew.
    ///
    /// Drivers of this crate pause what they put to sleep. A server whose memory somebody else released without a pause
    /// cannot be told from one that is awake: do not attach to it.
    ///
    /// # Errors
    /// [`Error::Settings`]; [`Error::Server`] if it does not answer, is too old, or may sleep; those of a broken model
    /// folder.
    pub fn attach(attach: &Attach) -> Result<Self> {
        attach.driver.check()?;
        Self::attach_with(attach, transport(&attach.driver.transfer)?)
    }

    /// The same, with another way for weights than the settings name.
    pub(super) fn attach_with(attach: &Attach, transport: Box<dyn Transport>) -> Result<Self> {
        let connect = || Http::new("SGLang", &attach.url, attach.key.clone());
        let control = Control::new(connect()?, attach.driver.control_within);
        let info = control.server_info()?;
        let state = if control.is_ready()? { State::READY } else { State::EMPTY };
        if state != State::READY && info.memory_saver() != MemorySaver::Off {
            return Err(may_sleep().into());
        }
        let named = control.model_info()?.model_path.map(PathBuf::from);
        // Its folder may be on another machine, and one here of the same name is no weights of ours.
        let named = named.filter(|folder| folder.join("config.json").is_file());
        let model = match attach.model.as_ref().or(named.as_ref()) {
            Some(folder) => Model::from_folder(folder)?,
            None => Model::default(),
        };
        let driver = attach.driver.clone();
        let mut engine = Self::assemble(control, connect()?, &info, model, driver, transport, None)?;
        engine.stand(state);
        Ok(engine)
    }

    fn assemble(
        control: Control,
        second: Http,
        info: &ServerInfo,
        model: Model,
        driver: Driver,
        transport: Box<dyn Transport>,
        process: Option<ServerProcess>,
    ) -> Result<Self> {
        transport.meet(info)?;
        let Some(vocabulary) = model.vocabulary else {
            let expected = "a folder of this machine with its config.json was expected: SGLang dies of token ids outside of the vocabulary";
            return bad("model", "unknown", expected);
        };
        let shards = info.shards();
        if driver.verify == Verify::Checksums && (shards > 1 || info.device.as_deref() != Some("cpu")) {
            let value = format!("Checksums, on {} x {}", shards, info.device.as_deref().unwrap_or("?"));
            return bad(
                "verify",
                value,
                "only a server on a CPU, of one shard, takes checksums that can be compared",
            );
        }
        // Shorter prompts than this are taken, whatever else the scheduler keeps for itself.
        let context_tokens = info.max_req_input_len.unwrap_or(UNKNOWN);
        let limits = Limits { vocabulary, context_tokens };
        let named = control.model_info()?.weight_version.and_then(|version| version.parse().ok());
        let flight = Arc::new(Flight::new(State::READY));
        Ok(Self {
            requests: Requests::new(Arc::clone(&flight), second),
            control,
            flight,
            model,
            limits,
            media: info.media_limits(),
            seeds: if info.enable_deterministic_inference { Seeds::Honoured } else { Seeds::Ignored },
            saver: info.memory_saver(),
            shards,
            state: State::READY,
            version: named.map_or(driver.version, Version),
            named: named.is_some(),
            driver,
            transport,
            paused: Paused::No,
            session: false,
            asleep: Vec::new(),
            process,
        })
    }

    /// A handle by which another thread ends the requests of a call that is under way, or freezes them.
    pub fn requests(&self) -> Requests {
        self.requests.clone()
    }

    /// The server's counters (`--enable-metrics`, which servers started here have).
    ///
    /// # Errors
    /// [`Error::Server`].
    pub fn metrics(&mut self) -> Result<Metrics> {
        let text = self.told(|control| control.metrics())?;
        Ok(Metrics::parse(&text, &NAMES))
    }

    /// Drops what the server keeps of former requests: their prefixes, and their pictures as they were prepared. What its
    /// vision tower made of those no call drops; a server that was started here does not keep it.
    ///
    /// # Errors
    /// [`Error::Refused`] where [`Event::ResetCaches`] is; [`Error::Server`], also where another client's requests are under
    /// way: then nothing was dropped.
    pub fn flush_cache(&mut self) -> Result<()> {
        self.state_after(Event::ResetCaches)?;
        self.told(|control| control.flush_cache())
    }

    /// Whether the server decides its draws by [`Sampling::seed`](crate::Sampling::seed).
    pub fn seeds(&self) -> Seeds {
        self.seeds
    }

    /// Where the server is, without its key.
    pub fn url(&self) -> &str {
        self.control.http.base()
    }

    /// The server's process group and its log, if it was started here.
    pub fn process(&self) -> Option<(u32, &Path)> {
        self.process.as_ref().map(|process| (process.group(), process.log()))
    }

    /// A whole update from a folder that the server reads itself, as on a shared file system: nothing is sent. With
    /// [`Verify::Checksums`] this process reads the folder too, and holds it against what the server then has.
    ///
    /// # Errors
    /// Before the server is asked: [`Error::Refused`], those of a broken folder, and those of parameters that are not
    /// the model's. [`Error::Server`] and [`Error::Unequal`] then leave the engine stale.
    pub fn load_folder(&mut self, folder: &Path, to: Version) -> Result<()> {
        self.state_after(Event::BeginUpdate)?;
        let source = HfFolder::open(folder)?;
        crate::transfer::Plan::new(source.tensors(), &crate::Identity, self.parameters().as_ref(), to)?;
        self.transport.begin(&self.control);
        self.step(Event::BeginUpdate)?;
        let loaded = self.load(&source, folder, to);
        if loaded.is_err() {
            // A dead engine refuses that, and stays dead.
            self.step(Event::Abandon).ok();
        }
        loaded
    }

    fn load(&mut self, source: &HfFolder, folder: &Path, to: Version) -> Result<()> {
        self.pause()?;
        self.close_leftover_session()?;
        self.told(|control| control.update_from_disk(folder))?;
        if self.driver.verify == Verify::Checksums {
            self.compare(source.checksums()?, to)?;
        }
        self.committed(to)
    }

    pub(super) fn driver(&self) -> &Driver {
        &self.driver
    }

    pub(super) fn model(&self) -> &Model {
        &self.model
    }

    pub(super) fn state_after(&self, event: Event) -> Result<State> {
        Ok(self.state.after(event)?)
    }

    pub(super) fn step(&mut self, event: Event) -> Result<()> {
        self.stand(self.state.after(event)?);
        Ok(())
    }

    fn stand(&mut self, state: State) {
        self.state = state;
        self.flight.stand(state);
    }

    /// A control call. Where it fails because the server is gone, the engine is dead.
    pub(super) fn told<T>(&mut self, call: impl FnOnce(&Control) -> Result<T, ServerError>) -> Result<T> {
        call(&self.control).map_err(|error| self.bury(error))
    }

    pub(super) fn pause(&mut self) -> Result<()> {
        if self.paused != Paused::Yes {
            self.paused = Paused::Perhaps;
            self.told(|control| control.pause())?;
            self.paused = Paused::Yes;
        }
        Ok(())
    }

    /// Opens the session of an update.
    pub(super) fn open_session(&mut self) -> Result<()> {
        self.transport.begin(&self.control);
        self.session = true;
        self.told(|control| control.begin_update())?;
        self.transport.begun();
        Ok(())
    }

    /// Closes the session of an update.
    fn close_session(&mut self) -> Result<()> {
        self.told(|control| control.end_update())?;
        self.session = false;
        Ok(())
    }

    /// Closes a session that may have been left open.
    fn close_leftover_session(&mut self) -> Result<()> {
        if self.session {
            match self.control.end_update() {
                // There is none: of a call that opened or closed it the reply was lost, or the server was started anew.
                Ok(()) | Err(ServerError::Status { status: 400, .. }) => self.session = false,
                Err(error) => return Err(self.bury(error)),
            }
        }
        Ok(())
    }

    fn with_transport<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Transport, &Control) -> Result<T>,
    ) -> Result<T> {
        call(self.transport.as_mut(), &self.control).map_err(|error| match error {
            Error::Server(error) => self.bury(*error),
            error => error,
        })
    }

    /// Hands over a bucket that is not empty.
    pub(super) fn send(&mut self, bucket: &[NamedTensor<'_>]) -> Result<()> {
        let shards = self.shards;
        self.with_transport(|transport, control| transport.send(control, shards, bucket))
    }

    #[cfg(feature = "cuda")]
    pub(super) fn send_gpu(&mut self, bucket: GpuBucket) -> Result<GpuBucket> {
        self.with_transport(|transport, control| transport.send_gpu(control, bucket))
    }

    /// Ends an update of which everything was sent.
    pub(super) fn finish(&mut self) -> Result<()> {
        self.with_transport(|transport, control| transport.finish(control))?;
        self.close_session()?;
        self.transport.ended();
        Ok(())
    }

    /// After an update that came to nothing.
    pub(super) fn abandon(&mut self) {
        self.transport.abandon(&self.control);
    }

    /// Gives back what an engine that stands at `next` sleeps without.
    fn release(&mut self, next: State) -> Result<()> {
        // Nothing may be under way, not even what a call that failed has left.
        self.pause()?;
        let level = if next.has_weights() { Level::One } else { Level::Two };
        let wanted = tags(self.saver, level).iter().copied();
        let release: Vec<&str> = wanted.filter(|tag| !self.asleep.contains(tag)).collect();
        if !release.is_empty() {
            self.moved(|control| control.release(&release))?;
            self.asleep.extend(tags(self.saver, level).iter().filter(|tag| release.contains(tag)));
        }
        Ok(())
    }

    /// A call after which memory is there or not. Where nobody can tell which, the engine is dead: the server dies of
    /// memory that is taken or released twice.
    fn moved<T>(&mut self, call: impl FnOnce(&Control) -> Result<T, ServerError>) -> Result<T> {
        call(&self.control).map_err(|error| {
            if error.is_refusal() {
                return error.into();
            }
            match self.bury(error) {
                Error::Server(error) if self.state != State::Dead => {
                    self.stand(State::Dead);
                    if let Some(process) = &mut self.process {
                        process.stop();
                    }
                    ServerError::InDoubt { source: error }.into()
                }
                error => error,
            }
        })
    }

    /// Holds what was pushed against what the server has.
    pub(super) fn compare(&mut self, pushed: Checksums, to: Version) -> Result<()> {
        let ranks = self.told(|control| control.checksums())?;
        match ranks.as_slice() {
            [only] => pushed.compare("SGLang", to, &only.checksums),
            _ => Err(Error::Unequal {
                engine: "SGLang",
                name: "weights".to_owned(),
                version: to,
                what: format!("{} workers gave checksums, one was expected", ranks.len()),
            }),
        }
    }

    /// The server has whole weights, which it is told are of this version.
    pub(super) fn committed(&mut self, to: Version) -> Result<()> {
        self.told(|control| control.name_weights(to))?;
        if !self.asleep.contains(&"kv_cache") {
            self.told(|control| control.flush_cache())?;
        }
        let next = self.state.after(Event::Commit)?;
        self.go_on_if(next)?;
        (self.version, self.named) = (to, true);
        self.stand(next);
        Ok(())
    }

    fn go_on_if(&mut self, state: State) -> Result<()> {
        if self.paused != Paused::No && state.can_generate() {
            self.paused = Paused::Perhaps;
            self.told(|control| control.go_on())?;
            self.paused = Paused::No;
        }
        Ok(())
    }

    /// What a failed call means: the server may be gone, and then so is the engine.
    fn bury(&mut self, error: ServerError) -> Error {
        let (error, gone) = autopsy(error, self.process.as_mut(), |within| self.control.is_up(within));
        if gone {
            self.stand(State::Dead);
        }
        error.into()
    }

    fn asked(&self, requests: &[Request]) -> Result<Vec<Ask>> {
        check_fields(requests, self.limits)?;
        let each = |(index, request): (usize, &Request)| {
            check(index, request, &self.model, self.media)?;
            ask(index, &request.sampling, self.driver.log_probs)
        };
        requests.iter().enumerate().map(each).collect()
    }
}

impl Engine for SglangEngine {
    fn generate(&mut self, requests: &[Request], watch: &mut Watch<'_>) -> Result<Vec<Completion>> {
        self.state.after(Event::Generate)?;
        let asks = self.asked(requests)?;
        // A call that failed may have left it paused.
        self.go_on_if(self.state)?;
        let jobs = jobs(requests, self.driver.samples_per_request);
        let mut progress =
            Progress { total: requests.iter().map(|r| r.samples).sum(), ..Progress::default() };
        watch.report(progress)?;
        let within = watch.left();
        let started = Instant::now();
        let id = call_id();
        self.flight.begin();
        let batch = self.control.http.batch();
        let run = |job: &Job| -> Result<Vec<Completion>> {
            let (request, ask) = (&requests[job.request], asks[job.request]);
            let rid = |at| format!("{id}-{}-{}", job.request, job.first + at);
            let rids: Vec<String> = (0..job.drawn).map(rid).collect();
            if !self.flight.takes_off(&rids) {
                return Ok(job.unbegun(self.version));
            }
            let body = body(request, *job, rids.clone(), ask, self.seeds);
            let left = within.saturating_sub(started.elapsed());
            let reply = batch.post("/generate", &body, left)?;
            self.flight.lands(&rids);
            let vocabulary = self.limits.vocabulary;
            let version = (self.version, self.named);
            completions(&reply, Asked { request, job: *job, ask, vocabulary, version })
        };
        let mut report = |completions: Option<&Vec<Completion>>| {
            let completions = completions.map_or(&[][..], Vec::as_slice);
            progress.done += completions.len();
            progress.tokens += completions.iter().map(|c| c.tokens.len()).sum::<usize>();
            watch.report(progress)
        };
        let width = self.driver.requests_at_once;
        let done = in_parallel(width, &jobs, run, &mut report, || batch.interrupt());
        let unanswered = self.flight.end();
        match done {
            Ok(completions) => Ok(completions.into_iter().flatten().collect()),
            Err(error) => {
                if let Err(also) = self.requests.give_up(&unanswered, PROBE) {
                    tracing::debug!(%also, "requests given up");
                }
                Err(match error {
                    Error::Server(error) => match *error {
                        ServerError::Timeout { .. } if watch.left().is_zero() => {
                            watch.report(progress).err().unwrap_or(Error::Server(error))
                        }
                        error => self.bury(error),
                    },
                    error => error,
                })
            }
        }
    }

    fn sleep(&mut self, level: Level) -> Result<()> {
        let next = self.state.after(Event::Sleep(level))?;
        // From before the pause on, nobody else has the server go on.
        self.flight.stand(next);
        let released = self.release(next);
        self.stand(if released.is_ok() { next } else { self.state });
        released
    }

    fn wake(&mut self, parts: Parts) -> Result<()> {
        let next = self.state.after(Event::Wake(parts))?;
        let back = woken(&self.asleep, parts);
        if !back.is_empty() {
            self.moved(|control| control.resume_memory(&back)).map_err(not_woken)?;
            self.asleep.retain(|tag| !back.contains(tag));
        }
        self.go_on_if(next)?;
        self.stand(next);
        Ok(())
    }

    fn begin_update(&mut self, to: Version) -> Result<Box<dyn Update + '_>> {
        Ok(Box::new(SglangUpdate::begin(self, to)?))
    }

    fn state(&self) -> State {
        self.state
    }

    fn version(&self) -> Option<Version> {
        self.state.has_weights().then_some(self.version)
    }

    fn memory_bytes(&self) -> Option<MemoryBytes> {
        None
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn parameters(&self) -> Option<BTreeMap<String, Vec<usize>>> {
        let known = &self.model.parameters;
        (!known.is_empty()).then(|| known.clone())
    }

    #[cfg(feature = "cuda")]
    fn gpu_buckets(&self) -> Option<crate::cuda::GpuBuckets> {
        self.transport.buckets()
    }
}

/// What the failure to take memory again means: the server, which may have died of it, has to be started anew.
fn not_woken(error: Error) -> Error {
    match error {
        Error::Server(source) if source.is_the_end() => {
            let then = "start it anew, with a smaller `memory_share` if there is never enough left for it";
            ServerError::Wake { source, then }.into()
        }
        error => error,
    }
}

/// Why a server is refused that is paused and has memory that can be released.
fn may_sleep() -> ServerError {
    let call = Call { engine: "SGLang", method: "GET", path: "/ready".to_owned() };
    let what = "it takes no requests: it is paused, and may sleep; which of its memory is released it does not say, and it \
                dies of a wrong guess. Attach when it draws: have its trainer wake it, or start it anew";
    ServerError::Reply { call, what: what.to_owned() }
}

fn launch(
    start: &Start,
    port: u16,
    tell: &mut dyn FnMut(&StartProgress),
) -> Result<(ServerProcess, Control)> {
    let failed = |source| Error::Backend {
        engine: "SGLang",
        operation: "write the key's file",
        source: Box::new(source),
    };
    // Read by the time that it is ready, and gone with this call.
    let folder = OwnedFolder::new("lightrft-sglang-", &std::env::temp_dir()).map_err(failed)?;
    let key = start.write_key(folder.path()).map_err(failed)?;
    let mut process = ServerProcess::start(&start.command(port, key.as_deref()))?;
    let http = Http::new("SGLang", &format!("http://127.0.0.1:{port}"), start.key.clone())?;
    let control = Control::new(http, start.driver.control_within);
    // It answers before it can draw; it is ready once it has drawn.
    let ready = |within: Duration| control.is_up(within) && control.is_healthy(PROBE);
    process.wait_until_ready(start.ready_within, ready, tell)?;
    Ok((process, control))
}

#[cfg(test)]
mod tests {
    #[test]
    fn its_counters_are_those_of_a_real_server() {
        super::NAMES.are_taped("sglang-0.5.23/text");
    }
}
