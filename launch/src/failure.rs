//! Failures as exit codes: 2 for wrong usage or input (someone has to change what they typed), 1 for everything else.

use std::fmt;

/// Wrong usage or input: one message that names what was found, what is allowed and what to do.
#[derive(Debug)]
pub struct Usage(String);

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// An error that ends the process with exit code 2.
pub fn usage(message: impl fmt::Display) -> anyhow::Error {
    anyhow::Error::new(Usage(message.to_string()))
}

/// The process's exit code for this error.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.downcast_ref::<Usage>().is_some() { 2 } else { 1 }
}

/// What happened and why, in one line: each cause that the text before it does not tell already.
pub fn told(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn wrong_input_ends_with_2_even_under_a_context() {
        let wrong: anyhow::Result<()> = Err(usage("no such file"));
        assert_eq!(exit_code(&wrong.context("reading the run").unwrap_err()), 2);
        assert_eq!(exit_code(&anyhow::anyhow!("the disk is full")), 1);
    }

    #[test]
    fn a_cause_that_was_told_is_not_told_again() {
        #[derive(Debug)]
        struct Disk(std::io::Error);
        impl fmt::Display for Disk {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "disk: {}", self.0)
            }
        }
        impl std::error::Error for Disk {
            fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
                Some(&self.0)
            }
        }
        let full = Disk(std::io::Error::other("no space left"));
        let error = anyhow::Error::new(full).context("the record store failed");
        assert_eq!(told(&error), "the record store failed: disk: no space left");
    }
}
