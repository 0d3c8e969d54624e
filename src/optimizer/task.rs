//! A part of a parameter's step that one thread does.

use std::sync::atomic::{AtomicBool, Ordering};

use super::arithmetic::{self, Constants};
use super::blocks::Simd;
use super::floats::front_mut;
use super::{Floats, FloatsMut, GRADIENT_LIMIT, STATE_BLOCK_SIZE, State};
use crate::blockwise::Coder;
use crate::{Backend, Codebook};

/// Elements that are widened, updated and narrowed while they stay in the first-level cache.
pub(super) const PIECE: usize = 1024;
/// Places at which one thread reads a gradient at the same time, and elements at each in turn.
const STREAMS: usize = 4;
const STREAM_PIECE: usize = 256;
const BLOCK: usize = STATE_BLOCK_SIZE.get();
const _: () = assert!(PIECE.is_multiple_of(BLOCK));

/// What all tasks need.
pub(super) struct Tools {
    backend: Backend,
    /// None on the scalar backend.
    simd: Option<Simd>,
    exp_avg: Coder<'static>,
    exp_avg_sq: Coder<'static>,
}

impl Tools {
    pub(super) fn new(backend: Backend) -> Self {
        Self {
            backend,
            simd: Simd::new(backend),
            exp_avg: Coder::new(backend, Codebook::dynamic_signed(), STATE_BLOCK_SIZE),
            exp_avg_sq: Coder::new(backend, Codebook::dynamic_unsigned(), STATE_BLOCK_SIZE),
        }
    }
}

/// Says so where a gradient, or a part of it, cannot be used.
pub(super) fn check(backend: Backend, gradient: Floats<'_>, usable: &AtomicBool) {
    if usable.load(Ordering::Relaxed) && !is_usable(backend, gradient) {
        usable.store(false, Ordering::Relaxed);
    }
}

fn is_usable(backend: Backend, gradient: Floats<'_>) -> bool {
    let below = |numbers: &[f32]| arithmetic::all_below(backend, numbers, GRADIENT_LIMIT);
    if let Floats::F32(numbers) = gradient {
        // Of several places in turns: the hardware looks ahead in each.
        let places = numbers.len().div_ceil(STREAMS).max(1);
        return (0..places).step_by(STREAM_PIECE).all(|first| {
            numbers.chunks(places).all(|place| {
                let last = place.len().min(first + STREAM_PIECE);
                place.get(first..last).is_none_or(below)
            })
        });
    }
    let mut buffer = [0.0; PIECE];
    gradient.pieces(PIECE).all(|piece| {
        let numbers = &mut buffer[..piece.len()];
        piece.read(backend, numbers);
        below(numbers)
    })
}

/// A part of a parameter that one thread updates.
pub(super) struct Task<'a> {
    pub(super) constants: Constants,
    pub(super) values: FloatsMut<'a>,
    pub(super) gradient: Floats<'a>,
    pub(super) state: State<'a>,
    /// Whether all of the parameter's gradient can be used.
    pub(super) usable: &'a AtomicBool,
    /// Whether that is known. If not, the task is a whole parameter's.
    pub(super) checked: bool,
}

impl Task<'_> {
    pub(super) fn run(self, tools: &Tools) {
        let (backend, constants) = (tools.backend, &self.constants);
        if !self.checked {
            check(backend, self.gradient, self.usable);
        }
        if !self.usable.load(Ordering::Relaxed) {
            return;
        }
        match self.state {
            State::Full {
                exp_avg,
                exp_avg_sq,
            } => match (self.values, self.gradient) {
                (FloatsMut::F32(p), Floats::F32(g)) => {
                    arithmetic::update(backend, constants, p, g, exp_avg, exp_avg_sq);
                }
                (values, gradient) => {
                    let (mut m, mut v) = (exp_avg, exp_avg_sq);
                    widened(backend, values, gradient, |p, g| {
                        let (m, v) = (front_mut(&mut m, p.len()), front_mut(&mut v, p.len()));
                        arithmetic::update(backend, constants, p, g, m, v);
                    });
                }
            },
            State::Blockwise {
                exp_avg,
                exp_avg_absmax,
                exp_avg_sq,
                exp_avg_sq_absmax,
            } => {
                let blocks = Blocks {
                    m: exp_avg,
                    m_absmax: exp_avg_absmax,
                    v: exp_avg_sq,
                    v_absmax: exp_avg_sq_absmax,
                };
                match &tools.simd {
                    None => step_by_step(tools, constants, self.values, self.gradient, blocks),
                    Some(simd) => at_once(simd, constants, self.values, self.gradient, blocks),
                }
            }
        }
    }
}

/// Codes and scales of the first and the second moments.
pub(super) struct Blocks<'a> {
    pub(super) m: &'a mut [u8],
    pub(super) m_absmax: &'a mut [f32],
    pub(super) v: &'a mut [u8],
    pub(super) v_absmax: &'a mut [f32],
}

impl Blocks<'_> {
    /// Takes the first elements off, whole blocks of them or all there are.
    pub(super) fn take_front(&mut self, elements: usize) -> Self {
        let blocks = elements.div_ceil(BLOCK);
        Self {
            m: front_mut(&mut self.m, elements),
            m_absmax: front_mut(&mut self.m_absmax, blocks),
            v: front_mut(&mut self.v, elements),
            v_absmax: front_mut(&mut self.v_absmax, blocks),
        }
    }
}

/// Calls `update` with every [`PIECE`] of the values and the gradient in single precision.
fn widened(
    backend: Backend,
    values: FloatsMut<'_>,
    gradient: Floats<'_>,
    mut update: impl FnMut(&mut [f32], &[f32]),
) {
    let (mut p, mut g) = ([0.0; PIECE], [0.0; PIECE]);
    for (mut values, gradient) in values.pieces(PIECE).zip(gradient.pieces(PIECE)) {
        let (p, g) = (&mut p[..values.len()], &mut g[..gradient.len()]);
        values.read(backend, p);
        gradient.read(backend, g);
        update(p, g);
        values.write(backend, p);
    }
}

/// The specification of a step with 8-bit state.
fn step_by_step(
    tools: &Tools,
    constants: &Constants,
    values: FloatsMut<'_>,
    gradient: Floats<'_>,
    mut state: Blocks<'_>,
) {
    let backend = tools.backend;
    let (mut m, mut v) = ([0.0; PIECE], [0.0; PIECE]);
    widened(backend, values, gradient, |p, g| {
        let state = state.take_front(p.len());
        let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
        tools.exp_avg.decode(state.m, state.m_absmax, m);
        tools.exp_avg_sq.decode(state.v, state.v_absmax, v);
        arithmetic::update(backend, constants, p, g, m, v);
        // Scales were checked and gradients bounded, so the moments are finite.
        let finite = tools.exp_avg.encode(m, state.m, state.m_absmax)
            & tools.exp_avg_sq.encode(v, state.v, state.v_absmax);
        debug_assert!(finite);
        arithmetic::keep_from_zero(backend, v, state.v);
    });
}

/// The same bytes, with all of a block at hand.
fn at_once(
    simd: &Simd,
    constants: &Constants,
    mut values: FloatsMut<'_>,
    mut gradient: Floats<'_>,
    mut state: Blocks<'_>,
) {
    let whole = values.len() - values.len() % BLOCK;
    let now = (values.take_front(whole), gradient.take_front(whole));
    let state_now = state.take_front(whole);
    match now {
        (FloatsMut::F32(p), Floats::F32(g)) => simd.update(constants, p, g, state_now),
        (FloatsMut::F16(p), Floats::F16(g)) => simd.update(constants, p, g, state_now),
        (FloatsMut::Bf16(p), Floats::Bf16(g)) => simd.update(constants, p, g, state_now),
        (values, gradient) => {
            let mut state = state_now;
            widened(simd.backend(), values, gradient, |p, g| {
                simd.update(constants, p, g, state.take_front(p.len()));
            });
        }
    }
    widened(simd.backend(), values, gradient, |p, g| {
        short_block(simd, constants, p, g, &mut state);
    });
}

/// Updates a block that is not full as one that is, by adding elements of zero with a gradient of
/// zero: they do not change the scales.
fn short_block(
    simd: &Simd,
    constants: &Constants,
    p: &mut [f32],
    g: &[f32],
    state: &mut Blocks<'_>,
) {
    let elements = p.len();
    let (mut full_p, mut full_g) = ([0.0; BLOCK], [0.0; BLOCK]);
    full_p[..elements].copy_from_slice(p);
    full_g[..elements].copy_from_slice(g);
    let mut m = [Codebook::dynamic_signed().encode(0.0); BLOCK];
    let mut v = [Codebook::dynamic_unsigned().encode(0.0); BLOCK];
    m[..elements].copy_from_slice(state.m);
    v[..elements].copy_from_slice(state.v);
    let full_state = Blocks {
        m: &mut m,
        m_absmax: state.m_absmax,
        v: &mut v,
        v_absmax: state.v_absmax,
    };
    simd.update(constants, &mut full_p, &full_g, full_state);
    p.copy_from_slice(&full_p[..elements]);
    state.m.copy_from_slice(&m[..elements]);
    state.v.copy_from_slice(&v[..elements]);
}
