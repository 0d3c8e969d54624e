//! AdamW on the CPU (arXiv 1711.05101), with its state in 32 bits or blockwise in 8 bits
//! (arXiv 2110.02861).
//!
//! All arithmetic is in single precision, whatever the types of parameters and gradients, one
//! rounding an operation and no fused ones, so the bytes are the same from every backend and any
//! number of threads. With gradient `g`, step count `t` and the constants rounded once:
//!
//! ```text
//! p = p * (1 - lr * weight_decay)
//! m = beta1 * m + (1 - beta1) * g
//! v = beta2 * v + (1 - beta2) * (g * g)
//! p = p - lr / (1 - beta1^t) * (m / (sqrt(v) * (1 / sqrt(1 - beta2^t)) + eps))
//! ```
//!
//! The 8-bit state is decoded, updated as above and encoded again, block by block of 256: `m` by
//! the signed dynamic map, `v` by the unsigned one, each to the nearest value, with one exception.
//! The parameter is updated from `m` and `v` before they are rounded, as published.
//!
//! The exception: a `v` that is not zero never takes the code of zero (code 0) but the next one,
//! `3.25e-7` of its block's largest. Nearest, it would become 0 below half of that, where the `m`
//! of the same element, some `4e-4` of its block's largest, is kept; and as soon as its gradient
//! is 0 or tiny, the element would move by up to `lr * m / eps`, thousands of times too far (a
//! test of ours reached 228 in place of 0.02). With the exception it moves less than it might.

mod arithmetic;
mod floats;

use std::sync::atomic::{AtomicBool, Ordering};

use rayon::prelude::*;

use self::arithmetic::Constants;
pub use self::floats::{Floats, FloatsMut};
use crate::blockwise::Coder;
use crate::layout::check_length;
use crate::{Backend, BlockSize, Codebook, Error, Result};

/// Elements that share a scale of the 8-bit state.
pub const STATE_BLOCK_SIZE: BlockSize = crate::layout::NESTED_BLOCK_SIZE;

/// Elements a thread takes at a time.
const TASK_ELEMENTS: usize = 1 << 15;
/// Elements that are widened, updated and narrowed while they stay in the first-level cache.
const PIECE: usize = 1024;
const _: () =
    assert!(TASK_ELEMENTS.is_multiple_of(PIECE) && PIECE.is_multiple_of(STATE_BLOCK_SIZE.get()));

/// Gradients of this size and more overflow when squared, and count as not finite: 2^63.
const GRADIENT_LIMIT: f32 = (1_u64 << 63) as f32;

/// The settings of one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate, 0 or more.
    pub lr: f64,
    /// Decay of the first moment, from 0 to below 1.
    pub beta1: f64,
    /// Decay of the second moment, from 0 to below 1.
    pub beta2: f64,
    /// Added to the denominator, 0 or more.
    pub eps: f64,
    /// Decoupled weight decay, 0 or more; applied before the update, as `torch.optim.AdamW` does.
    pub weight_decay: f64,
    /// Follow the gradient up instead of down.
    pub maximize: bool,
}

/// One parameter and what its step needs. All slices are of the parameter's flattened length.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// The parameter, updated in place.
    pub values: FloatsMut<'a>,
    /// Its gradient.
    pub gradient: Floats<'a>,
    /// The first and second moments, updated in place.
    pub state: State<'a>,
    /// Which step of this parameter it is, counted from 1; for the bias correction.
    pub step: u64,
}

/// The moments of one parameter.
#[derive(Debug)]
pub enum State<'a> {
    /// In single precision.
    Full {
        /// First moments.
        exp_avg: &'a mut [f32],
        /// Second moments.
        exp_avg_sq: &'a mut [f32],
    },
    /// In 8 bits, with a scale for every [`STATE_BLOCK_SIZE`] elements.
    Blockwise {
        /// Codes of the first moments, by [`Codebook::dynamic_signed`].
        exp_avg: &'a mut [u8],
        /// Their scales.
        exp_avg_absmax: &'a mut [f32],
        /// Codes of the second moments, by [`Codebook::dynamic_unsigned`].
        exp_avg_sq: &'a mut [u8],
        /// Their scales.
        exp_avg_sq_absmax: &'a mut [f32],
    },
}

/// Takes one step of every parameter, in parallel on the current rayon pool.
///
/// A parameter whose gradient holds a NaN, an infinity or a number of 2^63 and more (its square
/// overflows) is left as it is, state included. Returns the indices of those, ascending.
///
/// # Errors
/// [`Error::Hyperparameter`] for a setting or a step outside its range; [`Error::Length`], within
/// the parameter's index, for slices of different lengths; [`Error::NonFinite`], within the
/// parameter and the state, for an 8-bit state whose scales are not finite. Nothing was then
/// changed.
/// [`Error::Backend`] as [`Backend::detect`].
pub fn step(settings: &AdamW, parameters: Vec<Parameter<'_>>) -> Result<Vec<usize>> {
    step_with(Backend::detect()?, settings, parameters)
}

/// [`step`] with the backend of your choice.
///
/// # Errors
/// As [`step`].
pub fn step_with(
    backend: Backend,
    settings: &AdamW,
    parameters: Vec<Parameter<'_>>,
) -> Result<Vec<usize>> {
    settings.check()?;
    for (index, parameter) in parameters.iter().enumerate() {
        parameter
            .check()
            .map_err(|error| error.in_tensor(format!("parameter {index}")))?;
    }
    let usable = usable_gradients(backend, &parameters);
    let mut skipped = Vec::new();
    let mut tasks = Vec::new();
    for (index, (parameter, usable)) in parameters.into_iter().zip(usable).enumerate() {
        if usable {
            let constants = Constants::new(settings, parameter.step);
            parameter.cut(&constants, &mut tasks);
        } else {
            skipped.push(index);
        }
    }
    let coders = Coders {
        backend,
        exp_avg: Coder::new(backend, Codebook::dynamic_signed(), STATE_BLOCK_SIZE),
        exp_avg_sq: Coder::new(backend, Codebook::dynamic_unsigned(), STATE_BLOCK_SIZE),
    };
    tasks.into_par_iter().for_each(|task| task.run(&coders));
    Ok(skipped)
}

/// For each parameter, whether all of its gradient can be used.
fn usable_gradients(backend: Backend, parameters: &[Parameter<'_>]) -> Vec<bool> {
    let usable: Vec<_> = parameters.iter().map(|_| AtomicBool::new(true)).collect();
    let mut chunks = Vec::new();
    for (parameter, usable) in parameters.iter().zip(&usable) {
        chunks.extend(
            parameter
                .gradient
                .chunks(TASK_ELEMENTS)
                .map(|chunk| (chunk, usable)),
        );
    }
    chunks.into_par_iter().for_each(|(chunk, usable)| {
        let mut numbers = [0.0; PIECE];
        for piece in chunk.chunks(PIECE) {
            let numbers = &mut numbers[..piece.len()];
            piece.read(backend, numbers);
            if !arithmetic::all_below(backend, numbers, GRADIENT_LIMIT) {
                usable.store(false, Ordering::Relaxed);
                return;
            }
        }
    });
    usable.into_iter().map(AtomicBool::into_inner).collect()
}

impl AdamW {
    /// What the settings amount to at a parameter's step of that number, counted from 1, in the
    /// order in which the kernel takes them: what weight decay keeps, `beta1`, `1 - beta1`,
    /// `beta2`, `1 - beta2`, the direction, the step size, the second bias correction, `eps`.
    ///
    /// # Errors
    /// [`Error::Hyperparameter`] for a setting or a step outside its range.
    pub fn constants(&self, step: u64) -> Result<[f32; 9]> {
        self.check()?;
        check_step(step)?;
        Ok(Constants::new(self, step).in_order())
    }

    fn check(&self) -> Result<()> {
        let from_zero = [
            ("lr", self.lr),
            ("eps", self.eps),
            ("weight_decay", self.weight_decay),
        ];
        for (name, got) in from_zero {
            if !(0.0..f64::INFINITY).contains(&got) {
                return Err(Error::Hyperparameter {
                    name,
                    expected: "a finite number of 0 or more",
                    got,
                });
            }
        }
        for (name, got) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            if !(0.0..1.0).contains(&got) {
                return Err(Error::Hyperparameter {
                    name,
                    expected: "from 0 to below 1",
                    got,
                });
            }
        }
        Ok(())
    }
}

impl<'a> Parameter<'a> {
    fn check(&self) -> Result<()> {
        check_step(self.step)?;
        let elements = self.values.len() as u64;
        check_length("gradient", elements, self.gradient.len())?;
        match &self.state {
            State::Full {
                exp_avg,
                exp_avg_sq,
            } => {
                check_length("exp_avg", elements, exp_avg.len())?;
                check_length("exp_avg_sq", elements, exp_avg_sq.len())
            }
            State::Blockwise {
                exp_avg,
                exp_avg_absmax,
                exp_avg_sq,
                exp_avg_sq_absmax,
            } => {
                let blocks = elements.div_ceil(STATE_BLOCK_SIZE.get() as u64);
                check_length("exp_avg", elements, exp_avg.len())?;
                check_length("exp_avg_absmax", blocks, exp_avg_absmax.len())?;
                check_length("exp_avg_sq", elements, exp_avg_sq.len())?;
                check_length("exp_avg_sq_absmax", blocks, exp_avg_sq_absmax.len())?;
                check_finite("exp_avg_absmax", exp_avg_absmax)?;
                check_finite("exp_avg_sq_absmax", exp_avg_sq_absmax)
            }
        }
    }

    /// Cuts the parameter into the tasks of its step.
    fn cut(self, constants: &Constants, tasks: &mut Vec<Task<'a>>) {
        let values = self.values.chunks_mut(TASK_ELEMENTS);
        let parts = values.zip(self.gradient.chunks(TASK_ELEMENTS));
        let task = |(values, gradient), state| Task {
            constants: *constants,
            values,
            gradient,
            state,
        };
        match self.state {
            State::Full {
                exp_avg,
                exp_avg_sq,
            } => {
                let states = exp_avg
                    .chunks_mut(TASK_ELEMENTS)
                    .zip(exp_avg_sq.chunks_mut(TASK_ELEMENTS))
                    .map(|(exp_avg, exp_avg_sq)| State::Full {
                        exp_avg,
                        exp_avg_sq,
                    });
                tasks.extend(parts.zip(states).map(|(part, state)| task(part, state)));
            }
            State::Blockwise {
                exp_avg,
                exp_avg_absmax,
                exp_avg_sq,
                exp_avg_sq_absmax,
            } => {
                const BLOCKS: usize = TASK_ELEMENTS / STATE_BLOCK_SIZE.get();
                let states = exp_avg
                    .chunks_mut(TASK_ELEMENTS)
                    .zip(exp_avg_absmax.chunks_mut(BLOCKS))
                    .zip(exp_avg_sq.chunks_mut(TASK_ELEMENTS))
                    .zip(exp_avg_sq_absmax.chunks_mut(BLOCKS))
                    .map(
                        |(((exp_avg, exp_avg_absmax), exp_avg_sq), exp_avg_sq_absmax)| {
                            State::Blockwise {
                                exp_avg,
                                exp_avg_absmax,
                                exp_avg_sq,
                                exp_avg_sq_absmax,
                            }
                        },
                    );
                tasks.extend(parts.zip(states).map(|(part, state)| task(part, state)));
            }
        }
    }
}

fn check_step(step: u64) -> Result<()> {
    if step > 0 {
        return Ok(());
    }
    Err(Error::Hyperparameter {
        name: "step",
        expected: "1 or more",
        got: 0.0,
    })
}

/// Damaged scales would poison their blocks for good.
fn check_finite(what: &'static str, scales: &[f32]) -> Result<()> {
    match scales.iter().position(|scale| !scale.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NonFinite {
            index: index as u64,
            value: scales[index],
        }
        .in_tensor(what)),
    }
}

/// What decodes and encodes the 8-bit state.
struct Coders {
    backend: Backend,
    exp_avg: Coder<'static>,
    exp_avg_sq: Coder<'static>,
}

/// A part of a parameter that one thread updates.
struct Task<'a> {
    constants: Constants,
    values: FloatsMut<'a>,
    gradient: Floats<'a>,
    state: State<'a>,
}

impl Task<'_> {
    fn run(self, coders: &Coders) {
        let backend = coders.backend;
        let mut numbers = [[0.0; PIECE]; 4];
        let [p, g, m, v] = &mut numbers;
        let mut state = self.state;
        let gradients = self.gradient.chunks(PIECE);
        for (piece, (mut values, gradient)) in
            self.values.chunks_mut(PIECE).zip(gradients).enumerate()
        {
            let (p, g) = (&mut p[..values.len()], &mut g[..gradient.len()]);
            values.read(backend, p);
            gradient.read(backend, g);
            match &mut state {
                State::Full {
                    exp_avg,
                    exp_avg_sq,
                } => {
                    let range = piece * PIECE..piece * PIECE + p.len();
                    let (m, v) = (&mut exp_avg[range.clone()], &mut exp_avg_sq[range]);
                    arithmetic::update(backend, &self.constants, p, g, m, v);
                }
                State::Blockwise {
                    exp_avg,
                    exp_avg_absmax,
                    exp_avg_sq,
                    exp_avg_sq_absmax,
                } => {
                    let first = piece * PIECE;
                    let range = first..first + p.len();
                    let blocks =
                        first / STATE_BLOCK_SIZE.get()..range.end.div_ceil(STATE_BLOCK_SIZE.get());
                    let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
                    let m_codes = &mut exp_avg[range.clone()];
                    let m_absmax = &mut exp_avg_absmax[blocks.clone()];
                    let v_codes = &mut exp_avg_sq[range];
                    let v_absmax = &mut exp_avg_sq_absmax[blocks];
                    coders.exp_avg.decode(m_codes, m_absmax, m);
                    coders.exp_avg_sq.decode(v_codes, v_absmax, v);
                    arithmetic::update(backend, &self.constants, p, g, m, v);
                    // Scales were checked and gradients bounded, so the moments are finite.
                    let finite = coders.exp_avg.encode(m, m_codes, m_absmax)
                        & coders.exp_avg_sq.encode(v, v_codes, v_absmax);
                    debug_assert!(finite);
                    arithmetic::keep_from_zero(backend, v, v_codes);
                }
            }
            values.write(backend, p);
        }
    }
}
