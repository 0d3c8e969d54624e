//! Reader, quantizer and writer, side by side on buffers that go round.
//!
//! The reader fills buffers from the source. This thread quantizes them, on all cores, into other
//! buffers, or passes them on as they are. The writer writes, checksums and syncs, and gives the
//! buffers back. Nobody can run ahead further than there are buffers, so memory is bounded.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvError, SendError, Sender, SyncSender, channel, sync_channel};
use std::thread;

use bytemuck::Pod;
use xxhash_rust::xxh3::Xxh3;

use super::jobs::{Job, Jobs, QuantizeJob};
use super::scales::Scales;
use super::{Conversion, Progress};
use crate::checkpoint::header::ReadAt as _;
use crate::checkpoint::manifest::ShardRecord;
use crate::checkpoint::names::Part;
use crate::checkpoint::output::{ShardOutput, sync_folder};
use crate::checkpoint::plan::ShardPlan;
use crate::checkpoint::{CheckpointProblem, Checksum, Folder, Shard};
use crate::element::{Dtype, Element};
use crate::layout::Layout;
use crate::{Codebook, Error, Result, blockwise};

/// Buffers that go round between reader and writer, and between quantizer and writer.
const BUFFERS: usize = 4;
/// Writes that may wait for the writer, so that small ones do not pile up.
const PENDING_WRITES: usize = 16;
/// The budget holds four buffers of the source, four of at most five eighths of that for the
/// result, and the scales that wait, which get as much as one buffer: less than 8 in all.
const SHARES: u64 = 8;
/// Elements that pieces hold multiples of: a multiple of every block size and of a whole number
/// of packed bytes.
const PIECE_ELEMENTS: u64 = 1 << 16;
/// Bytes of the widest element that is quantized.
const WIDEST: u64 = 4;
/// More than this per thread does not make a piece's work cheaper, and leaves the cache.
const LARGEST_PIECE: u64 = 4 << 20;

/// A buffer, aligned for every element type.
type Buffer = Vec<u64>;

/// What the reader sends.
enum Read {
    /// The next bytes of the tensor of a job.
    Piece {
        job: usize,
        buffer: Buffer,
        bytes: usize,
    },
    /// All of a shard's tensors were read; checksum of what was read.
    ShardEnd(Checksum),
}

/// What the writer is sent.
enum Write {
    /// Bytes of tensors of the shard under way, as ranges of a buffer that then goes back.
    Buffer {
        buffer: Buffer,
        sections: Vec<(usize, std::ops::Range<usize>)>,
        back: Sender<Buffer>,
    },
    /// Bytes of one tensor.
    Bytes(usize, Vec<u8>),
    /// The shard under way is complete; checksum of its source.
    ShardEnd(Checksum),
}

/// Writes the given shards, and returns what they became with the bytes of their data.
pub(super) fn run(
    conversion: &Conversion<'_>,
    destination: &Path,
    todo: &[&ShardPlan],
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<Vec<(ShardRecord, u64)>> {
    if todo.is_empty() {
        return Ok(Vec::new());
    }
    let jobs = conversion.jobs;
    let threads = conversion.pool.current_num_threads() as u64;
    let piece_bytes = piece_bytes(conversion.options.chunk_bytes, threads);
    thread::scope(|scope| {
        let (free_source, source_buffers) = pool(piece_bytes);
        let (read_sender, read) = channel();
        let (write, write_receiver) = sync_channel(PENDING_WRITES);
        let reader = thread::Builder::new().name("fourbit-reader".to_owned());
        let reader = reader.spawn_scoped(scope, move || {
            read_shards(
                conversion.folder,
                jobs,
                todo,
                &source_buffers,
                &read_sender,
                piece_bytes,
            )
        })?;
        let writer = thread::Builder::new().name("fourbit-writer".to_owned());
        let writer = writer.spawn_scoped(scope, move || {
            write_shards(destination, jobs, todo, &write_receiver)
        })?;
        let quantizer = Quantizer::new(conversion, destination, free_source, write, piece_bytes);
        let done = (jobs.source_bytes()).saturating_sub(todo_bytes(jobs, todo));
        let quantized = quantizer.run(&read, todo, done, progress);
        // Hanging up stops both threads.
        drop((quantizer, read));
        let read = reader.join().unwrap_or(Err(Error::Interrupted));
        let written = writer.join().unwrap_or(Err(Error::Interrupted));
        match quantized {
            Ok(true) => read.and(written),
            // One of the threads hung up, for a reason of its own.
            Ok(false) => Err(read.err().or(written.err()).unwrap_or(Error::Interrupted)),
            Err(error) => Err(error),
        }
    })
}

/// Bytes of a source buffer.
fn piece_bytes(chunk_bytes: u64, threads: u64) -> u64 {
    let unit = PIECE_ELEMENTS * WIDEST;
    let share = chunk_bytes.saturating_mul(threads) / SHARES;
    (share.min(LARGEST_PIECE * threads) / unit).max(1) * unit
}

/// Buffers of so many bytes, in a channel; they come back through the sender.
fn pool(bytes: u64) -> (Sender<Buffer>, Receiver<Buffer>) {
    let (sender, receiver) = channel();
    let words = usize::try_from(bytes.div_ceil(8)).unwrap_or(0);
    for _ in 0..BUFFERS {
        // The receiver is in hand, so this cannot fail.
        let _ = sender.send(vec![0; words]);
    }
    (sender, receiver)
}

fn jobs_of<'a>(jobs: &'a Jobs, plan: &ShardPlan) -> impl Iterator<Item = (usize, &'a Job)> {
    let range = plan.groups.clone();
    range.filter_map(|index| Some((index, jobs.jobs.get(index)?)))
}

fn todo_bytes(jobs: &Jobs, todo: &[&ShardPlan]) -> u64 {
    todo.iter()
        .flat_map(|plan| jobs_of(jobs, plan))
        .map(|(_, job)| job.tensor.bytes)
        .sum()
}

fn source_shard<'a>(folder: &'a Folder, job: &Job) -> Result<&'a Shard> {
    let shard = folder.shards().get(job.shard);
    shard.ok_or_else(|| CheckpointProblem::NoSuchTensor.into())
}

/// The reader's work. Ends early, without an error, when nobody listens any more.
fn read_shards(
    folder: &Folder,
    jobs: &Jobs,
    todo: &[&ShardPlan],
    buffers: &Receiver<Buffer>,
    sender: &Sender<Read>,
    piece_bytes: u64,
) -> Result<()> {
    for plan in todo {
        let mut hasher = Xxh3::new();
        for (index, job) in jobs_of(jobs, plan) {
            let shard = source_shard(folder, job)?;
            let mut position = 0;
            while position < job.tensor.bytes {
                let Ok(mut buffer) = buffers.recv() else {
                    return Ok(());
                };
                let bytes =
                    usize::try_from(piece_bytes.min(job.tensor.bytes - position)).unwrap_or(0);
                let piece = bytemuck::cast_slice_mut(&mut buffer);
                let piece = piece.get_mut(..bytes).unwrap_or_default();
                shard
                    .file
                    .read_exact_at(piece, job.tensor.offset + position)
                    .map_err(|e| e.in_tensor(&job.tensor.name).in_file(shard.file.path()))?;
                hasher.update(piece);
                position += bytes as u64;
                let piece = Read::Piece {
                    job: index,
                    buffer,
                    bytes,
                };
                if sender.send(piece).is_err() {
                    return Ok(());
                }
            }
            shard.file.check_unchanged()?;
        }
        if sender.send(Read::ShardEnd(Checksum::of(&hasher))).is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// What the reader's checksum of a shard's source would be.
pub(super) fn source_data(folder: &Folder, jobs: &Jobs, plan: &ShardPlan) -> Result<Checksum> {
    let mut hasher = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    for (_, job) in jobs_of(jobs, plan) {
        let shard = source_shard(folder, job)?;
        let mut position = 0;
        while position < job.tensor.bytes {
            let left = usize::try_from(job.tensor.bytes - position).unwrap_or(usize::MAX);
            let bytes = left.min(buffer.len());
            let piece = buffer.get_mut(..bytes).unwrap_or_default();
            shard
                .file
                .read_exact_at(piece, job.tensor.offset + position)
                .map_err(|e| e.in_tensor(&job.tensor.name).in_file(shard.file.path()))?;
            hasher.update(piece);
            position += bytes as u64;
        }
    }
    Ok(Checksum::of(&hasher))
}

/// The writer's work. A shard that is not complete when the sender hangs up is deleted.
fn write_shards(
    destination: &Path,
    jobs: &Jobs,
    todo: &[&ShardPlan],
    receiver: &Receiver<Write>,
) -> Result<Vec<(ShardRecord, u64)>> {
    let mut written = Vec::with_capacity(todo.len());
    for plan in todo {
        let mut output = ShardOutput::create(destination, plan)?;
        loop {
            match receiver.recv() {
                Err(_) => return Err(Error::Interrupted),
                Ok(Write::Bytes(tensor, bytes)) => output.write(tensor, &bytes)?,
                Ok(Write::Buffer {
                    buffer,
                    sections,
                    back,
                }) => {
                    let bytes: &[u8] = bytemuck::cast_slice(&buffer);
                    for (tensor, range) in sections {
                        output.write(tensor, bytes.get(range).unwrap_or_default())?;
                    }
                    // At the end nobody needs it any more.
                    let _ = back.send(buffer);
                }
                Ok(Write::ShardEnd(source_data)) => {
                    let (plan, source) = (jobs.plan, jobs.source.identity);
                    written.push(output.finish(|shard, checksums| {
                        shard.metadata(plan, source, Some(source_data), checksums)
                    })?);
                    sync_folder(destination)?;
                    break;
                }
            }
        }
    }
    Ok(written)
}

/// The work of the calling thread.
struct Quantizer<'a> {
    conversion: &'a Conversion<'a>,
    destination: &'a Path,
    free_source: Sender<Buffer>,
    free_packed: Sender<Buffer>,
    packed_buffers: Receiver<Buffer>,
    write: SyncSender<Write>,
    scales_memory: usize,
}

/// Why the calling thread's work ended.
enum Stop {
    /// A thread hung up; its own error says why.
    HungUp,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl<T> From<SendError<T>> for Stop {
    fn from(_: SendError<T>) -> Self {
        Self::HungUp
    }
}

impl From<RecvError> for Stop {
    fn from(_: RecvError) -> Self {
        Self::HungUp
    }
}

impl<'a> Quantizer<'a> {
    fn new(
        conversion: &'a Conversion<'a>,
        destination: &'a Path,
        free_source: Sender<Buffer>,
        write: SyncSender<Write>,
        piece_bytes: u64,
    ) -> Self {
        // 16-bit elements need most room for their codes and scales.
        let elements = piece_bytes / 2;
        let bits = u64::from(conversion.options.codebook.code_bits());
        let blocks = elements / conversion.options.block_size.get() as u64;
        let (free_packed, packed_buffers) = pool(elements * bits / 8 + blocks * 4);
        Self {
            conversion,
            destination,
            free_source,
            free_packed,
            packed_buffers,
            write,
            scales_memory: usize::try_from(piece_bytes).unwrap_or(0),
        }
    }

    /// Does the given shards. False where a thread hung up.
    fn run(
        &self,
        read: &Receiver<Read>,
        todo: &[&ShardPlan],
        done: u64,
        progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<bool> {
        match self.do_shards(read, todo, done, progress) {
            Ok(()) => Ok(true),
            Err(Stop::HungUp) => Ok(false),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    fn do_shards(
        &self,
        read: &Receiver<Read>,
        todo: &[&ShardPlan],
        mut done: u64,
        progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<(), Stop> {
        let total = self.conversion.jobs.source_bytes();
        for plan in todo {
            let places: HashMap<&str, usize> = (plan.tensors.iter().enumerate())
                .map(|(place, (tensor, _))| (tensor.name.as_str(), place))
                .collect();
            for (index, job) in jobs_of(self.conversion.jobs, plan) {
                let mut tensor = TensorWork::new(self, job, &places);
                let mut left = job.tensor.bytes;
                while left > 0 {
                    let Read::Piece { job, buffer, bytes } = read.recv()? else {
                        return Err(Stop::HungUp);
                    };
                    debug_assert_eq!(job, index);
                    tensor.piece(buffer, bytes)?;
                    left = left.saturating_sub(bytes as u64);
                    done += bytes as u64;
                    let now = Progress {
                        done,
                        total,
                        tensor: &tensor.job.tensor.name,
                    };
                    if progress(now).is_break() {
                        return Err(Error::Interrupted.into());
                    }
                }
                tensor.finish()?;
            }
            let Read::ShardEnd(checksum) = read.recv()? else {
                return Err(Stop::HungUp);
            };
            self.write.send(Write::ShardEnd(checksum))?;
        }
        Ok(())
    }
}

/// The tensor under way.
struct TensorWork<'a> {
    quantizer: &'a Quantizer<'a>,
    job: &'a Job,
    /// Where the tensors of the shard stand, by name.
    places: &'a HashMap<&'a str, usize>,
    /// Elements that are done.
    elements: u64,
    /// With double quantization, the scales, which wait for their mean.
    scales: Option<Scales>,
}

impl<'a> TensorWork<'a> {
    fn new(
        quantizer: &'a Quantizer<'a>,
        job: &'a Job,
        places: &'a HashMap<&'a str, usize>,
    ) -> Self {
        let double = job
            .quantize
            .as_ref()
            .is_some_and(|q| q.state.nested_offset.is_some());
        let scales = || Scales::new(quantizer.destination, quantizer.scales_memory);
        Self {
            quantizer,
            job,
            places,
            elements: 0,
            scales: double.then(scales),
        }
    }

    /// Where a tensor of the shard stands.
    fn place(&self, name: &str) -> Result<usize> {
        let place = self.places.get(name).copied();
        place.ok_or_else(|| Error::from(CheckpointProblem::NoSuchTensor).in_tensor(name))
    }

    /// Quantizes the next bytes of the tensor, or passes them on.
    fn piece(&mut self, buffer: Buffer, bytes: usize) -> Result<(), Stop> {
        let Some(quantize) = &self.job.quantize else {
            let sections = vec![(self.place(&self.job.tensor.name)?, 0..bytes)];
            let back = self.quantizer.free_source.clone();
            return Ok(self.quantizer.write.send(Write::Buffer {
                buffer,
                sections,
                back,
            })?);
        };
        let input = bytemuck::cast_slice::<u64, u8>(&buffer);
        let input = input.get(..bytes).unwrap_or_default();
        match quantize.dtype {
            Dtype::F32 => self.quantize::<f32>(quantize, input)?,
            Dtype::F16 => self.quantize::<half::f16>(quantize, input)?,
            Dtype::Bf16 => self.quantize::<half::bf16>(quantize, input)?,
        }
        // At the end nobody needs it any more.
        let _ = self.quantizer.free_source.send(buffer);
        Ok(())
    }

    fn quantize<T: Element + Pod>(&mut self, job: &QuantizeJob, input: &[u8]) -> Result<(), Stop> {
        let input: &[T] = bytemuck::cast_slice(input);
        let codebook = &self.quantizer.conversion.options.codebook;
        let block_size = job.state.block_size;
        let layout = Layout::new(input.len() as u64, block_size, codebook.code_bits());
        let mut buffer = self.quantizer.packed_buffers.recv()?;
        let space: &mut [u8] = bytemuck::cast_slice_mut(&mut buffer);
        let packed_bytes = usize::try_from(layout.packed_bytes).unwrap_or(usize::MAX);
        let absmax_bytes = usize::try_from(layout.blocks * 4).unwrap_or(usize::MAX);
        // Scales first: they need the alignment.
        let (absmax, packed) = (space.get_mut(..absmax_bytes + packed_bytes))
            .unwrap_or_default()
            .split_at_mut_checked(absmax_bytes)
            .unwrap_or_default();
        let absmax: &mut [f32] = bytemuck::cast_slice_mut(absmax);
        self.quantizer
            .conversion
            .pool
            .install(|| blockwise::quantize(input, codebook, block_size, packed, absmax))
            .map_err(|error| self.locate(error))?;
        let packed = absmax_bytes..absmax_bytes + packed_bytes;
        let mut sections = vec![(self.place(&self.job.tensor.name)?, packed)];
        match &mut self.scales {
            Some(scales) => {
                (scales.add(absmax)).map_err(|error| error.in_file(self.quantizer.destination))?
            }
            None => {
                let absmax = self.place(&Part::Absmax.of(&self.job.tensor.name))?;
                sections.push((absmax, 0..absmax_bytes));
            }
        }
        self.elements += layout.elements;
        let back = self.quantizer.free_packed.clone();
        Ok(self.quantizer.write.send(Write::Buffer {
            buffer,
            sections,
            back,
        })?)
    }

    /// An error of this tensor: its index counts from the tensor's start, not the piece's.
    fn locate(&self, error: Error) -> Error {
        let error = match error {
            Error::NonFinite { index, value } => Error::NonFinite {
                index: index + self.elements,
                value,
            },
            other => other,
        };
        let error = error.in_tensor(&self.job.tensor.name);
        match source_shard(self.quantizer.conversion.folder, self.job) {
            Ok(shard) => error.in_file(shard.file.path()),
            Err(_) => error,
        }
    }

    /// Writes what is known only at the end of the tensor.
    fn finish(self) -> Result<(), Stop> {
        let Some(job) = &self.job.quantize else {
            return Ok(());
        };
        let weight = &self.job.tensor.name;
        let place = |part: Part| self.place(&part.of(weight));
        let write = &self.quantizer.write;
        let table = self.quantizer.conversion.options.codebook.table();
        write.send(Write::Bytes(place(Part::QuantMap)?, floats(table)))?;
        let mut state = job.state.clone();
        let state_place = self.place(&job.state_name)?;
        if let Some(scales) = self.scales {
            let find = |part: Part| self.places.get(part.of(weight).as_str()).copied();
            let (absmax, nested) = (find(Part::Absmax), find(Part::NestedAbsmax));
            let (Some(absmax), Some(nested)) = (absmax, nested) else {
                return Err(Stop::HungUp);
            };
            let map = Codebook::dynamic_signed().table();
            let map_place = find(Part::NestedQuantMap).ok_or(Stop::HungUp)?;
            write.send(Write::Bytes(map_place, floats(map)))?;
            let pool = self.quantizer.conversion.pool;
            let offset = pool.install(|| {
                scales.finish(&mut |codes, scales| {
                    let sent = write.send(Write::Bytes(absmax, codes));
                    sent.and_then(|()| write.send(Write::Bytes(nested, scales)))
                        .map_err(|_| Error::Interrupted)
                })
            });
            state.nested_offset = Some(offset.map_err(|error| error.in_tensor(weight))?);
        }
        Ok(write.send(Write::Bytes(state_place, state.to_json().into_bytes()))?)
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}
