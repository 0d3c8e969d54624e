//! The threads of torch's own OpenMP, for work of ours between its products.
#![allow(unsafe_code)]

use crate::team::Start;

/// How to run work on torch's threads; None where they cannot be reached (torch is built without
/// GNU's OpenMP or Intel's, which has the same entry), or must not be used.
pub(super) fn start() -> Option<Start> {
    #[cfg(target_os = "linux")]
    return gnu::start();
    #[cfg(not(target_os = "linux"))]
    None
}

/// To be called when the module is loaded: remembers the process.
pub(super) fn remember_process() {
    #[cfg(target_os = "linux")]
    gnu::remember_process();
}

#[cfg(target_os = "linux")]
mod gnu {
    use std::any::Any;
    use std::ffi::{c_uint, c_void};
    use std::mem;
    use std::panic::{self, AssertUnwindSafe};
    use std::process;
    use std::sync::{Mutex, OnceLock, PoisonError};

    use crate::team::Start;

    /// What GCC makes of `#pragma omp parallel` (libgomp's manual, "Implementing PARALLEL
    /// construct"): the function is called with `data` on each of a team of threads, and the call
    /// returns when all have.
    type Parallel = unsafe extern "C" fn(
        function: extern "C" fn(*mut c_void),
        data: *mut c_void,
        threads: c_uint,
        flags: c_uint,
    );

    static PARALLEL: OnceLock<Option<Parallel>> = OnceLock::new();
    static PROCESS: OnceLock<u32> = OnceLock::new();

    pub(super) fn remember_process() {
        PROCESS.get_or_init(process::id);
    }

    pub(super) fn start() -> Option<Start> {
        // The threads do not survive a fork, and the child's copy of the library waits for them.
        if *PROCESS.get_or_init(process::id) != process::id() {
            return None;
        }
        // Looked up when there are tensors, so when torch is loaded.
        PARALLEL.get_or_init(find).map(|_| run as Start)
    }

    /// Torch loads the libraries it depends on for the whole process to see.
    fn find() -> Option<Parallel> {
        // SAFETY: `dlsym` with a C string and a handle that is defined for it.
        let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
        // SAFETY: a null pointer is None; anything else by that name is the function that is part
        // of the binary interface of libgomp since 4.0, of this type, and of those libraries that
        // stand in for it. It is never unloaded: torch depends on it.
        unsafe { mem::transmute::<*mut c_void, Option<Parallel>>(address) }
    }

    struct Shared<'a> {
        member: &'a (dyn Fn() + Sync),
        panicked: Mutex<Option<Box<dyn Any + Send>>>,
    }

    fn run(threads: usize, member: &(dyn Fn() + Sync)) {
        let Some(parallel) = PARALLEL.get().copied().flatten() else {
            return member();
        };
        let mut shared = Shared {
            member,
            panicked: Mutex::new(None),
        };
        let threads = c_uint::try_from(threads).unwrap_or(c_uint::MAX);
        // SAFETY: `call` takes what it is given here, which outlives the call, and may be shared
        // by threads: a `Sync` function and a mutex. It does not unwind.
        unsafe { parallel(call, (&raw mut shared).cast(), threads, 0) };
        let panicked = shared.panicked.into_inner();
        if let Some(payload) = panicked.unwrap_or_else(PoisonError::into_inner) {
            panic::resume_unwind(payload);
        }
    }

    extern "C" fn call(data: *mut c_void) {
        // SAFETY: `run` passes a pointer to a `Shared` that lives until every thread returned, and
        // nobody writes to it but through its mutex.
        let shared = unsafe { &*data.cast_const().cast::<Shared<'_>>() };
        if let Err(payload) = panic::catch_unwind(AssertUnwindSafe(shared.member)) {
            let mut first = shared
                .panicked
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(payload);
        }
    }
}
