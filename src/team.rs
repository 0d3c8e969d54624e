//! Threads that share work: those that the host program already has, or rayon's.
//!
//! A program that computes with OpenMP keeps its threads spinning between two products. A second
//! pool's threads then share processors with them: on two processors, decoding 2 to 30 MB took as
//! long as on one after any product of torch's, and half of that on torch's own threads, which
//! moreover need no waking. So a host may [lend](lend) its threads to a call.

use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

/// Runs a function on up to so many threads at once, the calling one among them, and returns when
/// all have returned.
pub type Start = fn(threads: usize, member: &(dyn Fn() + Sync));

thread_local! {
    static LENT: Cell<Option<(Start, usize)>> = const { Cell::new(None) };
}

/// Does `work`, in which [`each`] runs on so many threads of a host instead of rayon's.
pub fn lend<R>(start: Start, threads: usize, work: impl FnOnce() -> R) -> R {
    struct Restore(Option<(Start, usize)>);
    impl Drop for Restore {
        fn drop(&mut self) {
            LENT.set(self.0);
        }
    }
    let _restore = Restore(LENT.replace(Some((start, threads))));
    work()
}

/// Does `work`, in which [`each`] runs on the calling thread alone: for work so small that others
/// would take longer to join in.
pub fn alone<R>(work: impl FnOnce() -> R) -> R {
    lend(|_, member| member(), 1, work)
}

/// How many threads [`each`] has here.
#[must_use]
pub fn threads() -> usize {
    match LENT.get() {
        Some((_, threads)) => threads.max(1),
        None => rayon::current_num_threads(),
    }
}

/// Runs `work` on every task, on the threads that the host has lent or on the current rayon pool.
/// Whoever is free takes the next.
pub fn each<T: Send>(tasks: Vec<T>, work: impl Fn(T) + Send + Sync) {
    let Some((start, threads)) = LENT.get() else {
        tasks.into_par_iter().for_each(work);
        return;
    };
    let threads = threads.min(tasks.len());
    if threads <= 1 {
        tasks.into_iter().for_each(work);
        return;
    }
    let tasks = Mutex::new(tasks.into_iter());
    start(threads, &|| {
        loop {
            let task = tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(task) = task else {
                return;
            };
            work(task);
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::{LENT, each, lend};

    static STARTED: AtomicUsize = AtomicUsize::new(0);

    fn start(threads: usize, member: &(dyn Fn() + Sync)) {
        STARTED.fetch_add(1, Ordering::SeqCst);
        thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(member);
            }
            member();
        });
    }

    fn doubled(count: usize) -> Vec<usize> {
        let mut numbers: Vec<usize> = (0..count).collect();
        each(numbers.iter_mut().collect(), |number| *number *= 2);
        numbers
    }

    #[test]
    fn every_task_is_done_once_by_whomever() {
        for count in [0, 1, 2, 100] {
            let expected: Vec<usize> = (0..count).map(|number| 2 * number).collect();
            assert_eq!(doubled(count), expected);
            let before = STARTED.load(Ordering::SeqCst);
            for threads in 0..4 {
                assert_eq!(lend(start, threads, || doubled(count)), expected);
            }
            let started = STARTED.load(Ordering::SeqCst) - before;
            assert_eq!(started, if count > 1 { 2 } else { 0 }, "{count} tasks");
        }
    }

    #[test]
    fn what_was_lent_is_given_back_whatever_happens() {
        let failed = std::panic::catch_unwind(|| {
            lend(start, 1, || each(vec![1], |_| panic!("of the test")));
        });
        assert!(failed.is_err());
        assert!(LENT.get().is_none());
        lend(start, 2, || {
            lend(start, 3, || ());
            assert_eq!(LENT.get().map(|(_, threads)| threads), Some(2));
        });
    }
}
