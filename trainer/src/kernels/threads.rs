//! Work shared out over the threads that libtorch computes with.
//!
//! libtorch's OpenMP threads spin for a while after each operator. Threads of one's own would wait for a core that a spinning one holds, so
//! the passes between two operators run on the same threads.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Elements below which sharing out costs more than it saves.
const LEAST: usize = 1 << 14;

/// Jobs that a large pass is cut into. A fixed number, so that nothing depends on the threads; several times the usual number of threads, so
/// that one that is held up does not hold up the others.
const JOBS: usize = 32;

/// Rows of `width` elements that one job takes, of `rows` in all; at least one.
pub(crate) fn rows_per_job(rows: usize, width: usize) -> usize {
    let jobs = if rows * width < LEAST { 1 } else { JOBS };
    rows.div_ceil(jobs).max(1)
}

/// Threads that libtorch computes with here.
fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}

/// Jobs that wait for a thread.
struct Queue<F> {
    jobs: Vec<Mutex<Option<F>>>,
    next: AtomicUsize,
}

impl<F: FnOnce()> Queue<F> {
    fn work(&self) {
        while let Some(slot) = self.jobs.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            // A job that panics ends the process (below), so no lock is ever poisoned.
            if let Some(job) = slot.lock().ok().and_then(|mut slot| slot.take()) {
                job();
            }
        }
    }
}

/// Runs all jobs and returns when the last has ended. A job must not panic: that ends the process.
pub(crate) fn run<F: FnOnce() + Send>(jobs: Vec<F>) {
    let threads = threads().min(jobs.len());
    let queue = Queue {
        jobs: jobs.into_iter().map(|job| Mutex::new(Some(job))).collect(),
        next: AtomicUsize::new(0),
    };
    if threads <= 1 {
        queue.work();
    } else {
        team(&queue, threads);
    }
}

/// Lets `threads` threads work on the queue: OpenMP's.
#[cfg(target_os = "linux")]
fn team<F: FnOnce() + Send>(queue: &Queue<F>, threads: usize) {
    use std::ffi::{c_uint, c_void};

    unsafe extern "C" {
        /// What a compiler makes of `#pragma omp parallel num_threads(threads)`: `work(data)` on that many threads, this one among them.
        fn GOMP_parallel(work: extern "C" fn(*mut c_void), data: *mut c_void, threads: c_uint, flags: c_uint);
    }

    extern "C" fn work<F: FnOnce() + Send>(data: *mut c_void) {
        // SAFETY: `data` is the queue of `team` below, of this very `F`, which stays borrowed until all threads have returned. It is
        // shared only as `&Queue<F>`, which is `Sync`: its jobs are `Send` and behind locks.
        let queue = unsafe { &*data.cast::<Queue<F>>() };
        queue.work();
    }

    let data = std::ptr::from_ref(queue).cast_mut().cast::<c_void>();
    // SAFETY: the signature is libgomp's, against which libtorch is linked; the function returns when every thread has left `work`, which never
    // unwinds (a panic in an `extern "C"` function ends the process) and only reads through `data`.
    unsafe { GOMP_parallel(work::<F>, data, threads as c_uint, 0) }
}

/// Lets `threads` threads work on the queue.
#[cfg(not(target_os = "linux"))]
fn team<F: FnOnce() + Send>(queue: &Queue<F>, threads: usize) {
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|| queue.work());
        }
        queue.work();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_runs_once() {
        for count in [0, 1, 2, 100] {
            let mut done = vec![0; count];
            run(done.iter_mut().map(|done| move || *done += 1).collect());
            assert_eq!(done, vec![1; count]);
        }
    }

    #[test]
    fn a_large_pass_is_cut_and_a_small_one_is_not() {
        assert_eq!(rows_per_job(10, 10), 10);
        assert_eq!(rows_per_job(2048, 256), 64);
        assert_eq!(rows_per_job(0, 256), 1);
    }
}
