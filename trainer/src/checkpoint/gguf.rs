//! GGUF files, read: header, metadata, and where the tensors lie.
//!
//! Versions 2 and 3 of the format, little-endian, as its specification (`ggml/docs/gguf.md`) has it:
//!
//! ```text
//! "GGUF" | version u32 | tensors u64 | keys u64
//! keys:    name | type u32 | value          a string is its length u64 and its bytes; an array is type u32, count u64 and its values
//! tensors: name | dimensions u32 | u64 each, the fastest first | type u32 | offset u64
//! padding to general.alignment (32), then the data that the offsets count from
//! ```
//!
//! A file may come from anyone. Every length is held against what is left of the file before anything is read for it, numbers in arrays stay
//! bytes, and tensors may neither overlap nor leave the file. So a file makes us take a small multiple of its own length at most.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::archive::{Archive, ImportError, Stored, at, wrong};
use super::encoding::Encoding;

/// Longest name of a key or tensor; the format says 65535 and 64.
const MAX_NAME: u64 = 65_535;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed one.
    Signed(i64),
    /// A float; single precision is widened to the nearest short decimal, so that 1e-5 stays 1e-5.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// A string.
    Text(String),
    /// An array of strings.
    Texts(Vec<String>),
    /// An array of numbers: the type of each, and their bytes.
    Numbers(u32, Vec<u8>),
}

/// A file's metadata, and its tensors.
#[derive(Debug)]
pub struct Gguf {
    pub(crate) path: PathBuf,
    metadata: BTreeMap<String, Value>,
    pub(crate) archive: Archive,
}

impl Gguf {
    /// Reads everything but the tensors' data.
    ///
    /// # Errors
    /// See [`ImportError`].
    pub fn open(path: &Path) -> Result<Self, ImportError> {
        let file = File::open(path).map_err(at(path))?;
        let len = file.metadata().map_err(at(path))?.len();
        let mut cursor = Cursor {
            path,
            reader: BufReader::new(file.try_clone().map_err(at(path))?),
            len,
            read: 0,
        };
        let (metadata, tensors) = cursor.header()?;
        let archive = Archive {
            path: path.to_owned(),
            files: vec![(path.to_owned(), file)],
            tensors,
        };
        Ok(Self {
            path: path.to_owned(),
            metadata,
            archive,
        })
    }

    /// A value, by key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A string that may be absent.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// An array of strings that may be absent.
    pub fn texts(&self, key: &str) -> Option<&[String]> {
        match self.get(key)? {
            Value::Texts(texts) => Some(texts),
            _ => None,
        }
    }

    /// An array of 32-bit integers that may be absent.
    pub fn integers(&self, key: &str) -> Option<Vec<i64>> {
        let Value::Numbers(kind, bytes) = self.get(key)? else {
            return None;
        };
        let four = bytes.as_chunks::<4>().0.iter();
        match kind {
            4 => Some(four.map(|b| i64::from(u32::from_le_bytes(*b))).collect()),
            5 => Some(four.map(|b| i64::from(i32::from_le_bytes(*b))).collect()),
            _ => None,
        }
    }
}

/// A place in the file, and how much is left behind it.
struct Cursor<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    len: u64,
    read: u64,
}

/// A tensor's entry before its place is checked.
struct Entry {
    name: String,
    /// Slowest first, as ours.
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

type Header = (BTreeMap<String, Value>, BTreeMap<String, Stored>);

impl Cursor<'_> {
    fn header(&mut self) -> Result<Header, ImportError> {
        let magic = self.bytes(4, "the magic")?;
        if magic != b"GGUF" {
            return Err(self.wrong(
                "the magic",
                format!("{:?}", String::from_utf8_lossy(&magic)),
                "\"GGUF\"",
            ));
        }
        let version = self.u32("the version")?;
        if !(2..=3).contains(&version) {
            return Err(self.wrong("the version", version, "2 or 3, little-endian"));
        }
        // A tensor's entry has 24 bytes at least, a key's 13.
        let tensors = self.count("the number of tensors", 24)?;
        let keys = self.count("the number of keys", 13)?;
        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let name = self.name("a key's name")?;
            let value = self.value(&name)?;
            if metadata.insert(name.clone(), value).is_some() {
                return Err(self.wrong(&format!("key {name}"), "there twice", "there once"));
            }
        }
        let mut entries = Vec::new();
        for _ in 0..tensors {
            entries.push(self.entry()?);
        }
        let stored = self.place(entries, alignment(&metadata))?;
        Ok((metadata, stored))
    }

    /// A tensor's entry.
    fn entry(&mut self) -> Result<Entry, ImportError> {
        let name = self.name("a tensor's name")?;
        let what = format!("tensor {name}");
        let dimensions = self.u32(&what)?;
        if !(1..=4).contains(&dimensions) {
            return Err(self.wrong(&what, format!("of {dimensions} dimensions"), "1 to 4"));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64(&what)?;
            shape.push(usize::try_from(size).map_err(|_| self.wrong(&what, size, "a size that can be"))?);
        }
        shape.reverse();
        Ok(Entry {
            shape,
            kind: self.u32(&what)?,
            offset: self.u64(&what)?,
            name,
        })
    }

    /// Where the data of `entries` lie; the cursor stands behind the last of them.
    fn place(&self, mut entries: Vec<Entry>, alignment: u64) -> Result<BTreeMap<String, Stored>, ImportError> {
        let data = self
            .read
            .checked_next_multiple_of(alignment)
            .filter(|&data| data <= self.len || entries.is_empty())
            .ok_or_else(|| self.wrong("the file", format!("{} bytes long", self.len), "data behind its header"))?;
        entries.sort_by_key(|entry| entry.offset);
        let (mut tensors, mut free) = (BTreeMap::new(), 0_u64);
        for entry in entries {
            let what = format!("tensor {}", entry.name);
            if !entry.offset.is_multiple_of(alignment) || entry.offset < free {
                let expected = format!("a multiple of {alignment} from {free} on, where the one before it ends");
                return Err(self.wrong(&what, format!("at {}", entry.offset), expected));
            }
            let encoding = encoding(entry.kind);
            // What is not read here is not measured either: one byte, so that no two begin at one place.
            let bytes = match encoding {
                Some(encoding) => self.bytes_of(&entry, encoding)?,
                None => 1,
            };
            let end = data
                .checked_add(entry.offset)
                .and_then(|start| start.checked_add(bytes));
            if end.is_none_or(|end| end > self.len) {
                let (found, expected) = (
                    format!("{bytes} bytes at {}", entry.offset),
                    format!("to end within the {} bytes of the file", self.len),
                );
                return Err(self.wrong(&what, found, expected));
            }
            free = entry.offset + bytes;
            let stored = Stored {
                kind: format!("type {}", entry.kind),
                encoding,
                shape: entry.shape,
                file: 0,
                offset: data + entry.offset,
            };
            if tensors.insert(entry.name, stored).is_some() {
                return Err(self.wrong(&what, "there twice", "there once"));
            }
        }
        Ok(tensors)
    }

    /// The length of a tensor's data; its rows are whole blocks.
    fn bytes_of(&self, entry: &Entry, encoding: Encoding) -> Result<u64, ImportError> {
        let (values, bytes) = encoding.block();
        let row = entry.shape.last().copied().unwrap_or(0);
        let count = entry
            .shape
            .iter()
            .try_fold(1_usize, |count, &size| count.checked_mul(size));
        let blocks = count
            .filter(|_| row > 0 && row.is_multiple_of(values))
            .map(|count| count / values);
        blocks
            .and_then(|blocks| (blocks as u64).checked_mul(bytes as u64))
            .ok_or_else(|| {
                let what = format!("tensor {}", entry.name);
                self.wrong(
                    &what,
                    format!("of shape {:?}", entry.shape),
                    format!("rows of a multiple of {values}"),
                )
            })
    }

    fn value(&mut self, key: &str) -> Result<Value, ImportError> {
        let kind = self.u32(key)?;
        match kind {
            8 => Ok(Value::Text(self.string(key)?)),
            9 => self.array(key),
            _ => {
                let bytes = self.bytes(self.width(kind, key)?, key)?;
                Ok(scalar(kind, &bytes))
            }
        }
    }

    fn array(&mut self, key: &str) -> Result<Value, ImportError> {
        let kind = self.u32(key)?;
        if kind == 8 {
            let count = self.count(key, 8)?;
            let mut texts = Vec::new();
            for _ in 0..count {
                texts.push(self.string(key)?);
            }
            return Ok(Value::Texts(texts));
        }
        let width = self.width(kind, key)?;
        let count = self.count(key, width)?;
        Ok(Value::Numbers(kind, self.bytes(count * width, key)?))
    }

    /// Bytes of a number or bool.
    fn width(&self, kind: u32, key: &str) -> Result<u64, ImportError> {
        match kind {
            0 | 1 | 7 => Ok(1),
            2 | 3 => Ok(2),
            4..=6 => Ok(4),
            10..=12 => Ok(8),
            _ => Err(self.wrong(
                &format!("the type of {key}"),
                kind,
                "a number, a string, or an array of those",
            )),
        }
    }

    /// A count of things of at least `least` bytes each, all of them still to come.
    fn count(&mut self, what: &str, least: u64) -> Result<u64, ImportError> {
        let count = self.u64(what)?;
        let most = (self.len - self.read) / least;
        if count > most {
            return Err(self.wrong(
                what,
                count,
                format!("at most {most}, the file having {} bytes", self.len),
            ));
        }
        Ok(count)
    }

    fn string(&mut self, what: &str) -> Result<String, ImportError> {
        let len = self.count(what, 1)?;
        let bytes = self.bytes(len, what)?;
        String::from_utf8(bytes).map_err(|_| self.wrong(what, "not UTF-8", "UTF-8"))
    }

    fn name(&mut self, what: &str) -> Result<String, ImportError> {
        let name = self.string(what)?;
        if name.is_empty() || name.len() as u64 > MAX_NAME {
            return Err(self.wrong(what, format!("{} bytes long", name.len()), format!("1 to {MAX_NAME}")));
        }
        Ok(name)
    }

    fn u32(&mut self, what: &str) -> Result<u32, ImportError> {
        let bytes = self.bytes(4, what)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn u64(&mut self, what: &str) -> Result<u64, ImportError> {
        let low = self.u32(what)?;
        Ok(u64::from(self.u32(what)?) << 32 | u64::from(low))
    }

    /// The next `count` bytes, if the file has them.
    fn bytes(&mut self, count: u64, what: &str) -> Result<Vec<u8>, ImportError> {
        let left = self.len - self.read;
        if count > left {
            return Err(self.wrong(
                what,
                format!("cut off at byte {}", self.len),
                format!("{count} bytes at {}", self.read),
            ));
        }
        let mut bytes = vec![0; usize::try_from(count).unwrap_or(usize::MAX)];
        self.reader.read_exact(&mut bytes).map_err(at(self.path))?;
        self.read += count;
        Ok(bytes)
    }

    fn wrong(&self, what: &str, found: impl ToString, expected: impl Into<String>) -> ImportError {
        wrong(self.path, what, found, expected)
    }
}

/// The data's alignment: 32 unless the file says otherwise; what it says is kept to what can be.
fn alignment(metadata: &BTreeMap<String, Value>) -> u64 {
    match metadata.get("general.alignment") {
        Some(&Value::Unsigned(alignment)) if alignment.is_power_of_two() => alignment,
        _ => 32,
    }
}

/// A number or bool; `bytes` are as many as [`Cursor::width`] says.
fn scalar(kind: u32, bytes: &[u8]) -> Value {
    let mut eight = [0; 8];
    eight[..bytes.len()].copy_from_slice(bytes);
    let (unsigned, unused) = (u64::from_le_bytes(eight), 64 - 8 * bytes.len() as u32);
    match kind {
        1 | 3 | 5 | 11 => Value::Signed((unsigned as i64) << unused >> unused),
        6 => Value::Float(shortest(f32::from_bits(unsigned as u32))),
        7 => Value::Bool(unsigned != 0),
        12 => Value::Float(f64::from_bits(unsigned)),
        _ => Value::Unsigned(unsigned),
    }
}

/// The double nearest to the shortest decimal that means this single: 1e-5 and not 9.99999974e-6.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

/// The encodings that are read, by the format's numbers.
fn encoding(kind: u32) -> Option<Encoding> {
    match kind {
        0 => Some(Encoding::F32),
        1 => Some(Encoding::F16),
        2 => Some(Encoding::Q4_0),
        3 => Some(Encoding::Q4_1),
        8 => Some(Encoding::Q8_0),
        14 => Some(Encoding::Q6K),
        30 => Some(Encoding::Bf16),
        _ => None,
    }
}
