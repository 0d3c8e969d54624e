//! Reader, quantizer and writer, side by side on buffers that go round.
//!
//! The reader fills buffers from the source. This thread quantizes them, on all cores, into other
//! buffers, or passes them on as they are. The writer writes, checksums and syncs, and gives the
//! buffers back. Nobody can run ahead further than there are buffers, so memory is bounded.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread;

use xxhash_rust::xxh3::Xxh3;

use super::jobs::{Job, Jobs};
use super::quantizer::Quantizer;
use super::{Conversion, Progress};
use crate::checkpoint::header::ReadAt as _;
use crate::checkpoint::manifest::ShardRecord;
use crate::checkpoint::output::{ShardOutput, sync_folder};
use crate::checkpoint::plan::ShardPlan;
use crate::checkpoint::{CheckpointProblem, Checksum, Folder, Shard};
use crate::{Error, Result};

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
const LARGEST_PIECE_PER_THREAD: u64 = 4 << 20;
/// Nor does more than this in all.
const LARGEST_PIECE: u64 = 32 << 20;

/// A buffer, aligned for every element type.
pub(super) type Buffer = Vec<u64>;

/// What the reader sends.
pub(super) enum Read {
    /// The next bytes of the tensor under way.
    Piece { buffer: Buffer, bytes: usize },
    /// All of a shard's tensors were read; checksum of what was read.
    ShardEnd(Checksum),
}

/// What the writer is sent.
pub(super) enum Write {
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
    let write_failed = AtomicBool::new(false);
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
        let failed = &write_failed;
        let writer = writer.spawn_scoped(scope, move || {
            let written = write_shards(destination, jobs, todo, &write_receiver);
            if written.is_err() {
                failed.store(true, Ordering::Relaxed);
                give_back(&write_receiver);
            }
            written
        })?;
        let quantizer = Quantizer::new(
            conversion,
            destination,
            free_source,
            write,
            failed,
            piece_bytes,
        );
        let done = (jobs.source_bytes()).saturating_sub(todo_bytes(jobs, todo));
        let quantized = quantizer.run(&read, todo, done, progress);
        // Hanging up stops both threads.
        drop((quantizer, read));
        let read = reader.join().unwrap_or_else(|_| Err(panicked()));
        let written = writer.join().unwrap_or_else(|_| Err(panicked()));
        match quantized {
            Ok(true) => read.and(written),
            // One of the threads stopped, for a reason of its own.
            Ok(false) => Err(read.err().or(written.err()).unwrap_or(Error::Interrupted)),
            Err(error) => Err(error),
        }
    })
}

/// A thread's panic, which would be a fault of this crate, as an error.
fn panicked() -> Error {
    std::io::Error::other("a thread of the converter panicked; please report this").into()
}

/// Bytes of a source buffer.
fn piece_bytes(chunk_bytes: u64, threads: u64) -> u64 {
    let unit = PIECE_ELEMENTS * WIDEST;
    let share = chunk_bytes.saturating_mul(threads) / SHARES;
    let most = (LARGEST_PIECE_PER_THREAD * threads).min(LARGEST_PIECE);
    (share.min(most) / unit).max(1) * unit
}

/// Buffers of so many bytes, in a channel; they come back through the sender.
pub(super) fn pool(bytes: u64) -> (Sender<Buffer>, Receiver<Buffer>) {
    let (sender, receiver) = channel();
    let words = usize::try_from(bytes.div_ceil(8)).unwrap_or(0);
    for _ in 0..BUFFERS {
        // The receiver is in hand, so this cannot fail.
        let _ = sender.send(vec![0; words]);
    }
    (sender, receiver)
}

/// The jobs of a shard.
pub(super) fn jobs_of<'a>(jobs: &'a Jobs, plan: &ShardPlan) -> impl Iterator<Item = &'a Job> {
    let jobs = jobs.jobs.get(plan.groups.clone());
    jobs.unwrap_or_default().iter()
}

fn todo_bytes(jobs: &Jobs, todo: &[&ShardPlan]) -> u64 {
    todo.iter()
        .flat_map(|plan| jobs_of(jobs, plan))
        .map(|job| job.tensor.bytes)
        .sum()
}

pub(super) fn source_shard<'a>(folder: &'a Folder, job: &Job) -> Result<&'a Shard> {
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
        for job in jobs_of(jobs, plan) {
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
                if sender.send(Read::Piece { buffer, bytes }).is_err() {
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

/// What the reader's checksum of a shard's source would be. Calls `progress` with the bytes done.
pub(super) fn source_data(
    folder: &Folder,
    jobs: &Jobs,
    plan: &ShardPlan,
    progress: &mut dyn FnMut(u64, &str) -> ControlFlow<()>,
) -> Result<Checksum> {
    let mut hasher = Xxh3::new();
    let mut buffer = vec![0; 1 << 20];
    for job in jobs_of(jobs, plan) {
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
            if progress(bytes as u64, &job.tensor.name).is_break() {
                return Err(Error::Interrupted);
            }
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
                        shard.metadata(plan, Some((source, source_data)), checksums)
                    })?);
                    sync_folder(destination)?;
                    break;
                }
            }
        }
    }
    Ok(written)
}

/// After a failure: others may be waiting for buffers, and must come to see it.
fn give_back(receiver: &Receiver<Write>) {
    while let Ok(write) = receiver.recv() {
        if let Write::Buffer { buffer, back, .. } = write {
            let _ = back.send(buffer);
        }
    }
}
