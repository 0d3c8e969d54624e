//! Thread pools that follow `torch.get_num_threads()`.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::errors::to_python;
use super::openmp;
use crate::convert::MOST_THREADS;
use crate::{Error, Result, team};

/// Between two calls of a progress callback, and two looks for Ctrl-C.
pub(super) const INTERVAL: Duration = Duration::from_millis(50);

/// Pools by process and thread count.
type Pools = HashMap<(u32, usize), Arc<ThreadPool>>;

/// Threads do not survive `fork`, so a child must not use its parent's pools.
static POOLS: Mutex<Option<Pools>> = Mutex::new(None);

/// Releases the GIL and runs `work` on a pool of `threads` threads.
pub(super) fn detached<T: Send>(
    py: Python<'_>,
    threads: usize,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    let pool = pool(threads)?;
    py.detach(|| pool.install(work))
        .map_err(|error: Error| to_python(&error))
}

/// Releases the GIL and runs `work`, which shares itself by [`team::each`] alone: on torch's threads
/// where they can be reached, else on a pool. What is small is done by the calling thread, since
/// handing it to others would take longer.
pub(super) fn detached_team<T: Send>(
    py: Python<'_>,
    threads: usize,
    is_small: bool,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    if is_small {
        return py.detach(work).map_err(|error| to_python(&error));
    }
    let Some(start) = openmp::start() else {
        return detached(py, threads, work);
    };
    py.detach(|| team::lend(start, threads.clamp(1, MOST_THREADS), work))
        .map_err(|error| to_python(&error))
}

/// [`detached`] for work that takes long: every [`INTERVAL`] and at the end, on the calling
/// thread, looks for Ctrl-C and calls `progress` with what `work` has told its [`Watch`]. What
/// either raises stops the work and is raised again.
pub(super) fn detached_watched<T: Send>(
    py: Python<'_>,
    threads: usize,
    progress: Option<&Py<PyAny>>,
    work: impl FnOnce(&Watch) -> Result<T> + Send,
) -> PyResult<T> {
    let pool = pool(threads)?;
    let watch = Watch::default();
    py.detach(|| {
        let (finish, finished) = channel();
        thread::scope(|scope| {
            let watch = &watch;
            thread::Builder::new()
                .name("fourbit-watched".to_owned())
                .spawn_scoped(scope, move || {
                    // The other end waits for it.
                    let _ = finish.send(pool.install(|| work(watch)));
                })?;
            let mut raised = None;
            loop {
                let result = finished.recv_timeout(INTERVAL);
                // A failure is told by itself.
                let going_well = matches!(result, Ok(Ok(_)) | Err(RecvTimeoutError::Timeout));
                if raised.is_none() && going_well {
                    raised = watch.tell(progress).err();
                    watch.stop.store(raised.is_some(), Ordering::Relaxed);
                }
                match result {
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => {
                        return Err(PyRuntimeError::new_err("a thread panicked; please report"));
                    }
                    Ok(result) => {
                        return match raised {
                            Some(error) => Err(error),
                            None => result.map_err(|error| to_python(&error)),
                        };
                    }
                }
            }
        })
    })
}

/// How far long work is, and whether it is to stop.
#[derive(Default)]
pub(super) struct Watch {
    done: AtomicU64,
    total: AtomicU64,
    stop: AtomicBool,
}

impl Watch {
    /// From the work: so much is done.
    pub(super) fn note(&self, done: u64, total: u64) -> ControlFlow<()> {
        // Threads may overtake each other.
        self.done.fetch_max(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        if self.stop.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    /// To Python, where the work has said anything yet.
    fn tell(&self, progress: Option<&Py<PyAny>>) -> PyResult<()> {
        let done = self.done.load(Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        Python::attach(|py| {
            py.check_signals()?;
            match progress.filter(|_| total > 0) {
                Some(progress) => progress.call1(py, (done, total)).map(|_| ()),
                None => Ok(()),
            }
        })
    }
}

fn pool(threads: usize) -> PyResult<Arc<ThreadPool>> {
    let key = (std::process::id(), threads.clamp(1, MOST_THREADS));
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let pools = pools.get_or_insert_default();
    if let Some(pool) = pools.get(&key) {
        return Ok(Arc::clone(pool));
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(key.1)
        .thread_name(|index| format!("fourbit-{index}"))
        .build()
        .map_err(|error| PyRuntimeError::new_err(format!("no thread pool: {error}")))?;
    let pool = Arc::new(pool);
    pools.insert(key, Arc::clone(&pool));
    Ok(pool)
}
