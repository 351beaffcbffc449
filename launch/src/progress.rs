//! A line a round: on a terminal with colours, elsewhere plain.

use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::units::{Bytes, thousands};

/// What a round's line says.
#[derive(Clone, Debug)]
pub struct RoundLine {
    /// The round.
    pub round: u64,
    /// The last one, where there is one.
    pub of: Option<u64>,
    /// Mean training loss, nats per token.
    pub loss: f64,
    /// Tokens counted.
    pub tokens: u64,
    /// Members counted.
    pub contributors: usize,
    /// Seconds since the round before.
    pub secs: f64,
    /// Bytes one peer sent in the round.
    pub sent: u64,
}

/// Where lines go: stdout, or stderr where stdout belongs to a JSON report.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    to_stderr: bool,
    terminal: bool,
    colour: bool,
}

impl Progress {
    /// Lines on stdout, or on stderr if stdout is for `json`.
    pub fn new(json: bool) -> Self {
        let terminal = if json {
            std::io::stderr().is_terminal()
        } else {
            std::io::stdout().is_terminal()
        };
        Self {
            to_stderr: json,
            terminal,
            colour: terminal && std::env::var_os("NO_COLOR").is_none(),
        }
    }

    /// One line as it is.
    pub fn line(&self, text: &str) {
        // A reader that went away is no reason to stop training.
        let _ = if self.to_stderr {
            writeln!(std::io::stderr(), "{text}")
        } else {
            writeln!(std::io::stdout(), "{text}")
        };
    }

    /// Something worth noticing.
    pub fn note(&self, text: &str) {
        self.line(&self.paint("33", &format!("      {text}")));
    }

    /// A heading.
    pub fn head(&self, text: &str) {
        self.line(&self.paint("1", text));
    }

    /// A round.
    pub fn round(&self, line: &RoundLine) {
        let of = line.of.map_or(String::new(), |of| format!("/{of}"));
        let round = format!("{:>4}{of}", line.round);
        // A round in which nobody's work counted has no loss.
        let loss = if line.tokens > 0 {
            format!("{:.4}", line.loss)
        } else {
            "-".to_owned()
        };
        let rest = format!(
            "{:>9} tokens  {} contributed  {:>5.1} s  {:>9} sent",
            thousands(line.tokens),
            line.contributors,
            line.secs,
            Bytes(line.sent).to_string()
        );
        self.line(&format!(
            "round {}  loss {}  {}",
            self.paint("1", &round),
            self.paint("36", &loss),
            self.paint("2", &rest)
        ));
    }

    /// A bar for `total` bytes that are on their way; on a terminal only. It goes when it is dropped.
    pub fn bytes_bar(&self, total: u64) -> ProgressBar {
        let target = match (self.terminal, self.to_stderr) {
            (false, _) => ProgressDrawTarget::hidden(),
            (true, true) => ProgressDrawTarget::stderr(),
            (true, false) => ProgressDrawTarget::stdout(),
        };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        // A template that does not parse leaves the plain bar, which is one too.
        if let Ok(style) =
            ProgressStyle::with_template("      {bar:32} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left")
        {
            bar.set_style(style);
        }
        bar
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}
