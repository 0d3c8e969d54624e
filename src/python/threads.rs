//! Thread pools that follow `torch.get_num_threads()`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::errors::to_python;
use crate::{Error, Result, blockwise};

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

/// [`detached`] for blockwise work on so many elements: few are done by the calling thread, since
/// handing them to a pool would take longer.
pub(super) fn detached_blockwise<T: Send>(
    py: Python<'_>,
    threads: usize,
    elements: usize,
    work: impl FnOnce() -> Result<T> + Send,
) -> PyResult<T> {
    if blockwise::is_small(elements) {
        return py.detach(work).map_err(|error| to_python(&error));
    }
    detached(py, threads, work)
}

fn pool(threads: usize) -> PyResult<Arc<ThreadPool>> {
    let key = (std::process::id(), threads.max(1));
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
