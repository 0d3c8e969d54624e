//! What can be wrong with a checkpoint, as values.

use super::FileDtype;

/// What can be wrong with a checkpoint file or folder.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointProblem {
    /// Another format under the name of a safetensors file.
    #[error(
        "this is {looks_like}, not a safetensors file; download or save it again as safetensors"
    )]
    NotSafetensors {
        /// What its first bytes say.
        looks_like: &'static str,
    },
    /// A file too short to have a header.
    #[error("it has {bytes} bytes, too few for a safetensors header")]
    TooShort {
        /// Its length.
        bytes: u64,
    },
    /// A header longer than the format allows.
    #[error("its header claims {claimed} bytes, and at most {limit} are allowed")]
    HeaderTooLong {
        /// Length by the first eight bytes.
        claimed: u64,
        /// The bound.
        limit: u64,
    },
    /// A header that ends after the file.
    #[error("its header claims {claimed} bytes and the file has {bytes}: it is cut off")]
    HeaderCutOff {
        /// Length by the first eight bytes.
        claimed: u64,
        /// Length of the file.
        bytes: u64,
    },
    /// JSON that is malformed or of another schema, in a header or another file.
    #[error("its {what} is not valid: {reason}")]
    Json {
        /// Which JSON.
        what: &'static str,
        /// The parser's words.
        reason: String,
    },
    /// A tensor name that is empty, too long, or holds control characters.
    #[error(
        "the tensor name {name:?} is empty, longer than {} bytes or holds control characters",
        super::header::MAX_NAME_BYTES
    )]
    TensorName {
        /// The name's first hundred characters.
        name: String,
    },
    /// A name that stands twice.
    #[error("the tensor {name:?} stands twice")]
    DuplicateTensor {
        /// The name.
        name: String,
    },
    /// An element type that is not in the safetensors format.
    #[error("its dtype {dtype:?} is unknown")]
    UnknownDtype {
        /// As written.
        dtype: String,
    },
    /// An element type that cannot be quantized.
    #[error(
        "its dtype {dtype} cannot be quantized, only F32, F16 and BF16 can; leave it as it is with \
         a skip pattern"
    )]
    UnsupportedDtype {
        /// The type.
        dtype: FileDtype,
    },
    /// Data that does not begin where the previous tensor's ends, or ends before it begins.
    #[error(
        "its data stands at bytes {start} to {end} where it must start at {expected}: there is a \
         hole or an overlap"
    )]
    Offsets {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
        /// Where it should start.
        expected: u64,
    },
    /// Dtype and shape that need another number of bytes.
    #[error("its dtype and shape need {expected} bytes and it has {got}")]
    TensorBytes {
        /// By dtype and shape.
        expected: u64,
        /// By its offsets, or the caller's buffer.
        got: u64,
    },
    /// Sub-byte elements that do not fill their last byte.
    #[error("its dtype {dtype} and shape {shape:?} do not fill whole bytes")]
    PartialByte {
        /// The type.
        dtype: FileDtype,
        /// The shape.
        shape: Vec<u64>,
    },
    /// A file longer or shorter than its header says.
    #[error("it has {got} bytes where its header needs {expected}: it is cut off or has a tail")]
    FileBytes {
        /// By its header.
        expected: u64,
        /// In fact.
        got: u64,
    },
    /// A file that shrank while it was read.
    #[error("it ended early while it was read")]
    EndedEarly,
    /// A source that changed during a conversion.
    #[error("it changed while it was being converted; start again when nothing writes to it")]
    SourceChanged,
    /// Something that is no regular file.
    #[error("it is not a regular file")]
    NotAFile,
    /// Something that is no folder.
    #[error("it is not a folder; give the folder that holds the model's files")]
    NotAFolder,
    /// A symbolic link other than those of the Hugging Face cache.
    #[error(
        "it is a symbolic link to {target:?}, and only links within the Hugging Face cache \
         (../../blobs/<hash>) are followed"
    )]
    Link {
        /// Where it points.
        target: String,
    },
    /// A folder without weights that can be read.
    #[error(
        "it holds no model.safetensors and no model.safetensors.index.json{}",
        if *pickles { "; pickle files (.bin, .pt) are never read, save it as safetensors first" }
        else { "" }
    )]
    NoWeights {
        /// Whether it holds pickled weights.
        pickles: bool,
    },
    /// A folder whose writing was interrupted.
    #[error("its writing was interrupted; run the same conversion again, and it continues")]
    Unfinished,
    /// Both a single file and an index.
    #[error("it holds both model.safetensors and model.safetensors.index.json; delete one")]
    Ambiguous,
    /// An index that names a file outside the folder, or none.
    #[error("it names the shard {shard:?}, which is not a plain .safetensors file name")]
    ShardName {
        /// As written.
        shard: String,
    },
    /// A tensor that the index names and its shard does not hold.
    #[error("the index says it is in {shard:?}, which does not hold it")]
    NotInShard {
        /// By the index.
        shard: String,
    },
    /// A tensor in a shard that the index does not put there.
    #[error("it is in {shard:?}, and the index {}", match indexed {
        Some(other) => format!("says it is in {other:?}"),
        None => "does not name it".to_owned(),
    })]
    NotIndexed {
        /// Where it is.
        shard: String,
        /// Where the index says.
        indexed: Option<String>,
    },
    /// An index that leaves out one of the shards that the others' names count.
    #[error("it names no tensor of the shard {shard:?}")]
    ShardNotIndexed {
        /// Which one.
        shard: String,
    },
    /// A shard left over from another checkpoint.
    #[error("the index does not name it: it is left over from another checkpoint")]
    StrayShard,
    /// No tensor of that name.
    #[error("there is no such tensor")]
    NoSuchTensor,
    /// A quantized weight without one of the tensors that belong to it.
    #[error("it is quantized, and its {companion:?} is missing")]
    MissingCompanion {
        /// Which one.
        companion: String,
    },
    /// A tensor that looks like a part of a quantized weight, and is not.
    #[error("it looks like a part of a quantized weight that is not there or not of a known kind")]
    StrayCompanion,
    /// A part of a quantized weight with another dtype or size than its layout needs.
    #[error("it has dtype {dtype} and {bytes} bytes where the weight needs {expected}")]
    Companion {
        /// Its type.
        dtype: FileDtype,
        /// Its size.
        bytes: u64,
        /// What is needed.
        expected: String,
    },
    /// A table stored with a weight that is not the one its name promises.
    #[error("it is not the {codebook:?} table: value {index} is {got} where {expected} is due")]
    Table {
        /// Name of the table.
        codebook: String,
        /// First index that differs.
        index: usize,
        /// The stored value.
        got: f32,
        /// The table's.
        expected: f32,
    },
    /// A quant state that this version cannot read.
    #[error("its {field} is {got}, and only {supported} is known")]
    QuantState {
        /// Which field.
        field: &'static str,
        /// Its value.
        got: String,
        /// What can be read.
        supported: &'static str,
    },
    /// A source that is quantized already.
    #[error("the model is quantized already ({method}); give its original 16- or 32-bit weights")]
    AlreadyQuantized {
        /// How.
        method: String,
    },
    /// A file of a later version of this format.
    #[error("its format version is {got} and this version of fourbit reads {supported}; upgrade")]
    Version {
        /// As written.
        got: String,
        /// What can be read.
        supported: u32,
    },
    /// Bytes that are not those that were written.
    #[error(
        "its bytes have changed since they were written: the checksum is {got}, not {expected}"
    )]
    Checksum {
        /// As recorded.
        expected: String,
        /// As computed.
        got: String,
    },
    /// A record without a checksum where there must be one.
    #[error("its checksum is missing or malformed")]
    NoChecksum,
    /// A file that the record of the folder names and the folder lacks, or the other way round.
    #[error("{} does not agree with the folder: {what}", super::names::MANIFEST)]
    Manifest {
        /// What is at odds.
        what: String,
    },
}
