//! AdamW against a plain double-precision one, and its bytes against one thread in plain Rust.

#![allow(clippy::expect_used, clippy::panic)]

use fourbit::optimizer::{AdamW, Floats, FloatsMut, Parameter, STATE_BLOCK_SIZE, State, step_with};
use fourbit::{Backend, Codebook, Error, team};
use half::{bf16, f16};
use proptest::prelude::*;

const SETTINGS: AdamW = AdamW {
    lr: 3e-3,
    beta1: 0.9,
    beta2: 0.98,
    eps: 1e-7,
    weight_decay: 0.02,
    maximize: false,
};

/// From -1 to 1, by place and seed, with magnitudes over four decades.
fn numbers(seed: u32, length: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32
    };
    (0..length)
        .map(|_| (next() * 2.0 - 1.0) * 10_f32.powf(-4.0 * next()))
        .collect()
}

/// A parameter's numbers in one of the types.
#[derive(Clone, Debug, PartialEq)]
enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Numbers {
    fn new(kind: usize, numbers: &[f32]) -> Self {
        match kind % 3 {
            0 => Self::F32(numbers.to_vec()),
            1 => Self::F16(numbers.iter().map(|&x| f16::from_f32(x)).collect()),
            _ => Self::Bf16(numbers.iter().map(|&x| bf16::from_f32(x)).collect()),
        }
    }

    fn view(&self) -> Floats<'_> {
        match self {
            Self::F32(numbers) => Floats::F32(numbers),
            Self::F16(numbers) => Floats::F16(numbers),
            Self::Bf16(numbers) => Floats::Bf16(numbers),
        }
    }

    fn view_mut(&mut self) -> FloatsMut<'_> {
        match self {
            Self::F32(numbers) => FloatsMut::F32(numbers),
            Self::F16(numbers) => FloatsMut::F16(numbers),
            Self::Bf16(numbers) => FloatsMut::Bf16(numbers),
        }
    }

    fn wide(&self) -> Vec<f64> {
        match self {
            Self::F32(numbers) => numbers.iter().map(|&x| f64::from(x)).collect(),
            Self::F16(numbers) => numbers.iter().map(|&x| x.to_f64()).collect(),
            Self::Bf16(numbers) => numbers.iter().map(|&x| x.to_f64()).collect(),
        }
    }
}

/// A parameter with its state, as a caller holds it.
#[derive(Clone, Debug, PartialEq)]
struct Held {
    values: Numbers,
    full: Option<[Vec<f32>; 2]>,
    codes: [Vec<u8>; 2],
    absmax: [Vec<f32>; 2],
}

impl Held {
    fn new(values: Numbers, bits: u32) -> Self {
        let length = values.view().len();
        let blocks = length.div_ceil(STATE_BLOCK_SIZE.get());
        Self {
            values,
            full: (bits == 32).then(|| [vec![0.0; length], vec![0.0; length]]),
            codes: [vec![0; length], vec![0; length]],
            absmax: [vec![0.0; blocks], vec![0.0; blocks]],
        }
    }

    fn parameter<'a>(&'a mut self, gradient: &'a Numbers, step: u64) -> Parameter<'a> {
        let [exp_avg_absmax, exp_avg_sq_absmax] = &mut self.absmax;
        let [exp_avg, exp_avg_sq] = &mut self.codes;
        let state = match &mut self.full {
            Some([exp_avg, exp_avg_sq]) => State::Full {
                exp_avg,
                exp_avg_sq,
            },
            None => State::Blockwise {
                exp_avg,
                exp_avg_absmax,
                exp_avg_sq,
                exp_avg_sq_absmax,
            },
        };
        Parameter {
            values: self.values.view_mut(),
            gradient: gradient.view(),
            state,
            step,
        }
    }
}

/// The textbook, in double precision: `[p, m, v]`.
fn textbook(settings: &AdamW, p: f64, g: f64, m: f64, v: f64, step: u64) -> [f64; 3] {
    let g = if settings.maximize { -g } else { g };
    let m = settings.beta1 * m + (1.0 - settings.beta1) * g;
    let v = settings.beta2 * v + (1.0 - settings.beta2) * g * g;
    let m_hat = m / (1.0 - settings.beta1.powi(step as i32));
    let v_hat = v / (1.0 - settings.beta2.powi(step as i32));
    let p = p - settings.lr * settings.weight_decay * p;
    [
        p - settings.lr * m_hat / (v_hat.sqrt() + settings.eps),
        m,
        v,
    ]
}

#[test]
fn twenty_steps_with_full_state_follow_the_textbook() {
    for maximize in [false, true] {
        let settings = AdamW {
            maximize,
            ..SETTINGS
        };
        let mut held = Held::new(Numbers::new(0, &numbers(1, 3001)), 32);
        let mut expected: Vec<[f64; 3]> =
            held.values.wide().iter().map(|&p| [p, 0.0, 0.0]).collect();
        for step in 1..=20 {
            let gradient = Numbers::new(0, &numbers(100 + step as u32, 3001));
            for (e, g) in expected.iter_mut().zip(gradient.wide()) {
                *e = textbook(&settings, e[0], g, e[1], e[2], step);
            }
            let backend = Backend::detect().expect("a backend");
            let skipped = step_with(backend, &settings, vec![held.parameter(&gradient, step)]);
            assert!(skipped.expect("good settings").is_empty());
        }
        for (e, p) in expected.iter().zip(held.values.wide()) {
            // 20 steps of at most 3 roundings of numbers up to 1, half an ulp (2^-25) each.
            assert!((e[0] - p).abs() < 60.0 * 2.0_f64.powi(-25), "{} {p}", e[0]);
        }
    }
}

#[test]
fn blockwise_state_is_decoded_updated_and_encoded_by_the_rule() {
    // One step at a time, so that roundings of the state do not add up.
    let length = 5 * 256 + 77;
    let mut held = Held::new(Numbers::new(0, &numbers(2, length)), 8);
    for step in 1..=10 {
        let before = held.clone();
        let gradient = Numbers::new(0, &numbers(200 + step as u32, length));
        let backend = Backend::detect().expect("a backend");
        step_with(backend, &SETTINGS, vec![held.parameter(&gradient, step)]).expect("good");
        let (signed, unsigned) = (Codebook::dynamic_signed(), Codebook::dynamic_unsigned());
        let old = |which: usize, map: &Codebook, at: usize| {
            map.values()[usize::from(before.codes[which][at])] * before.absmax[which][at / 256]
        };
        let mut moments = [Vec::new(), Vec::new()];
        let numbers = before.values.wide().into_iter().zip(gradient.wide());
        for (at, ((p, g), got)) in numbers.zip(held.values.wide()).enumerate() {
            let (m, v) = (old(0, signed, at), old(1, unsigned, at));
            let [p, m, v] = textbook(&SETTINGS, p, g, f64::from(m), f64::from(v), step);
            // Three roundings of a number of at most 1, and of an update of at most 0.03.
            assert!((got - p).abs() < 2.0_f64.powi(-23), "{step} {at}");
            moments[0].push(m as f32);
            moments[1].push(v as f32);
        }
        for (which, map) in [signed, unsigned].into_iter().enumerate() {
            for (block, moments) in moments[which].chunks(256).enumerate() {
                let scale = moments.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
                let got = held.absmax[which][block];
                assert!((scale - got).abs() <= scale * 1e-6, "scale {scale} {got}");
                for (within, moment) in moments.iter().enumerate() {
                    let code = held.codes[which][256 * block + within];
                    let nearest = map.encode(moment / scale);
                    // Rounding in single precision may move a number over a midpoint.
                    let lower = map.encode(moment / scale * (1.0 - 1e-6));
                    let upper = map.encode(moment / scale * (1.0 + 1e-6));
                    let kept = if which == 1 && *moment > 0.0 { 1 } else { 0 };
                    assert!(
                        [nearest, lower, upper].map(|c| c.max(kept)).contains(&code),
                        "{which} {block} {within}: {code} {nearest}"
                    );
                }
            }
        }
    }
}

/// On so many threads of a host; of a pool if there are none.
fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    fn start(threads: usize, member: &(dyn Fn() + Sync)) {
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(member);
            }
            member();
        });
    }
    if threads > 0 {
        return team::lend(start, threads, work);
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
    pool.expect("a pool").install(work)
}

/// Three steps of parameters of several types, sizes and state widths.
fn train(backend: Backend, threads: usize, seed: u32, lengths: &[usize]) -> Vec<Held> {
    let mut held: Vec<Held> = lengths
        .iter()
        .enumerate()
        .map(|(index, &length)| {
            let seed = seed.wrapping_add(index as u32);
            let values = Numbers::new(seed as usize / 2, &numbers(seed, length));
            Held::new(values, if seed.is_multiple_of(2) { 8 } else { 32 })
        })
        .collect();
    for step in 1..=3 {
        let gradients: Vec<Numbers> = lengths
            .iter()
            .enumerate()
            .map(|(index, &length)| {
                let seed = seed.wrapping_add((1000 * step + index) as u32);
                Numbers::new(seed as usize, &numbers(seed, length))
            })
            .collect();
        let parameters = held
            .iter_mut()
            .zip(&gradients)
            .map(|(held, gradient)| held.parameter(gradient, step as u64))
            .collect();
        let skipped = on_threads(threads, || step_with(backend, &SETTINGS, parameters));
        assert!(skipped.expect("good settings").is_empty());
    }
    held
}

proptest! {
    #![proptest_config(ProptestConfig {
        // Fewer where the machine is emulated.
        cases: if cfg!(target_arch = "x86_64") { 60 } else { 8 }, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn backends_and_threads_give_the_same_bytes(
        seed: u32,
        lengths in proptest::collection::vec(
            prop_oneof![0..70_usize, 200..1500_usize, 32_700..33_900_usize, 69_000..70_000_usize], 1..6
        ),
    ) {
        let expected = train(Backend::SCALAR, 1, seed, &lengths);
        for backend in Backend::available() {
            for threads in [0, 1, 2, 7] {
                let got = train(backend, threads, seed, &lengths);
                prop_assert!(got == expected, "{} {threads}", backend.name());
            }
        }
    }
}

/// Moments from nothing to the largest, in blocks of their own and side by side: scales whose
/// reciprocals overflow, numbers that vanish beside their scale, zeros.
#[test]
fn backends_give_the_same_bytes_at_the_ends_of_the_range() {
    let length = 40 * 256 + 100;
    let sizes = [1.0, 1e-12, 1e-20, 1e-30, 1e-38, 1e-44, 0.0, 1e15, 9e18];
    let run = |backend| {
        let mut held = Held::new(Numbers::new(0, &numbers(1, length)), 8);
        for step in 1..=4_u32 {
            let mut gradient = numbers(10 + step, length);
            for (at, g) in gradient.iter_mut().enumerate() {
                let block = at / 256;
                let mixed = if block.is_multiple_of(2) { at } else { 0 };
                *g *= sizes[(block + mixed * 7 + step as usize) % sizes.len()];
            }
            let gradient = Numbers::new(0, &gradient);
            let parameters = vec![held.parameter(&gradient, u64::from(step))];
            let skipped = step_with(backend, &SETTINGS, parameters);
            assert!(skipped.expect("good settings").is_empty());
        }
        held
    };
    let expected = run(Backend::SCALAR);
    for backend in Backend::available() {
        assert!(run(backend) == expected, "{}", backend.name());
    }
}

#[test]
fn a_gradient_that_cannot_be_used_leaves_everything_as_it_was() {
    let cases = [(8, 0), (8, 1), (8, 2), (32, 0), (32, 1), (32, 2)];
    let bads = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 2.0_f32.powi(63)];
    for (bits, threads) in cases {
        // Large gradients are looked at before any step, small ones where they are stepped.
        for (bad, length) in bads
            .into_iter()
            .flat_map(|bad| [(bad, 100_000), (bad, 3001)])
        {
            for place in [0, 31, length * 7 / 10, length - 1] {
                let mut held =
                    [3, 4, 5].map(|seed| Held::new(Numbers::new(0, &numbers(seed, length)), bits));
                let before = held.clone();
                let mut gradients = [6, 7, 8].map(|seed| Numbers::new(0, &numbers(seed, length)));
                let Numbers::F32(middle) = &mut gradients[1] else {
                    unreachable!()
                };
                middle[place] = bad;
                let parameters = held
                    .iter_mut()
                    .zip(&gradients)
                    .map(|(held, gradient)| held.parameter(gradient, 1))
                    .collect();
                let backend = Backend::detect().expect("a backend");
                let skipped = on_threads(threads, || step_with(backend, &SETTINGS, parameters));
                assert_eq!(skipped.expect("good settings"), [1]);
                assert!(held[1] == before[1]);
                assert!(held[0] != before[0] && held[2] != before[2]);
            }
        }
    }
    // Just below the limit is used, and what comes of it is finite.
    let mut held = Held::new(Numbers::new(0, &[1.0; 300]), 8);
    let gradient = Numbers::new(0, &[2.0_f32.powi(63).next_down(); 300]);
    for step in 1..=3 {
        let parameters = vec![held.parameter(&gradient, step)];
        let skipped = step_with(Backend::SCALAR, &SETTINGS, parameters);
        assert!(skipped.expect("good settings").is_empty());
    }
    assert!(held.absmax.iter().flatten().all(|scale| scale.is_finite()));
    assert!(held.values.wide().iter().all(|p| p.is_finite()));
}

#[test]
fn bad_settings_lengths_and_scales_are_refused_before_anything_changes() {
    let gradient = Numbers::new(0, &numbers(9, 300));
    let mut held = Held::new(Numbers::new(0, &numbers(8, 300)), 8);
    let before = held.clone();
    let refused = |settings: AdamW, held: &mut Held, gradient: &Numbers, step| {
        step_with(
            Backend::SCALAR,
            &settings,
            vec![held.parameter(gradient, step)],
        )
        .expect_err("bad input")
        .root()
        .to_string()
    };
    for (name, settings) in [
        (
            "lr",
            AdamW {
                lr: -1.0,
                ..SETTINGS
            },
        ),
        (
            "lr",
            AdamW {
                lr: f64::NAN,
                ..SETTINGS
            },
        ),
        (
            "beta1",
            AdamW {
                beta1: 1.0,
                ..SETTINGS
            },
        ),
        (
            "beta2",
            AdamW {
                beta2: -0.1,
                ..SETTINGS
            },
        ),
        (
            "eps",
            AdamW {
                eps: f64::INFINITY,
                ..SETTINGS
            },
        ),
        (
            "weight_decay",
            AdamW {
                weight_decay: -1e-9,
                ..SETTINGS
            },
        ),
    ] {
        let message = refused(settings, &mut held, &gradient, 1);
        assert!(message.starts_with(&format!("{name} is")), "{message}");
    }
    assert!(refused(SETTINGS, &mut held, &gradient, 0).starts_with("step is 0"));
    let short = Numbers::new(0, &numbers(9, 299));
    assert!(refused(SETTINGS, &mut held, &short, 1).starts_with("gradient has 299"));
    held.absmax[1].push(0.0);
    assert!(refused(SETTINGS, &mut held, &gradient, 1).starts_with("exp_avg_sq_absmax has 3"));
    held.absmax[1].pop();
    held.absmax[0][1] = f32::INFINITY;
    let error = step_with(
        Backend::SCALAR,
        &SETTINGS,
        vec![held.parameter(&gradient, 1)],
    );
    assert!(matches!(
        error.expect_err("bad").root(),
        Error::NonFinite { index: 1, .. }
    ));
    held.absmax[0][1] = 0.0;
    assert!(held == before);
}
