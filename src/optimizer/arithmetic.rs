//! The update itself, compiled once for each instruction set; the compiler vectorises it. No
//! operation is fused or reordered, so every version gives the same bits.
#![allow(unsafe_code)]

use super::AdamW;
use crate::blockwise::versions;

/// What the settings and the step count amount to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Constants {
    /// What weight decay leaves of a parameter.
    keep: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// 1, or -1 to go up the gradient.
    direction: f32,
    /// The learning rate with the first bias correction.
    stride: f32,
    /// The second bias correction.
    second_correction: f32,
    eps: f32,
}

impl Constants {
    /// Computed in double precision and rounded once.
    // Rounding is meant; steps are far below 2^53.
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
    pub(super) fn new(settings: &AdamW, step: u64) -> Self {
        let step = step as f64;
        Self {
            keep: (1.0 - settings.lr * settings.weight_decay) as f32,
            beta1: settings.beta1 as f32,
            one_minus_beta1: (1.0 - settings.beta1) as f32,
            beta2: settings.beta2 as f32,
            one_minus_beta2: (1.0 - settings.beta2) as f32,
            direction: if settings.maximize { -1.0 } else { 1.0 },
            stride: (settings.lr / (1.0 - settings.beta1.powf(step))) as f32,
            second_correction: (1.0 / (1.0 - settings.beta2.powf(step)).sqrt()) as f32,
            eps: settings.eps as f32,
        }
    }

    /// In the order of their declaration.
    pub(super) const fn in_order(&self) -> [f32; 9] {
        [
            self.keep,
            self.beta1,
            self.one_minus_beta1,
            self.beta2,
            self.one_minus_beta2,
            self.direction,
            self.stride,
            self.second_correction,
            self.eps,
        ]
    }
}

versions! {
    /// Updates the parameters `p` and the moments `m` and `v` with the gradients `g`, all of one
    /// length.
    update = update_inlined(
        c: &Constants,
        p: &mut [f32],
        g: &[f32],
        m: &mut [f32],
        v: &mut [f32]
    ) -> ()
}

versions! {
    /// Whether all magnitudes are below `limit`. A NaN is not.
    all_below = all_below_inlined(numbers: &[f32], limit: f32) -> bool
}

versions! {
    /// Gives code 1 to second moments that are not zero and have code 0.
    keep_from_zero = keep_from_zero_inlined(numbers: &[f32], codes: &mut [u8]) -> ()
}

#[inline(always)]
fn update_inlined(c: &Constants, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = c.direction * g;
        *m = c.beta1 * *m + c.one_minus_beta1 * g;
        *v = c.beta2 * *v + c.one_minus_beta2 * (g * g);
        let denominator = v.sqrt() * c.second_correction + c.eps;
        *p = *p * c.keep - c.stride * (*m / denominator);
    }
}

#[inline(always)]
fn all_below_inlined(numbers: &[f32], limit: f32) -> bool {
    // No early exit, which would keep it from being vectorised.
    numbers
        .iter()
        .fold(true, |all, number| all & (number.abs() < limit))
}

#[inline(always)]
fn keep_from_zero_inlined(numbers: &[f32], codes: &mut [u8]) {
    for (number, code) in numbers.iter().zip(codes) {
        *code |= u8::from((*number > 0.0) & (*code == 0));
    }
}
