//! All runs of a plan, several side by side, each kept in a file of its own: a bench that was stopped goes on with the runs that are missing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::plan::{Plan, Series, Task};
use super::simulate::{Data, Outcome, Point, simulate};
use crate::arms::ArmError;
use crate::local::set_threads;

/// Why a bench stopped.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A run failed.
    #[error("{arm} at learning rate {lr}: {source}")]
    Run {
        /// The arm.
        arm: String,
        /// The learning rate.
        lr: f64,
        /// What failed.
        source: ArmError,
    },
    /// A result cannot be kept or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// News of a bench.
pub enum Progress<'a> {
    /// A point of a run.
    Point(&'a Task, Point),
    /// A run has ended, or was there already.
    Done(&'a Outcome, usize, usize),
}

/// A plan, its text, and the folder that keeps its results.
#[derive(Debug)]
pub struct Bench {
    /// What is compared.
    pub plan: Plan,
    /// What is learned.
    pub data: Data,
    /// Where results lie.
    pub folder: PathBuf,
    /// Runs side by side, on one thread each.
    pub jobs: usize,
}

impl Bench {
    /// Runs what is missing and returns all, series by series: first the trials in order, then the troubles.
    ///
    /// # Errors
    /// The first run that failed, or a file that cannot be written.
    pub fn run(&self, tell: &(dyn Fn(Progress<'_>) + Sync)) -> Result<Vec<Vec<Outcome>>, BenchError> {
        let runs = self.folder.join("runs");
        fs::create_dir_all(&runs).map_err(|source| BenchError::Io {
            path: runs.clone(),
            source,
        })?;
        let mut all = Vec::new();
        for series in &self.plan.series {
            let mut outcomes = self.side_by_side(&series.trials(), &runs, tell)?;
            outcomes.extend(self.side_by_side(&troubled(series, &outcomes), &runs, tell)?);
            all.push(outcomes);
        }
        Ok(all)
    }

    fn side_by_side(
        &self,
        tasks: &[Task],
        runs: &Path,
        tell: &(dyn Fn(Progress<'_>) + Sync),
    ) -> Result<Vec<Outcome>, BenchError> {
        let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let results: Mutex<Vec<(usize, Result<Outcome, BenchError>)>> = Mutex::default();
        let work = || {
            // One thread a run: runs are many, and libtorch's threads would wait for one another.
            set_threads(1);
            while let Some((number, task)) = take(tasks, &next) {
                let result = self.one(task, runs, tell);
                let failed = result.is_err();
                if let Ok(outcome) = &result {
                    tell(Progress::Done(
                        outcome,
                        done.fetch_add(1, Ordering::Relaxed) + 1,
                        tasks.len(),
                    ));
                }
                if let Ok(mut results) = results.lock() {
                    results.push((number, result));
                }
                if failed {
                    next.store(tasks.len(), Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..self.jobs.clamp(1, tasks.len().max(1)) {
                scope.spawn(work);
            }
        });
        let mut results = results.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        results.sort_by_key(|(number, _)| *number);
        results.into_iter().map(|(_, result)| result).collect()
    }

    /// The result of a task: the one that is there, or a new one.
    fn one(&self, task: &Task, runs: &Path, tell: &(dyn Fn(Progress<'_>) + Sync)) -> Result<Outcome, BenchError> {
        let path = runs.join(file_name(task));
        if let Some(outcome) = read(&path, task) {
            return Ok(outcome);
        }
        let outcome = simulate(task, &self.data, &|point| tell(Progress::Point(task, point)));
        let outcome = outcome.map_err(|source| BenchError::Run {
            arm: task.arm.clone(),
            lr: task.lr,
            source,
        })?;
        write(&path, &outcome).map_err(|source| BenchError::Io { path, source })?;
        Ok(outcome)
    }
}

fn take<'t>(tasks: &'t [Task], next: &AtomicUsize) -> Option<(usize, &'t Task)> {
    let number = next.fetch_add(1, Ordering::Relaxed);
    tasks.get(number).map(|task| (number, task))
}

/// The troubles of a series, at the best learning rate of their arm.
fn troubled(series: &Series, trials: &[Outcome]) -> Vec<Task> {
    let best = |name: &str| {
        let own = trials.iter().filter(|outcome| outcome.task.arm == name);
        own.min_by(|a, b| a.loss().total_cmp(&b.loss()))
    };
    let task = |(name, trouble): &(String, _)| {
        best(name).map(|outcome| Task {
            trouble: *trouble,
            ..outcome.task.clone()
        })
    };
    series.troubles.iter().filter_map(task).collect()
}

/// A name that tells tasks apart, by the hash of all that they are.
fn file_name(task: &Task) -> String {
    // A task is plain data: it always has a JSON form.
    let text = serde_json::to_string(task).unwrap_or_default();
    let word: String = task
        .arm
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    format!("{word}-{}.json", &blake3::hash(text.as_bytes()).to_hex()[..12])
}

/// A kept result, if it is whole and of this task.
fn read(path: &Path, task: &Task) -> Option<Outcome> {
    let outcome: Outcome = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (outcome.task == *task).then_some(outcome)
}

/// Written aside first, so that a bench killed here leaves no half result.
fn write(path: &Path, outcome: &Outcome) -> io::Result<()> {
    let aside = path.with_extension("part");
    fs::write(&aside, serde_json::to_vec_pretty(outcome)?)?;
    fs::rename(aside, path)
}
