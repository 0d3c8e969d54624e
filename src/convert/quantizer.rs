//! The work of the calling thread: quantizes what the reader sends, and sends it to the writer.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvError, SendError, Sender, SyncSender};

use bytemuck::Pod;

use super::jobs::{Job, QuantizeJob};
use super::pipeline::{Buffer, Read, Write, jobs_of, pool, source_shard};
use super::scales::Scales;
use super::{Conversion, Progress};
use crate::checkpoint::CheckpointProblem;
use crate::checkpoint::names::Part;
use crate::checkpoint::plan::ShardPlan;
use crate::element::{Dtype, Element};
use crate::layout::Layout;
use crate::{Codebook, Error, Result, blockwise};

/// The ends of the channels that the calling thread holds, and what it needs to know.
pub(super) struct Quantizer<'a> {
    conversion: &'a Conversion<'a>,
    destination: &'a Path,
    free_source: Sender<Buffer>,
    free_packed: Sender<Buffer>,
    packed_buffers: Receiver<Buffer>,
    write: SyncSender<Write>,
    write_failed: &'a AtomicBool,
    scales_memory: usize,
}

/// Why the work ended early.
enum Stop {
    /// A thread stopped; its own error says why.
    ThreadStopped,
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl<T> From<SendError<T>> for Stop {
    fn from(_: SendError<T>) -> Self {
        Self::ThreadStopped
    }
}

impl From<RecvError> for Stop {
    fn from(_: RecvError) -> Self {
        Self::ThreadStopped
    }
}

impl<'a> Quantizer<'a> {
    pub(super) fn new(
        conversion: &'a Conversion<'a>,
        destination: &'a Path,
        free_source: Sender<Buffer>,
        write: SyncSender<Write>,
        write_failed: &'a AtomicBool,
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
            write_failed,
            scales_memory: usize::try_from(piece_bytes).unwrap_or(0),
        }
    }

    /// Does the given shards, `done` bytes of the source being done. False where a thread
    /// stopped.
    pub(super) fn run(
        &self,
        read: &Receiver<Read>,
        todo: &[&ShardPlan],
        mut done: u64,
        progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<bool> {
        for plan in todo {
            match self.shard(read, plan, &mut done, progress) {
                Ok(()) => {}
                Err(Stop::ThreadStopped) => return Ok(false),
                Err(Stop::Failed(error)) => return Err(error),
            }
        }
        Ok(true)
    }

    fn shard(
        &self,
        read: &Receiver<Read>,
        plan: &ShardPlan,
        done: &mut u64,
        progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<(), Stop> {
        let total = self.conversion.jobs.source_bytes();
        let places: Places<'_> = (plan.tensors.iter().enumerate())
            .map(|(place, (tensor, _))| (tensor.name.as_str(), place))
            .collect();
        for job in jobs_of(self.conversion.jobs, plan) {
            let mut tensor = TensorWork::new(self, job, &places)?;
            let mut left = job.tensor.bytes;
            while left > 0 {
                let Read::Piece { buffer, bytes } = read.recv()? else {
                    return Err(Stop::ThreadStopped);
                };
                if self.write_failed.load(Ordering::Relaxed) {
                    return Err(Stop::ThreadStopped);
                }
                tensor.piece(buffer, bytes)?;
                left = left.saturating_sub(bytes as u64);
                *done += bytes as u64;
                let now = Progress {
                    done: *done,
                    total,
                    tensor: &job.tensor.name,
                };
                if progress(now).is_break() {
                    return Err(Error::Interrupted.into());
                }
            }
            tensor.finish()?;
        }
        let Read::ShardEnd(checksum) = read.recv()? else {
            return Err(Stop::ThreadStopped);
        };
        Ok(self.write.send(Write::ShardEnd(checksum))?)
    }
}

/// Where the tensors of a shard stand, by name.
type Places<'a> = HashMap<&'a str, usize>;

/// The tensor under way.
struct TensorWork<'a> {
    quantizer: &'a Quantizer<'a>,
    job: &'a Job,
    /// Its place in the shard, or that of its packed codes.
    place: usize,
    quantize: Option<QuantizeWork<'a>>,
}

/// A tensor that is quantized.
struct QuantizeWork<'a> {
    job: &'a QuantizeJob,
    /// Elements that are done.
    elements: u64,
    absmax: usize,
    quant_map: usize,
    state: usize,
    double: Option<DoubleWork>,
}

/// Double quantization of a tensor: the scales wait for their mean.
struct DoubleWork {
    scales: Scales,
    nested_absmax: usize,
    nested_quant_map: usize,
}

impl<'a> TensorWork<'a> {
    fn new(quantizer: &'a Quantizer<'a>, job: &'a Job, places: &Places<'_>) -> Result<Self> {
        let weight = &job.tensor.name;
        let find = |name: &str| {
            let place = places.get(name).copied();
            place.ok_or_else(|| Error::from(CheckpointProblem::NoSuchTensor).in_tensor(name))
        };
        let quantize = match &job.quantize {
            None => None,
            Some(quantize) => Some(QuantizeWork {
                job: quantize,
                elements: 0,
                absmax: find(&Part::Absmax.of(weight))?,
                quant_map: find(&Part::QuantMap.of(weight))?,
                state: find(&quantize.state_name)?,
                double: match quantize.state.nested_offset {
                    None => None,
                    Some(_) => Some(DoubleWork {
                        scales: Scales::new(quantizer.destination, quantizer.scales_memory),
                        nested_absmax: find(&Part::NestedAbsmax.of(weight))?,
                        nested_quant_map: find(&Part::NestedQuantMap.of(weight))?,
                    }),
                },
            }),
        };
        Ok(Self {
            quantizer,
            job,
            place: find(weight)?,
            quantize,
        })
    }

    /// Quantizes the next bytes of the tensor, or passes them on.
    fn piece(&mut self, buffer: Buffer, bytes: usize) -> Result<(), Stop> {
        let Some(quantize) = &self.quantize else {
            let back = self.quantizer.free_source.clone();
            return Ok(self.quantizer.write.send(Write::Buffer {
                buffer,
                sections: vec![(self.place, 0..bytes)],
                back,
            })?);
        };
        let input = bytemuck::cast_slice::<u64, u8>(&buffer);
        let input = input.get(..bytes).unwrap_or_default();
        match quantize.job.dtype {
            Dtype::F32 => self.quantize::<f32>(input)?,
            Dtype::F16 => self.quantize::<half::f16>(input)?,
            Dtype::Bf16 => self.quantize::<half::bf16>(input)?,
        }
        // At the end nobody needs it any more.
        let _ = self.quantizer.free_source.send(buffer);
        Ok(())
    }

    fn quantize<T: Element + Pod>(&mut self, input: &[u8]) -> Result<(), Stop> {
        let Some(work) = &mut self.quantize else {
            return Ok(());
        };
        let input: &[T] = bytemuck::cast_slice(input);
        let codebook = &self.quantizer.conversion.options.codebook;
        let block_size = work.job.state.block_size;
        let layout = Layout::new(input.len() as u64, block_size, codebook.code_bits());
        let mut buffer = self.quantizer.packed_buffers.recv()?;
        let packed_bytes = usize::try_from(layout.packed_bytes).unwrap_or(usize::MAX);
        let absmax_bytes = usize::try_from(layout.blocks * 4).unwrap_or(usize::MAX);
        let end = absmax_bytes.saturating_add(packed_bytes);
        // Scales first: they need the alignment.
        let (absmax, packed) = bytemuck::cast_slice_mut::<u64, u8>(&mut buffer)
            .get_mut(..end)
            .and_then(|space| space.split_at_mut_checked(absmax_bytes))
            .unwrap_or_default();
        let absmax: &mut [f32] = bytemuck::cast_slice_mut(absmax);
        let pool = self.quantizer.conversion.pool;
        pool.install(|| blockwise::quantize(input, codebook, block_size, packed, absmax))
            .map_err(|error| locate(self.quantizer, self.job, work.elements, error))?;
        work.elements += layout.elements;
        let mut sections = vec![(self.place, absmax_bytes..end)];
        match &mut work.double {
            None => sections.push((work.absmax, 0..absmax_bytes)),
            Some(double) => double
                .scales
                .add(absmax)
                .map_err(|error| error.in_file(self.quantizer.destination))?,
        }
        let back = self.quantizer.free_packed.clone();
        Ok(self.quantizer.write.send(Write::Buffer {
            buffer,
            sections,
            back,
        })?)
    }

    /// Sends what is known only at the end of the tensor.
    fn finish(self) -> Result<(), Stop> {
        let Some(work) = self.quantize else {
            return Ok(());
        };
        let write = &self.quantizer.write;
        let table = self.quantizer.conversion.options.codebook.table();
        write.send(Write::Bytes(work.quant_map, floats(table)))?;
        let mut state = work.job.state.clone();
        if let Some(double) = work.double {
            let map = Codebook::dynamic_signed().table();
            write.send(Write::Bytes(double.nested_quant_map, floats(map)))?;
            let send = |codes, scales| {
                write.send(Write::Bytes(work.absmax, codes))?;
                write.send(Write::Bytes(double.nested_absmax, scales))
            };
            let pool = self.quantizer.conversion.pool;
            let offset = double
                .scales
                .finish(pool, &mut |codes, scales| send(codes, scales).is_ok())
                .map_err(|error| error.in_file(self.quantizer.destination))?;
            state.nested_offset = Some(offset.ok_or(Stop::ThreadStopped)?);
        }
        Ok(write.send(Write::Bytes(work.state, state.to_json().into_bytes()))?)
    }
}

/// An error of a tensor: its index counts from the tensor's start, not the piece's.
fn locate(quantizer: &Quantizer<'_>, job: &Job, elements: u64, error: Error) -> Error {
    let error = match error {
        Error::NonFinite { index, value } => Error::NonFinite {
            index: index + elements,
            value,
        },
        other => other,
    };
    let error = error.in_tensor(&job.tensor.name);
    match source_shard(quantizer.conversion.folder, job) {
        Ok(shard) => error.in_file(shard.file.path()),
        Err(_) => error,
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}
