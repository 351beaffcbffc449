//! `murmur wait --until 'round>=10'`: for scripts.

use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::cli::WaitArgs;
use crate::failure::usage;
use crate::peer_dir::PeerDir;
use crate::status::Status;

/// What can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Round,
    Members,
    Loss,
    ValLoss,
    Tokens,
}

/// How it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    AtLeast,
    AtMost,
    Above,
    Below,
    Equal,
}

/// One condition on a peer's status.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    text: String,
    field: Field,
    relation: Relation,
    value: f64,
}

impl FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not a condition; compare round, members, loss, val_loss or tokens with >=, <=, >, < or ==, as in 'round>=10'"
            )
        };
        let relations = [
            (">=", Relation::AtLeast),
            ("<=", Relation::AtMost),
            ("==", Relation::Equal),
            (">", Relation::Above),
            ("<", Relation::Below),
        ];
        let (name, relation, value) = relations
            .into_iter()
            .find_map(|(sign, relation)| text.split_once(sign).map(|(name, value)| (name, relation, value)))
            .ok_or_else(wrong)?;
        let field = match name.trim() {
            "round" => Field::Round,
            "members" => Field::Members,
            "loss" => Field::Loss,
            "val_loss" => Field::ValLoss,
            "tokens" => Field::Tokens,
            _ => return Err(wrong()),
        };
        let value = value
            .trim()
            .parse()
            .ok()
            .filter(|value: &f64| value.is_finite())
            .ok_or_else(wrong)?;
        Ok(Self {
            text: text.to_owned(),
            field,
            relation,
            value,
        })
    }
}

impl Condition {
    fn holds(&self, status: &Status) -> bool {
        let found = match self.field {
            Field::Round => Some(status.round as f64),
            Field::Members => Some(status.members.len() as f64),
            Field::Loss => status.loss,
            Field::ValLoss => status.val_loss,
            Field::Tokens => Some(status.tokens as f64),
        };
        found.is_some_and(|found| match self.relation {
            Relation::AtLeast => found >= self.value,
            Relation::AtMost => found <= self.value,
            Relation::Above => found > self.value,
            Relation::Below => found < self.value,
            Relation::Equal => found == self.value,
        })
    }
}

/// Waits until all conditions hold.
pub fn wait(args: &WaitArgs) -> Result<()> {
    if !(args.timeout > 0.0 && args.timeout <= 1e7) {
        return Err(usage(format!(
            "--timeout {}: seconds, above 0 and at most 10000000",
            args.timeout
        )));
    }
    let dir = PeerDir::find(args.dir.dir.as_deref())?;
    let deadline = Instant::now() + Duration::from_secs_f64(args.timeout);
    loop {
        let status = Status::read(dir.path());
        let open = args
            .until
            .iter()
            .find(|condition| !status.as_ref().is_some_and(|status| condition.holds(status)));
        let Some(open) = open else { return Ok(()) };
        if Instant::now() >= deadline {
            let stands = status.map_or("it has no status yet".to_owned(), |s| {
                format!("it stands at round {}, {} members", s.round, s.members.len())
            });
            bail!(
                "after {} s {} does not hold in {}: {stands}",
                args.timeout,
                open.text,
                dir.path().display()
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_are_read_as_they_are_written() {
        let read: Condition = " val_loss <= 2.1".parse().unwrap();
        assert_eq!(
            (read.field, read.relation, read.value),
            (Field::ValLoss, Relation::AtMost, 2.1)
        );
        for wrong in [
            "",
            "round",
            "round>=",
            "round>=ten",
            "rounds>=1",
            "round=>1",
            "loss<nan",
        ] {
            assert!(wrong.parse::<Condition>().is_err(), "{wrong}");
        }
    }
}
