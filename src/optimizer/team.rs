//! Threads that share work, of which the calling one is the first.
//!
//! A pool's `install` puts the caller to sleep and wakes others in its place. The system wakes a
//! thread where it last ran; so with as many workers as processors, and the caller besides, two of
//! three may find themselves on one processor, and stay there for as long as a step takes: on two
//! processors 18 to 23 ms in place of 12. With the caller as one of the team everybody keeps a
//! processor from step to step.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::ThreadPool;

/// The calling thread and those of a pool.
#[derive(Debug, Clone, Copy)]
pub struct Team<'a> {
    pool: Option<&'a ThreadPool>,
}

impl<'a> Team<'a> {
    /// The calling thread alone.
    pub const ALONE: Team<'static> = Team { pool: None };

    /// The calling thread and those of the pool, which it must not be one of.
    #[must_use]
    pub const fn of(pool: &'a ThreadPool) -> Self {
        Self { pool: Some(pool) }
    }

    /// How many they are.
    #[must_use]
    pub fn threads(self) -> usize {
        1 + self.pool.map_or(0, ThreadPool::current_num_threads)
    }

    /// Runs `first` on all of its tasks and then `second` on all of its own; whoever is free takes
    /// the next. Threads are woken once.
    pub(super) fn in_turn<A: Send, B: Send>(
        self,
        first_tasks: Vec<A>,
        first: impl Fn(A) + Sync,
        second_tasks: Vec<B>,
        second: impl Fn(B) + Sync,
    ) {
        let tasks = first_tasks.len().max(second_tasks.len());
        let others = self.threads().min(tasks).saturating_sub(1);
        let left = AtomicUsize::new(first_tasks.len());
        let (first_tasks, second_tasks) = (Queue::new(first_tasks), Queue::new(second_tasks));
        let share = || {
            while let Some(task) = first_tasks.next() {
                // Though the task panics, nobody waits for ever.
                let _done = Countdown(&left);
                first(task);
            }
            let mut turns = 0_u32;
            while left.load(Ordering::Acquire) > 0 {
                turns += 1;
                if turns < SPINS {
                    std::hint::spin_loop();
                } else {
                    std::thread::yield_now();
                }
            }
            while let Some(task) = second_tasks.next() {
                second(task);
            }
        };
        match self.pool {
            Some(pool) if others > 0 => pool.in_place_scope(|scope| {
                for _ in 0..others {
                    scope.spawn(|_| share());
                }
                share();
            }),
            _ => share(),
        }
    }
}

/// How often a thread looks whether others are done before it offers its processor to them: some
/// 10 µs, in which most are.
const SPINS: u32 = 256;

struct Queue<T>(Mutex<std::vec::IntoIter<T>>);

impl<T> Queue<T> {
    fn new(tasks: Vec<T>) -> Self {
        Self(Mutex::new(tasks.into_iter()))
    }

    fn next(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).next()
    }
}

/// Counts one down when it goes.
struct Countdown<'a>(&'a AtomicUsize);

impl Drop for Countdown<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    fn every_task_is_done_once_and_the_first_ones_before_the_others() {
        for threads in [1, 2, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().expect("a pool");
            for team in [Team::ALONE, Team::of(&pool)] {
                for (first, second) in [(0, 9), (9, 0), (1, 1), (300, 500)] {
                    let (done, sum) = (AtomicUsize::new(0), AtomicU64::new(0));
                    team.in_turn(
                        (0..first).collect::<Vec<usize>>(),
                        |_| {
                            done.fetch_add(1, Ordering::Relaxed);
                        },
                        (0..second).collect::<Vec<u64>>(),
                        |task| {
                            assert_eq!(done.load(Ordering::Relaxed), first);
                            sum.fetch_add(task, Ordering::Relaxed);
                        },
                    );
                    assert_eq!(done.into_inner(), first);
                    assert_eq!(sum.into_inner(), (0..second).sum::<u64>());
                }
            }
        }
    }
}
