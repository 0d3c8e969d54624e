//! Thread pools that follow `torch.get_num_threads()`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::{Error, Result};

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
        .map_err(|error: Error| super::errors::to_python(&error))
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
