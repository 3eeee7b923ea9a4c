//! A bounded pool of buffers that batches are collated into, for memory that is dear to allocate.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::Error;

/// Buffers that go round: a collate function takes one and fills it, the consumer uploads from it, and when it is dropped
/// the next batch takes it again.
///
/// The memory is the caller's kind: page-locked memory, from which a GPU copies fast and while the host goes on, or any
/// other that is a slice of bytes. There are at most as many buffers as were asked for. A [`DataLoader`](crate::DataLoader)
/// whose batches are one pass never waits for one where there are `prefetch_batches + 1` of them and each batch is dropped
/// before the next one is asked for; with micro-batches it needs so many for each pass. With fewer it waits, and in the
/// end says so.
///
/// ```
/// use std::time::Duration;
/// use lightrft_data::{
///     DataLoader, DistributedSampler, Error, InMemory, LoaderConfig, SamplerConfig, Shuffle, StagingPool, Tail,
/// };
///
/// let numbers: InMemory<u32> = (0..1000).collect();
/// let sampler = DistributedSampler::new(SamplerConfig {
///     len: 1000, rank: 0, world: 1, seed: 0, shuffle: Shuffle::InOrder, tail: Tail::Pad,
/// })?;
/// let config = LoaderConfig { workers: 2, ..LoaderConfig::new(8) };
/// // Ordinary memory here; for a GPU, a type of yours that owns what cudaHostAlloc gave.
/// let ordinary = |bytes| Ok(vec![0; bytes]);
/// let pool = StagingPool::new(config.prefetch_batches + 1, Duration::from_secs(60), ordinary)?;
/// let mut loader = DataLoader::new(numbers, sampler, config)?.collating(move |numbers: Vec<u32>| {
///     let mut buffer = pool.take(numbers.len() * size_of::<u32>())?;
///     for (place, number) in buffer.chunks_exact_mut(size_of::<u32>()).zip(&numbers) {
///         place.copy_from_slice(&number.to_le_bytes());
///     }
///     Ok(buffer)
/// });
/// let batch = loader.next_batch()?.expect("an epoch of 125 batches");
/// assert_eq!(batch.passes[0].data[..8], [0, 0, 0, 0, 1, 0, 0, 0]);
/// # Ok::<_, Error>(())
/// ```
pub struct StagingPool<M> {
    shared: Arc<Shared<M>>,
}

/// A buffer of a [`StagingPool`]: as many bytes as were asked for, holding whatever was last written there. Dropping gives
/// it back, so it must live until a copy that was begun from it has ended.
pub struct StagingBuffer<M> {
    /// `None` while it is being allocated.
    memory: Option<M>,
    len: usize,
    shared: Arc<Shared<M>>,
}

/// Makes memory of at least so many bytes.
type Allocate<M> = Box<dyn Fn(usize) -> Result<M, Error> + Send + Sync>;

struct Shared<M> {
    buffers: usize,
    deadline: Duration,
    allocate: Allocate<M>,
    state: Mutex<State<M>>,
    returned: Condvar,
}

struct State<M> {
    free: Vec<M>,
    /// Free ones, ones that are out, and ones that are being allocated.
    buffers: usize,
}

impl<M> Shared<M> {
    fn lock(&self) -> MutexGuard<'_, State<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: AsRef<[u8]> + AsMut<[u8]>> StagingPool<M> {
    /// At most `buffers` buffers, each allocated when it is first needed. [`take`](Self::take) waits no longer than
    /// `deadline`.
    ///
    /// # Errors
    /// [`Error::Setting`] for no buffers.
    pub fn new(
        buffers: usize,
        deadline: Duration,
        allocate: impl Fn(usize) -> Result<M, Error> + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        if buffers == 0 {
            return Err(Error::Setting { setting: "staging buffers", value: 0, expected: "at least 1" });
        }
        let state = Mutex::new(State { free: Vec::new(), buffers: 0 });
        let (allocate, returned) = (Box::new(allocate), Condvar::new());
        Ok(Self { shared: Arc::new(Shared { buffers, deadline, allocate, state, returned }) })
    }

    /// A buffer of so many bytes. One that is free and large enough is used again; otherwise memory is asked for, rounded
    /// up to a power of two so that a batch that is a little longer need not ask again.
    ///
    /// # Errors
    /// [`Error::StagingExhausted`] where all buffers stay in use until the deadline; what the allocation says.
    pub fn take(&self, bytes: usize) -> Result<StagingBuffer<M>, Error> {
        let begin = Instant::now();
        let Shared { buffers, deadline, .. } = *self.shared;
        let mut state = self.shared.lock();
        let memory = loop {
            let fits = |memory: &M| memory.as_ref().len() >= bytes;
            if let Some(free) = state.free.iter().position(fits) {
                break Some(state.free.swap_remove(free));
            }
            if state.buffers < buffers {
                state.buffers += 1;
                break None;
            }
            if state.free.pop().is_some() {
                break None; // too small: it is let go, and a larger one takes its place
            }
            let left = deadline.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return Err(Error::StagingExhausted { buffers, waited: deadline });
            }
            let waited = self.shared.returned.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        drop(state);
        // From here on the buffer gives its place back whatever happens.
        let mut buffer = StagingBuffer { memory, len: bytes, shared: Arc::clone(&self.shared) };
        if buffer.memory.is_none() {
            let memory = (self.shared.allocate)(bytes.checked_next_power_of_two().unwrap_or(bytes))?;
            let value = memory.as_ref().len();
            if value < bytes {
                let expected = "as many bytes as were asked for";
                return Err(Error::Setting { setting: "bytes of staging memory", value, expected });
            }
            buffer.memory = Some(memory);
        }
        Ok(buffer)
    }
}

impl<M> Clone for StagingPool<M> {
    /// The same pool.
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<M: AsRef<[u8]>> Deref for StagingBuffer<M> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory.as_ref().and_then(|memory| memory.as_ref().get(..self.len)).unwrap_or_default()
    }
}

impl<M: AsRef<[u8]> + AsMut<[u8]>> DerefMut for StagingBuffer<M> {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut().and_then(|memory| memory.as_mut().get_mut(..self.len)).unwrap_or_default()
    }
}

impl<M> Drop for StagingBuffer<M> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        match self.memory.take() {
            Some(memory) => state.free.push(memory),
            None => state.buffers -= 1,
        }
        drop(state);
        self.shared.returned.notify_one();
    }
}

impl<M> fmt::Debug for StagingPool<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free = self.shared.lock().free.len();
        f.debug_struct("StagingPool")
            .field("buffers", &self.shared.buffers)
            .field("free", &free)
            .finish_non_exhaustive()
    }
}

impl<M> fmt::Debug for StagingBuffer<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StagingBuffer({} bytes)", self.len)
    }
}
