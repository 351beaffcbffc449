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
}
