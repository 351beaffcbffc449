//! Numbers as people write and read them: `5M`, `61,440`, `1.2 MB`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes (or bytes a second), written `800k`, `5M`, `2.5G` or plainly; the letters are powers of 1000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is not an amount of bytes; write a number above 0, with k, M, G or T if you like: 800k, 5M"
            )
        };
        let trimmed = text
            .trim()
            .trim_end_matches("/s")
            .trim_end_matches(['B', 'b'])
            .trim_end();
        let (number, factor) = match trimmed.chars().last() {
            Some('k' | 'K') => (&trimmed[..trimmed.len() - 1], 1e3),
            Some('M' | 'm') => (&trimmed[..trimmed.len() - 1], 1e6),
            Some('G' | 'g') => (&trimmed[..trimmed.len() - 1], 1e9),
            Some('T' | 't') => (&trimmed[..trimmed.len() - 1], 1e12),
            _ => (trimmed, 1.0),
        };
        let value: f64 = number.trim().parse().map_err(|_| wrong())?;
        let bytes = value * factor;
        if (1.0..1e18).contains(&bytes) {
            Ok(Self(bytes as u64))
        } else {
            Err(wrong())
        }
    }
}

impl TryFrom<String> for Bytes {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> Self {
        bytes.0.to_string()
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} B", self.0),
            1_000..1_000_000 => write!(f, "{:.1} kB", bytes / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} MB", bytes / 1e6),
            _ => write!(f, "{:.2} GB", bytes / 1e9),
        }
    }
}

/// A number with its thousands set apart: `1,843,200`.
pub fn thousands(number: impl Into<u128>) -> String {
    let digits = number.into().to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("800k", 800_000),
            ("5M", 5_000_000),
            ("2.5G", 2_500_000_000),
            ("17", 17),
            ("5 MB/s", 5_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "M", "-5", "0", "five", "1e400", "nan"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_are_shown_in_groups_of_three() {
        let shown = [0_u64, 999, 1000, 61_440, 1_843_200].map(thousands);
        assert_eq!(shown, ["0", "999", "1,000", "61,440", "1,843,200"]);
        assert_eq!(Bytes(45_300).to_string(), "45.3 kB");
    }
}
