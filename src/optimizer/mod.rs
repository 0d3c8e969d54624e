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
//! | file | what it holds |
//! |---|---|
//! | `arithmetic` | the constants, and the update of numbers |
//! | `blocks` | the update of 8-bit state with SIMD: floor, and how far it is from it |
//! | `task` | a part of a parameter, in whatever types |
//! | `floats` | slices of any type |
//!
//! The exception: a `v` that is not zero never takes the code of zero (code 0) but the next one,
//! `3.25e-7` of its block's largest. Nearest, it would become 0 below half of that, where the `m`
//! of the same element, some `4e-4` of its block's largest, is kept; and as soon as its gradient
//! is 0 or tiny, the element would move by up to `lr * m / eps`, thousands of times too far (a
//! test of ours reached 228 in place of 0.02). With the exception it moves less than it might.

mod arithmetic;
mod blocks;
mod floats;
mod task;

use std::sync::atomic::AtomicBool;

use self::arithmetic::Constants;
use self::floats::front_mut;
pub use self::floats::{Floats, FloatsMut};
use self::task::{Task, Tools};
use crate::layout::check_length;
use crate::{Backend, BlockSize, Error, Result, team};

/// Elements that share a scale of the 8-bit state.
pub const STATE_BLOCK_SIZE: BlockSize = crate::layout::NESTED_BLOCK_SIZE;

/// Elements of a large parameter that a thread takes at a time.
const TASK_ELEMENTS: usize = 1 << 15;
/// Elements up to which one thread takes a whole parameter: the gradient is read once more, to see
/// whether it can be used before anything changes, and so many stay in the second-level cache.
const MOST_ALONE: usize = 1 << 18;
/// Elements up to which the calling thread does all of the work: it takes as long as waking others.
const SMALL_ELEMENTS: usize = 1 << 16;
/// Parts of the work for each thread, at least, so that the last one does not keep others waiting.
const PARTS: usize = 8;
const _: () = assert!(TASK_ELEMENTS.is_multiple_of(STATE_BLOCK_SIZE.get()));

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

/// Whether a step of so many elements is not worth other threads.
#[must_use]
pub const fn is_small(elements: usize) -> bool {
    elements <= SMALL_ELEMENTS
}

/// Takes one step of every parameter, on the threads of [`team`].
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
    let elements: usize = parameters.iter().map(|one| one.values.len()).sum();
    // What a thread may take on its own without others waiting for it at the end.
    let share = elements / (PARTS * team::threads());
    let most_alone = share.clamp(TASK_ELEMENTS, MOST_ALONE);

    let usable: Vec<_> = parameters.iter().map(|_| AtomicBool::new(true)).collect();
    let mut gradients = Vec::new();
    let mut tasks = Groups::default();
    for (parameter, usable) in parameters.into_iter().zip(&usable) {
        let constants = Constants::new(settings, parameter.step);
        if is_small(elements) || parameter.values.len() <= most_alone {
            tasks.push(parameter.whole(constants, usable));
        } else {
            let pieces = parameter.gradient.pieces(TASK_ELEMENTS);
            gradients.extend(pieces.map(|piece| (piece, usable)));
            parameter.cut(constants, usable, &mut tasks);
        }
    }
    let tools = Tools::new(backend);
    let tasks = tasks.all();
    let update = |tasks: Vec<Task<'_>>| tasks.into_iter().for_each(|task| task.run(&tools));
    if is_small(elements) {
        tasks.into_iter().for_each(update);
    } else {
        team::each(gradients, |(gradient, usable)| {
            task::check(backend, gradient, usable);
        });
        team::each(tasks, update);
    }
    let usable = usable.into_iter().map(AtomicBool::into_inner).enumerate();
    Ok(usable
        .filter_map(|(index, usable)| (!usable).then_some(index))
        .collect())
}

/// Tasks in groups, so that handing out many small ones costs little.
#[derive(Default)]
struct Groups<'a> {
    full: Vec<Vec<Task<'a>>>,
    last: Vec<Task<'a>>,
    last_elements: usize,
}

impl<'a> Groups<'a> {
    fn push(&mut self, task: Task<'a>) {
        self.last_elements += task.values.len();
        self.last.push(task);
        if self.last_elements >= TASK_ELEMENTS {
            self.full.push(std::mem::take(&mut self.last));
            self.last_elements = 0;
        }
    }

    fn all(mut self) -> Vec<Vec<Task<'a>>> {
        self.full.push(self.last);
        self.full
    }
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

    /// The whole step of the parameter, its gradient still to be checked.
    fn whole(self, constants: Constants, usable: &'a AtomicBool) -> Task<'a> {
        Task {
            constants,
            values: self.values,
            gradient: self.gradient,
            state: self.state,
            usable,
            checked: false,
        }
    }

    /// Cuts the parameter into the tasks of its step, its gradient being checked before.
    fn cut(mut self, constants: Constants, usable: &'a AtomicBool, tasks: &mut Groups<'a>) {
        while !self.values.is_empty() {
            tasks.push(Task {
                constants,
                values: self.values.take_front(TASK_ELEMENTS),
                gradient: self.gradient.take_front(TASK_ELEMENTS),
                state: self.state.take_front(TASK_ELEMENTS),
                usable,
                checked: true,
            });
        }
    }
}

impl State<'_> {
    /// Takes the moments of the first elements off: whole blocks of them, or all there are.
    fn take_front(&mut self, elements: usize) -> Self {
        match self {
            Self::Full {
                exp_avg,
                exp_avg_sq,
            } => Self::Full {
                exp_avg: front_mut(exp_avg, elements),
                exp_avg_sq: front_mut(exp_avg_sq, elements),
            },
            Self::Blockwise {
                exp_avg,
                exp_avg_absmax,
                exp_avg_sq,
                exp_avg_sq_absmax,
            } => {
                let blocks = elements.div_ceil(STATE_BLOCK_SIZE.get());
                Self::Blockwise {
                    exp_avg: front_mut(exp_avg, elements),
                    exp_avg_absmax: front_mut(exp_avg_absmax, blocks),
                    exp_avg_sq: front_mut(exp_avg_sq, elements),
                    exp_avg_sq_absmax: front_mut(exp_avg_sq_absmax, blocks),
                }
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
