//! Catches SIGINT and SIGTERM while a launcher runs, and gives them their usual effect back afterwards

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag::register_conditional_default;
use signal_hook::iterator::{Handle, Signals as Caught};

pub(super) const INTERRUPT: i32 = SIGINT;

/// Whether signals have their default effect, and how many launchers run. Made by the first of them.
static RUNNING: Mutex<Option<(Arc<AtomicBool>, usize)>> = Mutex::new(None);

/// Signals go to a function until this is dropped.
pub(super) struct Signals {
    handle: Handle,
}

impl Signals {
    pub(super) fn forward(to: impl Fn(i32) + Send + 'static) -> io::Result<Self> {
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        let (default, launchers) = match &mut *running {
            Some(running) => running,
            none => {
                // A caught signal stays caught when its last handler goes; this handler ends the process, as
                // if it had never been caught, whenever no launcher runs.
                let default = Arc::new(AtomicBool::new(true));
                register_conditional_default(SIGINT, default.clone())?;
                register_conditional_default(SIGTERM, default.clone())?;
                none.insert((default, 0))
            }
        };
        let mut caught = Caught::new([SIGINT, SIGTERM])?;
        let handle = caught.handle();
        thread::Builder::new()
            .name("lightrft-signals".into())
            .spawn(move || caught.forever().for_each(to))?;
        *launchers += 1;
        default.store(false, Ordering::SeqCst);
        Ok(Signals { handle })
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.handle.close();
        let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((default, launchers)) = &mut *running {
            *launchers -= 1;
            default.store(*launchers == 0, Ordering::SeqCst);
        }
    }
}
