//! Tables of a bench: Markdown to read, CSV to reckon with.
//!
//! **Modelled time.** Every worker computes for the same time in every arm, at the median speed measured over all runs of the series; then it receives
//! what the others sent, over a link that carries nothing else: `(N - 1)` contributions, or for sums that can go round a ring (`ddp`,
//! `diloco`) `2 (N - 1) / N` of one. Nothing overlaps.

use std::fmt::Write as _;

use super::plan::{Series, Trouble};
use super::simulate::Outcome;

/// Links of the modelled times, Mbit/s.
pub const LINKS: [f64; 3] = [10.0, 100.0, 1000.0];

/// Outcomes of one series, ready to be written.
pub struct Report<'a> {
    series: &'a Series,
    outcomes: &'a [Outcome],
    /// Seconds that a worker computes for a token.
    token_seconds: f64,
}

impl<'a> Report<'a> {
    /// A report of the outcomes of `series`.
    #[must_use]
    pub fn new(series: &'a Series, outcomes: &'a [Outcome]) -> Self {
        let mut paces: Vec<f64> = outcomes.iter().filter_map(pace).collect();
        paces.sort_by(f64::total_cmp);
        Self {
            series,
            outcomes,
            token_seconds: paces.get(paces.len() / 2).copied().unwrap_or(0.0),
        }
    }

    /// The best run of every arm without trouble, in the order of the plan.
    #[must_use]
    pub fn best(&self) -> Vec<&'a Outcome> {
        let of = |name: &str| {
            let own = self.outcomes.iter().filter(|outcome| outcome.task.arm == name);
            own.filter(|outcome| outcome.task.trouble == Trouble::default())
                .min_by(|a, b| a.loss().total_cmp(&b.loss()))
        };
        self.series.arms.iter().filter_map(|arm| of(&arm.name)).collect()
    }

    /// The runs with trouble.
    pub fn troubled(&self) -> impl Iterator<Item = &'a Outcome> {
        self.outcomes
            .iter()
            .filter(|outcome| outcome.task.trouble != Trouble::default())
    }

    /// Modelled seconds of a run over a link of `mbit` Mbit/s.
    #[must_use]
    pub fn seconds(&self, outcome: &Outcome, mbit: f64) -> f64 {
        let Some(last) = outcome.points.last() else { return 0.0 };
        let workers = outcome.task.setting.workers as f64;
        let received = match outcome.task.kind.ring() {
            true => 2.0 * (workers - 1.0) / workers,
            false => workers - 1.0,
        };
        let link = received * outcome.contribution_bytes * last.exchanges as f64 * 8.0 / (mbit * 1e6);
        self.token_seconds * last.tokens as f64 / workers + link
    }

    /// The tables in Markdown.
    #[must_use]
    pub fn markdown(&self) -> String {
        let setting = &self.series.setting;
        let params = self.outcomes.first().map_or(0, |outcome| outcome.params);
        let mut out = format!(
            "**{}** ({:.2}M parameters), {} workers, H = {}, {} tokens a step, {} rounds, {:.2}M tokens; each arm at the best learning rate tried\n\n",
            setting.model,
            params as f64 / 1e6,
            setting.workers,
            setting.inner_steps,
            setting.step_tokens(),
            setting.rounds,
            setting.tokens() as f64 / 1e6,
        );
        out.push_str("| arm | lr | bytes a parameter and exchange | exchanges | MB sent by a worker | loss, nats a byte | against the best dense | at 10 / 100 / 1000 Mbit/s |\n|---|---|---|---|---|---|---|---|\n");
        let dense = self.dense();
        for outcome in self.best() {
            let _ = writeln!(out, "{}", self.row(outcome, dense));
        }
        if self.troubled().next().is_some() {
            out.push_str("\n| arm | trouble | rule | loss | against no trouble |\n|---|---|---|---|---|\n");
        }
        for outcome in self.troubled() {
            let _ = writeln!(out, "{}", self.troubled_row(outcome));
        }
        out
    }

    /// The loss of the best dense arm; not a number without one.
    fn dense(&self) -> f64 {
        let dense = self.best().into_iter().filter(|best| best.task.arm.starts_with("ddp"));
        dense.map(Outcome::loss).fold(f64::NAN, f64::min)
    }

    fn row(&self, outcome: &Outcome, dense: f64) -> String {
        let last = outcome.points.last();
        let [slow, middle, fast] = LINKS.map(|mbit| duration(self.seconds(outcome, mbit)));
        format!(
            "| {} | {} | {:.4} | {} | {:.2} | {} | {} | {slow} / {middle} / {fast} |",
            outcome.task.arm,
            outcome.task.lr,
            outcome.contribution_bytes / outcome.params as f64,
            last.map_or(0, |point| point.exchanges),
            last.map_or(0.0, |point| point.bytes) / 1e6,
            loss(outcome),
            against(outcome.loss(), dense),
        )
    }

    fn troubled_row(&self, outcome: &Outcome) -> String {
        let trouble = outcome.task.trouble;
        let what = match trouble.attack {
            Some(attack) => format!(
                "{} of {}: {}",
                trouble.attackers,
                outcome.task.setting.workers + trouble.attackers,
                attack.name()
            ),
            None if trouble.dropout_permille > 0 => format!("{}% of rounds missed", trouble.dropout_permille / 10),
            None => "none".to_owned(),
        };
        let same = |other: &&&Outcome| other.task.arm == outcome.task.arm;
        let without = self.best().iter().find(same).map_or(f64::NAN, |best| best.loss());
        let rule = trouble.rule.name();
        let (name, loss) = (&outcome.task.arm, loss(outcome));
        format!(
            "| {name} | {what} | {rule} | {loss} | {} |",
            against(outcome.loss(), without)
        )
    }

    /// Every point of every run.
    #[must_use]
    pub fn csv(&self) -> String {
        let mut out = String::from(
            "model,workers,arm,lr,dropout_permille,attackers,attack,rule,params,tokens,exchanges,bytes,bytes_per_param,loss,diverged",
        );
        LINKS.iter().for_each(|mbit| {
            let _ = write!(out, ",seconds_at_{mbit}_mbit");
        });
        out.push('\n');
        for outcome in self.outcomes {
            for point in &outcome.points {
                self.csv_row(&mut out, outcome, point);
            }
        }
        out
    }

    fn csv_row(&self, out: &mut String, outcome: &Outcome, point: &super::Point) {
        let (task, trouble) = (&outcome.task, outcome.task.trouble);
        let _ = write!(
            out,
            "{},{},\"{}\",{},{},{},{},{},{},{},{},{:.0},{:.6},{:.5},{}",
            task.setting.model,
            task.setting.workers,
            task.arm,
            task.lr,
            trouble.dropout_permille,
            trouble.attackers,
            trouble.attack.map_or("", super::Attack::name),
            trouble.rule.name(),
            outcome.params,
            point.tokens,
            point.exchanges,
            point.bytes,
            outcome.contribution_bytes / outcome.params as f64,
            point.loss,
            outcome.diverged.is_some(),
        );
        let until = Outcome {
            points: vec![*point],
            ..outcome.clone()
        };
        for mbit in LINKS {
            let _ = write!(out, ",{:.1}", self.seconds(&until, mbit));
        }
        out.push('\n');
    }
}

/// Seconds of computing for a token, of a run that came anywhere.
fn pace(outcome: &Outcome) -> Option<f64> {
    let tokens = outcome.points.last()?.tokens;
    Some(outcome.work_seconds / tokens as f64)
}

fn loss(outcome: &Outcome) -> String {
    match &outcome.diverged {
        Some(_) => "diverged".to_owned(),
        None => format!("{:.3}", outcome.loss()),
    }
}

fn against(loss: f64, other: f64) -> String {
    match loss.is_finite() && other.is_finite() {
        true => format!("{:+.1}%", 100.0 * (loss / other - 1.0)),
        false => "–".to_owned(),
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
