//! A small machine with shared memory, and a search through everything it can do
//!
//! Each rank has a program of atomic instructions. [`explore`] follows every interleaving of them, and of the moments at
//! which the memory takes a store, breadth first: what it finds wrong it shows in the fewest steps.
//!
//! Loads are done in the order of the program. A processor that moves loads ahead of an acquiring one is not modelled.

use std::collections::HashMap;
use std::fmt;

/// A word of the shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word(u8);

/// In what order the memory takes a rank's stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// At once: sequential consistency.
    Sequential,
    /// In order but late, from a buffer that only their rank sees into, as on x86 (total store order).
    Buffered,
    /// Late and in any order that their rank's `Release` and `SeqCst` leave free.
    Unordered,
}

/// What a store promises about those before it and, if sequentially consistent, about loads after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Relaxed,
    Release,
    SeqCst,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instruction {
    Store(Word, u8, Order),
    /// An atomic addition, sequentially consistent.
    Add(Word, i8),
    /// Goes on once the word has this value: a rank that spins.
    Await(Word, u8),
    /// Loads into the rank's register; jumps if it is this.
    JumpIfEqual(Word, u8, usize),
    JumpIfZero(Word, usize),
    Jump(usize),
    /// Sleeps until woken, unless the word differs from the register: a futex. Never wakes by itself.
    Sleep(Word),
    /// Wakes all that sleep on the word.
    Wake(Word),
    /// Begins to write many bytes: whoever reads them meanwhile gets a mixture.
    BeginWrite(Word),
    EndWrite(Word, u8),
    BeginRead(Word),
    /// Ends reading; this must be what was read.
    EndRead(Word, u8),
    /// Loads; this must be what was loaded.
    Expect(Word, u8),
}

/// What ranks do, and on what.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    words: Vec<String>,
    programs: Vec<Vec<Instruction>>,
}

impl Model {
    pub(crate) fn new(ranks: usize) -> Self {
        Model { words: Vec::new(), programs: vec![Vec::new(); ranks] }
    }

    pub(crate) fn ranks(&self) -> usize {
        self.programs.len()
    }

    /// The word of this name, which is 0 at first.
    pub(crate) fn word(&mut self, name: impl Into<String>) -> Word {
        let name = name.into();
        let known = self.words.iter().position(|word| *word == name);
        let index = known.unwrap_or(self.words.len());
        if known.is_none() {
            self.words.push(name);
        }
        Word(u8::try_from(index).expect("at most 256 words"))
    }

    pub(crate) fn push(&mut self, rank: usize, instruction: Instruction) {
        self.programs[rank].push(instruction);
    }

    /// Where the next instruction of `rank` will be.
    pub(crate) fn here(&self, rank: usize) -> usize {
        self.programs[rank].len()
    }

    fn describe(&self, event: Event) -> String {
        let name = |word: Word| &self.words[word.0 as usize];
        match event {
            Event::Taken(rank, word, value) => {
                format!("memory takes rank {rank}'s {value} in {}", name(word))
            }
            Event::Done(rank, at) => {
                let text = format!("{:?}", self.programs[rank][at]);
                let named = self.words.iter().enumerate().fold(text, |text, (index, word)| {
                    text.replace(&format!("Word({index})"), &format!("`{word}`"))
                });
                format!("rank {rank}: {named}")
            }
        }
    }
}

/// A store that the memory has not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pending {
    word: u8,
    value: u8,
    /// Not before all that are older.
    release: bool,
    /// Ends a write of many bytes.
    ends_write: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Thread {
    at: u16,
    register: u8,
    asleep_on: Option<u8>,
    reading: Option<u8>,
    pending: Vec<Pending>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    memory: Vec<u8>,
    /// Words being written: from the beginning of the write until the memory has it all.
    writing: Vec<u8>,
    threads: Vec<Thread>,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Done(usize, usize),
    Taken(usize, Word, u8),
}

/// What a search found: how far it went, or the shortest way to something wrong.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    /// Nothing wrong in so many states.
    Nothing {
        states: usize,
    },
    Fault {
        what: String,
        trace: Vec<String>,
    },
}

impl Found {
    /// The fault's name, if there is one.
    pub(crate) fn fault(&self) -> Option<&str> {
        match self {
            Found::Nothing { .. } => None,
            Found::Fault { what, .. } => Some(what),
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Nothing { states } => write!(f, "nothing wrong in {states} states"),
            Found::Fault { what, trace } => {
                write!(f, "{what}, after\n  {}", trace.join("\n  "))
            }
        }
    }
}

/// Follows everything that `model` can do on this kind of memory.
pub(crate) fn explore(model: &Model, memory: Memory) -> Found {
    let thread = Thread { at: 0, register: 0, asleep_on: None, reading: None, pending: Vec::new() };
    let first = State {
        memory: vec![0; model.words.len()],
        writing: Vec::new(),
        threads: vec![thread; model.ranks()],
    };
    let mut ids: HashMap<State, u32> = HashMap::from([(first.clone(), 0)]);
    let mut states = vec![first];
    // How each state was first reached, and from where else it is.
    let mut origin: Vec<Option<(u32, Event)>> = vec![None];
    let mut before: Vec<Vec<u32>> = vec![Vec::new()];
    let mut ends = Vec::new();
    let trace = |origin: &[Option<(u32, Event)>], mut id: u32, last: Option<Event>| {
        let mut events: Vec<Event> = last.into_iter().collect();
        while let Some((from, event)) = origin[id as usize] {
            events.push(event);
            id = from;
        }
        events.into_iter().rev().map(|event| model.describe(event)).collect::<Vec<_>>()
    };
    let mut next = 0;
    while next < states.len() {
        let (id, state) = (next as u32, states[next].clone());
        next += 1;
        let mut moves = Vec::new();
        for rank in 0..model.ranks() {
            memory.take(&state, rank, &mut moves);
            match step(model, memory, &state, rank) {
                Ok(after) => {
                    let at = state.threads[rank].at as usize;
                    moves.extend(after.map(|after| (Event::Done(rank, at), after)));
                }
                Err(what) => {
                    let event = Event::Done(rank, state.threads[rank].at as usize);
                    return Found::Fault { what, trace: trace(&origin, id, Some(event)) };
                }
            }
        }
        if moves.is_empty() {
            let done = |(rank, t): (usize, &Thread)| usize::from(t.at) == model.programs[rank].len();
            if !state.threads.iter().enumerate().all(done) {
                return Found::Fault { what: "nobody can go on".into(), trace: trace(&origin, id, None) };
            }
            ends.push(id);
        }
        for (event, after) in moves {
            let new = states.len() as u32;
            let to = *ids.entry(after).or_insert_with_key(|after| {
                states.push(after.clone());
                origin.push(Some((id, event)));
                before.push(Vec::new());
                new
            });
            before[to as usize].push(id);
        }
    }
    // From everywhere there must be a way to the end, or some ranks can only go round in circles.
    let mut reaches_end = vec![false; states.len()];
    while let Some(id) = ends.pop() {
        if !std::mem::replace(&mut reaches_end[id as usize], true) {
            ends.extend(&before[id as usize]);
        }
    }
    match reaches_end.iter().position(|reaches| !reaches) {
        Some(id) => Found::Fault { what: "no way to the end".into(), trace: trace(&origin, id as u32, None) },
        None => Found::Nothing { states: states.len() },
    }
}

impl Memory {
    /// All ways in which this memory may take a store of `rank` now.
    fn take(self, state: &State, rank: usize, moves: &mut Vec<(Event, State)>) {
        let pending = &state.threads[rank].pending;
        for (index, store) in pending.iter().enumerate() {
            let same_word_before = pending[..index].iter().any(|older| older.word == store.word);
            let free = match self {
                Memory::Sequential | Memory::Buffered => index == 0,
                Memory::Unordered => index == 0 || !store.release && !same_word_before,
            };
            if free {
                let mut after = state.clone();
                after.threads[rank].pending.remove(index);
                after.memory[store.word as usize] = store.value;
                if store.ends_write {
                    after.writing.retain(|word| *word != store.word);
                }
                moves.push((Event::Taken(rank, Word(store.word), store.value), after));
            }
        }
    }
}

/// What a rank's next instruction leads to; none if it cannot be done now.
fn step(model: &Model, memory: Memory, state: &State, rank: usize) -> Result<Option<State>, String> {
    let thread = &state.threads[rank];
    let Some(instruction) = model.programs[rank].get(thread.at as usize) else { return Ok(None) };
    if thread.asleep_on.is_some() {
        return Ok(None);
    }
    // A rank sees its own stores before the memory has them.
    let load = |word: Word| {
        let own = thread.pending.iter().rev().find(|store| store.word == word.0);
        own.map_or(state.memory[word.0 as usize], |store| store.value)
    };
    let name = |word: Word| &model.words[word.0 as usize];
    let mut after = state.clone();
    let me = &mut after.threads[rank];
    me.at += 1;
    let store = |me: &mut Thread, word: Word, value: u8, order: Order, ends_write: bool| {
        me.pending.push(Pending { word: word.0, value, release: order != Order::Relaxed, ends_write });
    };
    match *instruction {
        Instruction::Store(word, value, Order::SeqCst) => {
            if !thread.pending.is_empty() {
                return Ok(None);
            }
            after.memory[word.0 as usize] = value;
        }
        Instruction::Store(word, value, _) if memory == Memory::Sequential => {
            after.memory[word.0 as usize] = value;
        }
        Instruction::Store(word, value, order) => store(me, word, value, order, false),
        Instruction::Add(word, delta) => {
            if !thread.pending.is_empty() {
                return Ok(None);
            }
            after.memory[word.0 as usize] = state.memory[word.0 as usize].wrapping_add_signed(delta);
        }
        Instruction::Await(word, value) => {
            if load(word) != value {
                return Ok(None);
            }
        }
        Instruction::JumpIfEqual(word, value, to) => {
            me.register = load(word);
            if me.register == value {
                me.at = to as u16;
            }
        }
        Instruction::JumpIfZero(word, to) => {
            if load(word) == 0 {
                me.at = to as u16;
            }
        }
        Instruction::Jump(to) => me.at = to as u16,
        Instruction::Sleep(word) => {
            // The kernel compares what is in memory.
            if state.memory[word.0 as usize] == thread.register {
                me.asleep_on = Some(word.0);
            }
        }
        Instruction::Wake(word) => {
            for thread in &mut after.threads {
                if thread.asleep_on == Some(word.0) {
                    thread.asleep_on = None;
                }
            }
        }
        Instruction::BeginWrite(word) => {
            let reader = state.threads.iter().position(|thread| thread.reading == Some(word.0));
            if let Some(reader) = reader {
                return Err(format!("rank {rank} writes to {} while rank {reader} reads it", name(word)));
            }
            after.writing.push(word.0);
            after.writing.sort_unstable();
        }
        Instruction::EndWrite(word, value) => {
            if memory == Memory::Sequential {
                after.memory[word.0 as usize] = value;
                after.writing.retain(|w| *w != word.0);
            } else {
                store(me, word, value, Order::Relaxed, true);
            }
        }
        Instruction::BeginRead(word) => {
            if state.writing.contains(&word.0) {
                return Err(format!("rank {rank} reads {} while it is being written", name(word)));
            }
            me.reading = Some(word.0);
        }
        Instruction::EndRead(word, value) => {
            if load(word) != value {
                return Err(format!("rank {rank} read {} from {}, not {value}", load(word), name(word)));
            }
            me.reading = None;
        }
        Instruction::Expect(word, value) => {
            if load(word) != value {
                return Err(format!("rank {rank} found {} in {}, not {value}", load(word), name(word)));
            }
        }
    }
    Ok(Some(after))
}
