//! The engine: the seam's contract over a server's routes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::control::{Control, is_old};
use super::flight::Requests;
use super::settings::{Attach, Driver, SCALE_OUT, Start, TokenRoute};
use super::transfer::{Transport, transport};
use super::update::VllmUpdate;
use super::verify;
use super::wire::{self, Asked};
use crate::generate::check_fields;
use crate::server::{
    Flight, Http, Job, MediaLimits, MetricNames, Metrics, Model, OwnedFolder, ServerProcess, Verify, autopsy,
    in_parallel, jobs, on_port,
};
use crate::transfer::Checksums;
use crate::{
    ApiKey, Cache, Call, Completion, Engine, Error, Event, Level, Limits, MediaKind, MemoryBytes, Parts,
    Progress, Request, Result, ServerError, StartProgress, State, Update, Version, Watch,
};

/// The plug-in of the server's workers.
const PLUGIN: &str = include_str!("lightrft_vllm.py");

/// How vLLM calls its counters.
const COUNTERS: MetricNames = MetricNames {
    running: "vllm:num_requests_running",
    waiting: "vllm:num_requests_waiting",
    cache_share: "vllm:kv_cache_usage_perc",
    prompt_tokens: "vllm:prompt_tokens_total",
    generated_tokens: "vllm:generation_tokens_total",
};

/// How long each call may take by which an update is abandoned, since dropping it waits for them.
const ABANDON: Duration = Duration::from_secs(30);

/// Why it is not known which parts of a server sleep, and whether it is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Doubt {
    /// It was found asleep or paused.
    Found,
    /// The reply to a call was lost.
    Lost,
}

/// A vLLM server as an engine.
#[derive(Debug)]
pub struct VllmEngine {
    /// None if somebody else started it. Before the plug-in's folder, so that it ends first.
    process: Option<ServerProcess>,
    _plugin: Option<OwnedFolder>,
    control: Control,
    /// Another client than that of control calls: only generation is interrupted.
    generation: Http,
    key: Option<ApiKey>,
    flight: Arc<Flight>,
    driver: Driver,
    transport: Box<dyn Transport>,
    model: Model,
    limits: Limits,
    takes_media: bool,
    media: MediaLimits,
    state: State,
    version: Version,
    doubt: Option<Doubt>,
    /// It knows less of sleeping in parts than newer ones.
    is_old: bool,
}

impl VllmEngine {
    /// Starts a server and waits until it is ready, telling `tell` how it comes along.
    ///
    /// # Errors
    /// Before anything is started: [`Error::Settings`], those of a broken model folder. [`Error::Server`] with the end of
    /// the server's log if it ends or does not become ready.
    pub fn start(start: &Start, tell: &mut dyn FnMut(&StartProgress)) -> Result<Self> {
        start.check()?;
        let transport = transport(&start.driver.transfer)?;
        let plugin = plugin_folder()?;
        let log = start.log.as_deref();
        let mut launched =
            |route| on_port("vLLM", start.port, log, |port| launch(start, port, route, plugin.path(), tell));
        let (process, control) = match launched(TokenRoute::Asked) {
            Err(Error::Server(error)) if knows_no_scale_out(&error) => {
                error.discard_log(log);
                launched(TokenRoute::Always)?
            }
            result => result?,
        };
        control.check_serves(&start.model)?;
        let folder = Some(start.model_folder());
        let base = control.http.base().to_owned();
        let mut engine = Self::connect(control, &base, start.key.clone(), folder, start.driver(), transport)?;
        engine.media = MediaLimits { images: start.images_per_prompt, videos: start.videos_per_prompt };
        engine.process = Some(process);
        engine._plugin = Some(plugin);
        Ok(engine)
    }

    /// Drives a server that is running; it is not ended when the engine is dropped. Of a server that draws, the weights
    /// are taken for whole.
    ///
    /// One that sleeps or is paused, since another trainer is in the middle of something or died there, may have lost its
    /// weights: the engine is [`State::Stale`], and an update mends it. Nothing is changed by attaching: the server is
    /// woken by the update, or by [`Engine::wake`], and as a whole, since it does not say which of its parts sleep. A
    /// trainer that has not got the memory for that yet sleeps first ([`Level::Two`]), and then wakes what it wants. Where
    /// the other trainer lives, attach again when the server draws.
    ///
    /// # Errors
    /// [`Error::Settings`]; [`Error::Server`] if it does not answer, or is too old.
    pub fn attach(attach: &Attach) -> Result<Self> {
        attach.driver.check()?;
        Self::attach_with(attach, transport(&attach.driver.transfer)?)
    }

    /// The same, with another way for weights than the settings name.
    pub(super) fn attach_with(attach: &Attach, transport: Box<dyn Transport>) -> Result<Self> {
        let http = Http::new("vLLM", &attach.url, attach.key.clone())?;
        let control = Control::new(http, attach.driver.control_within);
        Self::connect(
            control,
            &attach.url,
            attach.key.clone(),
            attach.model.as_deref(),
            attach.driver.clone(),
            transport,
        )
    }

    fn connect(
        control: Control,
        url: &str,
        key: Option<ApiKey>,
        folder: Option<&Path>,
        driver: Driver,
        mut transport: Box<dyn Transport>,
    ) -> Result<Self> {
        let version = control.check_version()?;
        let served = control.served()?;
        // What the server calls its model may be a folder here too.
        let root = served.root.as_deref().map(Path::new).filter(|root| root.join("config.json").exists());
        let model = folder.or(root).map(Model::from_folder).transpose()?.unwrap_or_default();
        let Some(vocabulary) = model.vocabulary else {
            return Err(Error::Settings {
                engine: "vLLM",
                field: "model",
                value: served.root.unwrap_or_else(|| "unknown".to_owned()),
                expected: "a folder of this machine with its config.json was expected: requests are checked by it",
            });
        };
        let found_asleep = control.is_asleep()?;
        // Weights that sleep have no checksums: an update's end looks at those that it brings.
        if driver.verify == Verify::Checksums && !found_asleep {
            verify::check(&control, &model)?;
        }
        let context_tokens = served.max_model_len.unwrap_or(usize::MAX);
        let takes_media = control.takes_media(&version)?;
        transport.meet(&control, &version)?;
        let is_old = is_old(&version);
        let named = control.weight_version()?;
        if named.is_none() && !found_asleep {
            control.name_weights(driver.version)?;
        }
        let state = if found_asleep { State::EMPTY } else { State::READY };
        tracing::info!(%version, vocabulary, context_tokens, found_asleep, "driving a vLLM server");
        Ok(Self {
            process: None,
            _plugin: None,
            generation: Http::new("vLLM", url, key.clone())?.reusing_connections(),
            key,
            flight: Arc::new(Flight::new(state)),
            transport,
            model,
            limits: Limits { vocabulary, context_tokens },
            takes_media,
            media: MediaLimits::default(),
            state,
            doubt: found_asleep.then_some(Doubt::Found),
            is_old,
            version: named.unwrap_or(driver.version),
            control,
            driver,
        })
    }

    /// The server's address.
    pub fn url(&self) -> &str {
        self.control.http.base()
    }

    /// The server's process group and its log, if it was started here.
    pub fn process(&self) -> Option<(u32, &Path)> {
        self.process.as_ref().map(|process| (process.group(), process.log()))
    }

    /// A handle by which another thread aborts or freezes what [`Engine::generate`] is waiting for.
    ///
    /// # Errors
    /// None that can happen: the address and the key have been tried.
    pub fn requests(&self) -> Result<Requests> {
        let http = Http::new("vLLM", self.url(), self.key.clone())?;
        Ok(Requests::new(self.flight.clone(), http))
    }

    /// What the server counts: queue lengths, tokens, the share of its cache in use.
    ///
    /// # Errors
    /// [`Error::Server`].
    pub fn metrics(&self) -> Result<Metrics> {
        let reply = self.control.http.get("/metrics", self.driver.control_within)?;
        Ok(Metrics::parse(&String::from_utf8_lossy(&reply.bytes), &COUNTERS))
    }

    /// Drops what the server keeps of former requests: their prefixes, and what it made of their pictures and films.
    ///
    /// # Errors
    /// [`Error::Refused`] where [`Event::ResetCaches`] is; [`Error::Server`], also where another client's requests are under
    /// way: then nothing was dropped.
    pub fn reset_caches(&mut self) -> Result<()> {
        self.state.after(Event::ResetCaches)?;
        self.control(Control::reset_caches)
    }

    pub(super) fn model(&self) -> &Model {
        &self.model
    }

    pub(super) fn verifies(&self) -> bool {
        self.driver.verify == Verify::Checksums
    }

    pub(super) fn step(&mut self, event: Event) -> Result<()> {
        self.stand(self.state.after(event)?);
        Ok(())
    }

    fn stand(&mut self, state: State) {
        self.state = state;
        self.flight.stand(state);
    }

    /// Passes a result on; if it is the kind of failure that a dying server leaves, looks whether this one is dead.
    fn settle<T>(&mut self, result: Result<T>) -> Result<T> {
        let error = match result {
            Err(Error::Server(error)) => *error,
            result => return result,
        };
        let (error, gone) = autopsy(error, self.process.as_mut(), |within| self.control.is_healthy(within));
        if gone {
            self.step(Event::Die)?;
        }
        Err(error.into())
    }

    /// A control call, settled.
    fn control(&mut self, call: impl FnOnce(&Control) -> Result<(), ServerError>) -> Result<()> {
        let result = call(&self.control).map_err(Error::from);
        self.settle(result)
    }

    /// A control call that changes what sleeps, or is paused. If it fails, and was not refused, what it changed is not
    /// known: the engine is stale, and sees to the whole server before it is used again.
    fn change<T>(&mut self, call: impl FnOnce(&Control) -> Result<T, ServerError>) -> Result<T> {
        let result = call(&self.control);
        let refused = result.as_ref().is_err_and(ServerError::is_refusal);
        let result = self.settle(result.map_err(Error::from));
        if result.is_err() && !refused && self.state != State::Dead {
            self.doubt = Some(Doubt::Lost);
            self.step(Event::LoseTrack)?;
        }
        result
    }

    pub(super) fn with_transport<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Transport, &Control) -> Result<T>,
    ) -> Result<T> {
        let result = call(self.transport.as_mut(), &self.control);
        self.settle(result)
    }

    /// What was pushed becomes the server's weights, and is compared with them if `pushed` says with what. The caches go
    /// before any request comes.
    pub(super) fn commit(&mut self, to: Version, pushed: Option<Checksums>) -> Result<()> {
        self.with_transport(|transport, control| transport.finish(control))?;
        if let Some(pushed) = pushed {
            let held = self.control.checksums().map_err(Error::from);
            let held = self.settle(held)?;
            verify::comparable(&held, &self.model)?;
            pushed.compare("vLLM", to, held.sums.iter().map(|(name, sum)| (name, sum)))?;
        }
        self.control(|control| control.reset_caches())?;
        self.control(|control| control.name_weights(to))?;
        let next = self.state.after(Event::Commit)?;
        if next.can_generate()
            && let Err(error) = self.control(Control::resume)
        {
            // It may draw already, and must not while what comes next puts an end to the update.
            let _ = self.control.within(ABANDON).pause();
            return Err(error);
        }
        self.version = to;
        self.step(Event::Commit)?;
        tracing::debug!(version = to.0, "weights replaced");
        Ok(())
    }

    /// After an update that came to nothing. The server stays paused, so that nobody draws from what it has.
    pub(super) fn abandon(&mut self) {
        self.transport.abandon(&self.control.within(ABANDON));
    }

    /// Calls that begin with a pause of the server: from before it on, nobody else has it go on. Where they fail the engine
    /// stands where they have left it.
    fn paused(&mut self, next: State, calls: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.flight.stand(next);
        let done = calls(self);
        match &done {
            Ok(()) => self.stand(next),
            Err(_) => self.flight.stand(self.state),
        }
        done
    }

    /// Wakes all of a server of which it is not known what sleeps. It stays paused.
    fn rouse(&mut self) -> Result<()> {
        // None of the parts wakes that are asked for at once where one of them is awake. The whole is tried first all the
        // same: older ones draw as soon as a part of them wakes, and die of it.
        for parts in [Parts::All, Parts::Weights, Parts::Cache] {
            self.change(|control| control.wake(parts))?;
        }
        self.change(Control::pause)?;
        self.doubt = None;
        Ok(())
    }

    /// Refuses media that the server would misread: it expands each pad by itself, also those that are expanded.
    fn check_media(&self, requests: &[Request]) -> Result<()> {
        for (index, request) in requests.iter().enumerate() {
            for kind in [MediaKind::Image, MediaKind::Video] {
                let count = request.media.iter().filter(|media| media.kind() == kind).count();
                let bad = |value: String, expected| {
                    Err(Error::Request { request: index, field: "media", value, expected })
                };
                let Some(pad) = self.model.pad(kind) else {
                    if count > 0 {
                        return bad(
                            format!("{count} of {kind:?}"),
                            "the model's config.json names no pad token for them",
                        );
                    }
                    continue;
                };
                if count > 0 && !self.takes_media {
                    return bad(
                        format!("{count} of {kind:?}"),
                        "this vLLM takes none with a prompt's tokens",
                    );
                }
                self.media.check(index, kind, count)?;
                let pads = request.prompt.iter().filter(|token| **token == pad).count();
                if pads != count {
                    return bad(
                        format!("{count} of {kind:?} for {pads} pad tokens ({pad})"),
                        "one pad token in the prompt for each was expected: the server expands it",
                    );
                }
            }
        }
        Ok(())
    }

    fn generate_all(&mut self, requests: &[Request], watch: &mut Watch<'_>) -> Result<Vec<Completion>> {
        let asks = requests.iter().enumerate().map(|(index, request)| {
            wire::check_sampling(index, &request.sampling)?;
            wire::ask(index, &request.sampling, self.driver.log_probs)
        });
        let asks = asks.collect::<Result<Vec<_>>>()?;
        let mut progress =
            Progress { total: requests.iter().map(|r| r.samples).sum(), ..Progress::default() };
        watch.report(progress)?;
        let jobs = jobs(requests, self.driver.samples_per_request);
        let (started, left) = (Instant::now(), watch.left());
        self.flight.begin();
        if self.flight.take_paused()
            && let Err(error) = self.control(Control::resume)
        {
            self.flight.leave_paused(true);
            self.flight.end();
            return Err(error);
        }
        let batch = self.generation.batch();
        let run = |job: &Job| {
            let asked = Asked {
                request: &requests[job.request],
                job: *job,
                ask: asks[job.request],
                vocabulary: self.limits.vocabulary,
                version: self.version,
            };
            let id = [unique_id()];
            if !self.flight.takes_off(&id) {
                return Ok(job.unbegun(self.version));
            }
            let body = wire::body(asked.request, *job, &id[0], asked.ask);
            let within = left.saturating_sub(started.elapsed());
            let reply = batch.post("/inference/v1/generate", &body, within);
            self.flight.lands(&id);
            wire::completions(&reply?, asked)
        };
        let mut done = |completions: Option<&Vec<Completion>>| {
            let completions = completions.map_or(&[][..], Vec::as_slice);
            progress.done += completions.len();
            progress.tokens += completions.iter().map(|c| c.tokens.len()).sum::<usize>();
            watch.report(progress)
        };
        let interrupt = || batch.interrupt();
        let found = in_parallel(self.driver.requests_at_once, &jobs, run, &mut done, interrupt);
        self.flight.end();
        let found = found.map_err(|error| match error {
            Error::Server(server) if matches!(*server, ServerError::Timeout { .. }) => {
                let (done, total) = (progress.done, progress.total);
                Error::Deadline { operation: "generate", waited: started.elapsed(), done, total }
            }
            error => error,
        })?;
        if requests.is_empty() {
            watch.report(progress)?;
        }
        tracing::debug!(
            completions = progress.total,
            tokens = progress.tokens,
            version = self.version.0,
            "generated"
        );
        Ok(found.into_iter().flatten().collect())
    }
}

impl Engine for VllmEngine {
    fn generate(&mut self, requests: &[Request], watch: &mut Watch<'_>) -> Result<Vec<Completion>> {
        self.state.after(Event::Generate)?;
        check_fields(requests, self.limits)?;
        self.check_media(requests)?;
        let result = self.generate_all(requests, watch);
        self.settle(result)
    }

    fn sleep(&mut self, level: Level) -> Result<()> {
        let next = self.state.after(Event::Sleep(level))?;
        // A server that sleeps stays as it is: what it put aside on the host is forgotten when its weights are updated.
        if matches!(self.state, State::Asleep { .. }) {
            self.stand(next);
            return Ok(());
        }
        let in_part = matches!(
            self.state,
            State::Awake { cache: Cache::Asleep } | State::Stale { cache: Cache::Asleep }
        );
        self.paused(next, |engine| {
            // Older ones take a server of which a part sleeps for asleep, and would keep the weights in use.
            if engine.is_old && engine.doubt == Some(Doubt::Lost) {
                engine.rouse()?;
            } else if engine.is_old && in_part {
                engine.change(|control| control.wake(Parts::Cache))?;
            }
            let level = if next.has_weights() { Level::One } else { Level::Two };
            engine.change(|control| control.sleep(level))
        })
    }

    fn wake(&mut self, parts: Parts) -> Result<()> {
        let next = self.state.after(Event::Wake(parts))?;
        if self.doubt.is_some() && next == State::EMPTY {
            self.rouse()?;
        } else if next != self.state {
            // vLLM wakes what sleeps; what is awake already is left out.
            let wake = match (self.state, parts) {
                (State::Asleep { .. }, parts) => parts,
                (_, _) => Parts::Cache,
            };
            let whole = self.change(|control| control.wake(wake))?;
            if !whole && wake != Parts::Weights {
                self.doubt = Some(Doubt::Lost);
                self.step(Event::LoseTrack)?;
                return Err(still_asleep().into());
            }
            self.doubt = None;
            if next.can_generate() {
                self.change(Control::resume)?;
            } else {
                // Older servers go on drawing as soon as a part of them wakes: from weights or into a cache that are
                // not there.
                self.change(Control::pause)?;
            }
        }
        self.step(Event::Wake(parts))
    }

    fn begin_update(&mut self, to: Version) -> Result<Box<dyn Update + '_>> {
        let next = self.state.after(Event::BeginUpdate)?;
        if matches!(self.state, State::Updating { .. }) {
            // It was leaked.
            self.abandon();
        }
        self.paused(next, |engine| match engine.doubt {
            Some(_) => engine.rouse(),
            None => engine.change(Control::pause),
        })?;
        let begun = self.with_transport(|transport, control| transport.begin(control));
        let update = Box::new(VllmUpdate::new(self, to));
        begun.map(|()| update as Box<dyn Update>)
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
        // Checksums are taken of what passes through the host.
        if self.verifies() { None } else { self.transport.buckets() }
    }

    fn shared_buckets(&self) -> Option<crate::shared::SharedBuckets> {
        self.transport.shared_buckets()
    }
}

/// That a server says it sleeps after all of it was woken.
fn still_asleep() -> ServerError {
    let call = Call { engine: "vLLM", method: "POST", path: "/wake_up".to_owned() };
    let what = "parts of it sleep on: another program has put it to sleep. Update its weights, which wakes it as a whole";
    ServerError::Reply { call, what: what.to_owned() }
}

/// An id that no other request of the server has, of this process or of another.
fn unique_id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    use std::hash::{BuildHasher, RandomState};
    static PROCESS: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| RandomState::new().hash_one(0));
    format!("lightrft-{:016x}-{}", *PROCESS, NEXT.fetch_add(1, Ordering::Relaxed))
}

fn plugin_folder() -> Result<OwnedFolder> {
    let made = OwnedFolder::new("lightrft-plugin-", &std::env::temp_dir()).and_then(|folder| {
        std::fs::write(folder.path().join("lightrft_vllm.py"), PLUGIN)?;
        Ok(folder)
    });
    made.map_err(|source| Error::Backend {
        engine: "vLLM",
        operation: "write the workers' plug-in",
        source: Box::new(source),
    })
}

/// Whether a server ended since it is older than the flag by which newer ones are asked for their route for tokens.
fn knows_no_scale_out(error: &ServerError) -> bool {
    let refused = |text: &str| text.contains("unrecognized arguments") && text.contains(SCALE_OUT);
    matches!(error, ServerError::Exited { last_lines, .. } if refused(last_lines))
}

fn launch(
    start: &Start,
    port: u16,
    route: TokenRoute,
    plugin: &Path,
    tell: &mut dyn FnMut(&StartProgress),
) -> Result<(ServerProcess, Control)> {
    let mut process = ServerProcess::start(&start.command(port, route, plugin))?;
    let http = Http::new("vLLM", &format!("http://127.0.0.1:{port}"), start.key.clone())?;
    let control = Control::new(http, start.driver.control_within);
    process.wait_until_ready(start.ready_within, |within| control.is_healthy(within), tell)?;
    Ok((process, control))
}

#[cfg(test)]
mod tests {
    #[test]
    fn its_counters_are_those_of_a_real_server() {
        super::COUNTERS.are_taped("vllm-0.32.0/text");
    }
}
