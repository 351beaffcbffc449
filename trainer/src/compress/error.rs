//! What can be wrong with settings and inputs of one's own, and with the bytes of others.

/// The codec's settings do not fit, or what it should encode cannot be encoded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CodecError {
    /// The chunk length is not allowed.
    #[error("chunk length must be a multiple of 64 from 64 to 65536, not {found}")]
    ChunkLength {
        /// The length asked for.
        found: usize,
    },
    /// `k` does not fit the chunk.
    #[error("k must be from 1 to the chunk length {chunk}, not {found}")]
    K {
        /// The chunk length.
        chunk: usize,
        /// The k asked for.
        found: usize,
    },
    /// The decay of the accumulator is not a number from 0 to 1.
    #[error("beta must be from 0 to 1, not {found}")]
    Beta {
        /// The decay asked for.
        found: f32,
    },
    /// No parameters, or more than 2^40.
    #[error("the number of parameters must be from 1 to 2^40, not {found}")]
    Params {
        /// The number asked for.
        found: usize,
    },
    /// An input has another length than the model.
    #[error("{what} has {found} values, the model {expected}")]
    Length {
        /// Which input.
        what: &'static str,
        /// Parameters of the model.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// `beta * e + d` is infinite or not a number somewhere.
    #[error("parameter {index}: accumulator plus pseudo-gradient is {value}")]
    NotFinite {
        /// The first such parameter.
        index: usize,
        /// What came out.
        value: f32,
    },
}

/// Bytes that no honest encoder has written. Each names the first thing found wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shards are missing or left over.
    #[error("a contribution has {expected} shards here, not {found}")]
    ShardCount {
        /// Shards that the model takes.
        expected: usize,
        /// Shards given.
        found: usize,
    },
    /// The first bytes of a shard are not those of this version and quantiser.
    #[error("shard {shard} begins with {found:?}, not {expected:?}")]
    Header {
        /// The shard.
        shard: usize,
        /// Version, quantiser and two zeros.
        expected: [u8; 4],
        /// What is there, at most four bytes.
        found: Vec<u8>,
    },
    /// The length of a shard is not what its block lengths add up to.
    #[error("shard {shard} has {found} bytes, not {expected}")]
    ShardLength {
        /// The shard.
        shard: usize,
        /// Header, lengths and blocks.
        expected: u64,
        /// Bytes given.
        found: usize,
    },
    /// A block is longer than any block can be.
    #[error("block {block} claims {found} bytes, more than {limit}")]
    BlockLength {
        /// The block.
        block: usize,
        /// The longest encoding of it.
        limit: usize,
        /// The length claimed.
        found: usize,
    },
    /// A block's bits end before its content does.
    #[error("block {block} ends early")]
    BlockEndsEarly {
        /// The block.
        block: usize,
    },
    /// Whole bytes are left over after a block's content.
    #[error("block {block} has bytes left over")]
    BlockEndsLate {
        /// The block.
        block: usize,
    },
    /// The bits that fill a block's last byte are not zero.
    #[error("the padding of block {block} is not zero")]
    Padding {
        /// The block.
        block: usize,
    },
    /// An index lies outside its chunk.
    #[error("an index of chunk {chunk} is not below {limit}")]
    IndexOutOfRange {
        /// The chunk.
        chunk: usize,
        /// Its length.
        limit: u64,
    },
    /// A value of a dense contribution that no encoder writes.
    #[error("parameter {param} is {value}, not a multiple of 2^-32 below 16 in magnitude", value = f32::from_bits(*.bits))]
    Value {
        /// The parameter.
        param: usize,
        /// The bits of the value.
        bits: u32,
    },
    /// Two levels that no encoder writes: in the wrong order, or said of nothing.
    #[error("chunk {chunk} has levels {codes:?}, {high} values of the higher one")]
    Levels {
        /// The chunk.
        chunk: usize,
        /// Its scale codes.
        codes: [u8; 2],
        /// Values said to have the higher level.
        high: usize,
    },
    /// Values in eight bits under a scale that no encoder gives them.
    #[error("chunk {chunk} has scale code {code} for values of at most {largest} steps")]
    Steps {
        /// The chunk.
        chunk: usize,
        /// Its scale code.
        code: u8,
        /// The largest magnitude in it, in steps.
        largest: u8,
    },
    /// The Rice parameter is not the best for its block.
    #[error("block {block} has Rice parameter {found}, not {expected}")]
    RiceParameter {
        /// The block.
        block: usize,
        /// The best for its gaps, as far as they were read.
        expected: u8,
        /// The one given.
        found: u8,
    },
}
