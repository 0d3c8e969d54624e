//! AdamW steps for Python.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::errors::to_python;
use super::gpu::dtype_by_name;
use super::tensor::Tensor;
use super::threads::detached_team;
use crate::element::Dtype;
use crate::gpu::adamw::{SEGMENT_BYTES, Segment};
use crate::optimizer::{self, AdamW, Floats, FloatsMut, Parameter, State};

/// Steps are counted in 64 bits.
const MOST_STEPS: f32 = (1_u64 << 63) as f32;

/// One AdamW step of every parameter, with the moments in float32.
///
/// All lists have one entry a parameter, all tensors of an entry one number of elements. `params`
/// and `grads` are float32, float16 or bfloat16, `exp_avgs` and `exp_avg_sqs` float32; `steps` are
/// float32 tensors of one element that count the steps so far, which grow by 1. Parameters and
/// moments change in place. Returns the indices of parameters that were left alone, step count
/// included, because their gradient is not finite, or has an element of 2^63 or more.
#[pyfunction]
#[pyo3(signature = (
    params, grads, exp_avgs, exp_avg_sqs, *,
    lr, beta1, beta2, eps, weight_decay, steps, threads, maximize=false
))]
pub(super) fn adamw32_step(
    py: Python<'_>,
    mut params: Vec<Tensor<'_>>,
    grads: Vec<Tensor<'_>>,
    mut exp_avgs: Vec<Tensor<'_>>,
    mut exp_avg_sqs: Vec<Tensor<'_>>,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    mut steps: Vec<Tensor<'_>>,
    threads: usize,
    maximize: bool,
) -> PyResult<Vec<usize>> {
    check_counts(
        params.len(),
        &[
            ("grads", grads.len()),
            ("exp_avgs", exp_avgs.len()),
            ("exp_avg_sqs", exp_avg_sqs.len()),
            ("steps", steps.len()),
        ],
    )?;
    check_disjoint(&[&params, &exp_avgs, &exp_avg_sqs], &grads)?;
    let numbers = next_steps(&steps)?;
    let settings = AdamW {
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        maximize,
    };
    let parameters = params
        .iter_mut()
        .zip(&grads)
        .zip(exp_avgs.iter_mut().zip(&mut exp_avg_sqs))
        .zip(numbers)
        .map(|(((values, gradient), (exp_avg, exp_avg_sq)), step)| {
            Ok(Parameter {
                values: floats_mut(values)?,
                gradient: floats(gradient)?,
                state: State::Full {
                    exp_avg: exp_avg.slice_mut()?,
                    exp_avg_sq: exp_avg_sq.slice_mut()?,
                },
                step,
            })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let is_small = optimizer::is_small(parameters.iter().map(|one| one.values.len()).sum());
    let skipped = detached_team(py, threads, is_small, || {
        optimizer::step(&settings, parameters)
    })?;
    count(&mut steps, &skipped)?;
    Ok(skipped)
}

/// As `adamw32_step`, with the moments in uint8 codes and one float32 scale for every 256 of them:
/// `exp_avg_codes` by the signed dynamic map, `exp_avg_sq_codes` by the unsigned one. A fresh
/// state is zeros everywhere.
#[pyfunction]
#[pyo3(signature = (
    params, grads, exp_avg_codes, exp_avg_absmax, exp_avg_sq_codes, exp_avg_sq_absmax, *,
    lr, beta1, beta2, eps, weight_decay, steps, threads, maximize=false
))]
pub(super) fn adamw8_step(
    py: Python<'_>,
    mut params: Vec<Tensor<'_>>,
    grads: Vec<Tensor<'_>>,
    mut exp_avg_codes: Vec<Tensor<'_>>,
    mut exp_avg_absmax: Vec<Tensor<'_>>,
    mut exp_avg_sq_codes: Vec<Tensor<'_>>,
    mut exp_avg_sq_absmax: Vec<Tensor<'_>>,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    mut steps: Vec<Tensor<'_>>,
    threads: usize,
    maximize: bool,
) -> PyResult<Vec<usize>> {
    check_counts(
        params.len(),
        &[
            ("grads", grads.len()),
            ("exp_avg_codes", exp_avg_codes.len()),
            ("exp_avg_absmax", exp_avg_absmax.len()),
            ("exp_avg_sq_codes", exp_avg_sq_codes.len()),
            ("exp_avg_sq_absmax", exp_avg_sq_absmax.len()),
            ("steps", steps.len()),
        ],
    )?;
    check_disjoint(
        &[
            &params,
            &exp_avg_codes,
            &exp_avg_absmax,
            &exp_avg_sq_codes,
            &exp_avg_sq_absmax,
        ],
        &grads,
    )?;
    let settings = AdamW {
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        maximize,
    };
    let numbers = next_steps(&steps)?;
    let first = exp_avg_codes.iter_mut().zip(&mut exp_avg_absmax);
    let second = exp_avg_sq_codes.iter_mut().zip(&mut exp_avg_sq_absmax);
    let parameters = params
        .iter_mut()
        .zip(&grads)
        .zip(first.zip(second))
        .zip(numbers)
        .map(|(((values, gradient), (first, second)), step)| {
            Ok(Parameter {
                values: floats_mut(values)?,
                gradient: floats(gradient)?,
                state: State::Blockwise {
                    exp_avg: first.0.slice_mut()?,
                    exp_avg_absmax: first.1.slice_mut()?,
                    exp_avg_sq: second.0.slice_mut()?,
                    exp_avg_sq_absmax: second.1.slice_mut()?,
                },
                step,
            })
        })
        .collect::<PyResult<Vec<_>>>()?;
    let is_small = optimizer::is_small(parameters.iter().map(|one| one.values.len()).sum());
    let skipped = detached_team(py, threads, is_small, || {
        optimizer::step(&settings, parameters)
    })?;
    count(&mut steps, &skipped)?;
    Ok(skipped)
}

/// The numbers of the steps that follow so many. Read before anything is borrowed to be written.
fn next_steps(steps: &[Tensor<'_>]) -> PyResult<Vec<u64>> {
    steps.iter().map(next_step).collect()
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a whole number in range
fn next_step(count: &Tensor<'_>) -> PyResult<u64> {
    match count.slice::<f32>()? {
        [count] if (0.0..MOST_STEPS).contains(count) && count.fract() == 0.0 => {
            Ok(*count as u64 + 1)
        }
        [count] => Err(PyValueError::new_err(format!(
            "a step count is {count}, not a whole number from 0 to below 2^63"
        ))),
        other => Err(PyValueError::new_err(format!(
            "a step count has {} elements where 1 is needed",
            other.len()
        ))),
    }
}

/// Counts the step of all parameters but the skipped, which ascend.
fn count(steps: &mut [Tensor<'_>], skipped: &[usize]) -> PyResult<()> {
    let mut skipped = skipped.iter().copied().peekable();
    for (index, step) in steps.iter_mut().enumerate() {
        if skipped.next_if_eq(&index).is_none() {
            for count in step.slice_mut::<f32>()? {
                *count += 1.0;
            }
        }
    }
    Ok(())
}

fn floats<'a>(tensor: &'a Tensor<'_>) -> PyResult<Floats<'a>> {
    Ok(match tensor.float_dtype()? {
        Dtype::F32 => Floats::F32(tensor.slice()?),
        Dtype::F16 => Floats::F16(tensor.slice()?),
        Dtype::Bf16 => Floats::Bf16(tensor.slice()?),
    })
}

fn floats_mut<'a>(tensor: &'a mut Tensor<'_>) -> PyResult<FloatsMut<'a>> {
    Ok(match tensor.float_dtype()? {
        Dtype::F32 => FloatsMut::F32(tensor.slice_mut()?),
        Dtype::F16 => FloatsMut::F16(tensor.slice_mut()?),
        Dtype::Bf16 => FloatsMut::Bf16(tensor.slice_mut()?),
    })
}

fn check_counts(params: usize, lists: &[(&str, usize)]) -> PyResult<()> {
    for (name, count) in lists {
        if *count != params {
            return Err(PyValueError::new_err(format!(
                "{name} has {count} entries where params has {params}"
            )));
        }
    }
    Ok(())
}

/// Refuses lists in which written memory stands twice, or is also read: two mutable slices of the
/// same memory must never be made.
fn check_disjoint(written: &[&Vec<Tensor<'_>>], read: &[Tensor<'_>]) -> PyResult<()> {
    let mut ranges = Vec::new();
    for (list, writes) in written
        .iter()
        .map(|list| (list.as_slice(), true))
        .chain([(read, false)])
    {
        for tensor in list {
            let bytes = tensor.bytes()?;
            if !bytes.is_empty() {
                ranges.push((bytes.start, bytes.end, writes));
            }
        }
    }
    ranges.sort_unstable();
    // The furthest ends so far: of anything, and of anything that is written.
    let (mut end, mut written_end) = (0, 0);
    for (start, stop, writes) in ranges {
        if start < written_end || (writes && start < end) {
            return Err(PyValueError::new_err(
                "the same memory stands twice in the lists; name each parameter and state once",
            ));
        }
        end = end.max(stop);
        if writes {
            written_end = written_end.max(stop);
        }
    }
    Ok(())
}

/// Parameters of one group, or parts of them, as `cuda/adamw.cu` takes them, after others of
/// `first_tile` tiles: the segments' bytes and the tiles up to their end.
///
/// A segment is given by its addresses (values, gradients, both moments, the scales of both or 0),
/// its elements, the dtypes of values and gradients, the bits of the state, the step counted from
/// 1, and the index of its parameter among all of the step. A parameter in several parts is cut at
/// multiples of 256 elements.
#[pyfunction]
#[pyo3(signature = (segments, *, first_tile, lr, beta1, beta2, eps, weight_decay, maximize))]
#[allow(clippy::type_complexity)] // told in full above
pub(super) fn adamw_segments<'py>(
    py: Python<'py>,
    segments: Vec<([u64; 6], u64, [String; 2], u8, u64, u32)>,
    first_tile: u64,
    lr: f64,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    maximize: bool,
) -> PyResult<(Bound<'py, PyBytes>, u64)> {
    let settings = AdamW {
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
        maximize,
    };
    let mut bytes = Vec::with_capacity(segments.len() * SEGMENT_BYTES);
    let mut tiles = first_tile;
    for (addresses, elements, [values, gradient], state_bits, step, parameter) in segments {
        let segment = Segment {
            addresses,
            elements,
            dtypes: [dtype_by_name(&values)?, dtype_by_name(&gradient)?],
            state_bits,
            step,
            parameter,
        };
        tiles = segment
            .write(&settings, tiles, &mut bytes)
            .map_err(|error| to_python(&error))?;
    }
    Ok((PyBytes::new(py, &bytes), tiles))
}
