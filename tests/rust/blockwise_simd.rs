//! Every SIMD backend gives the bytes of the scalar specification, on any number of threads.

#![allow(clippy::expect_used, clippy::panic)]

use fourbit::codebook::Ties;
use fourbit::layout::Layout;
use fourbit::{Backend, BlockSize, Codebook, Element, Error, blockwise};
use half::{bf16, f16};
use proptest::prelude::*;

/// Elements that a task has, as far as the tests care: inputs beyond it are cut into several.
const SEVERAL_TASKS: usize = 3 << 16;

/// A small generator, so that a failing case is a few numbers and not a megabyte.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// From -1 to 1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    }

    fn finite_bits(&mut self) -> f32 {
        loop {
            let number = f32::from_bits(self.next() as u32);
            if number.is_finite() {
                return number;
            }
        }
    }

    /// Roughly normal, as weights are.
    fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.unit()).sum()
    }
}

/// Blocks that each stress one thing.
fn fill<T: Element>(random: &mut Random, codebook: &Codebook, block: &mut [T]) {
    let scales = [
        1.0,
        0.02,
        3.0e4,
        f32::MIN_POSITIVE,
        1e-39,
        1.1 * 2.0_f32.powi(-128),
        2.0_f32.powi(-128).next_down(),
        1e-45,
        f32::MAX,
        2.0_f32.powi(127),
    ];
    let kind = random.below(8);
    let scale = scales[random.below(scales.len())];
    for element in block.iter_mut() {
        let number = match kind {
            0 => 0.0,
            1 => -0.0,
            2 => random.normal() * scale,
            3 => random.unit() * scale,
            4 => random.finite_bits(),
            5 => [0.0, -0.0, scale, -scale][random.below(4)],
            // Midpoints and their neighbours, which are exact where the scale is a power of two.
            _ => {
                let midpoint = codebook.midpoints()[random.below(codebook.midpoints().len())];
                let scale = if kind == 6 { 1.0 } else { scale };
                let near = midpoint * scale;
                [near, near.next_up(), near.next_down()][random.below(3)]
            }
        };
        *element = finite::<T>(number);
    }
    if kind >= 6 && !block.is_empty() {
        let place = random.below(block.len());
        block[place] = finite::<T>(if kind == 6 { 1.0 } else { scale });
    }
}

/// Narrow types overflow to infinity, which is no input.
fn finite<T: Element>(number: f32) -> T {
    let element = T::from_f32(number);
    if element.to_f32().is_finite() {
        element
    } else {
        T::from_f32(number.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
    }
}

fn input<T: Element>(
    seed: u64,
    length: usize,
    codebook: &Codebook,
    block_size: BlockSize,
) -> Vec<T> {
    let mut random = Random(seed);
    let mut input = vec![T::from_f32(0.0); length];
    for block in input.chunks_mut(block_size.get()) {
        fill(&mut random, codebook, block);
    }
    input
}

fn quantized<T: Element>(
    backend: Backend,
    input: &[T],
    codebook: &Codebook,
    block_size: BlockSize,
) -> Result<(Vec<u8>, Vec<f32>), Error> {
    let layout = Layout::new(input.len() as u64, block_size, codebook.code_bits());
    let mut packed = vec![0xa5; layout.packed_bytes as usize];
    let mut absmax = vec![-7.0; layout.blocks as usize];
    blockwise::quantize_with(
        backend,
        input,
        codebook,
        block_size,
        &mut packed,
        &mut absmax,
    )?;
    Ok((packed, absmax))
}

/// Exact, so it tells elements apart as their own bits would; all NaNs are one.
fn bits<T: Element>(elements: &[T]) -> Vec<u32> {
    let bits = |number: f32| if number.is_nan() { f32::NAN } else { number }.to_bits();
    elements
        .iter()
        .map(|element| bits(element.to_f32()))
        .collect()
}

fn simd() -> Vec<Backend> {
    Backend::available().split_off(1)
}

fn check_quantize<T: Element>(seed: u64, length: usize, codebook: &Codebook, size: BlockSize) {
    let input = input::<T>(seed, length, codebook, size);
    let expected = quantized(Backend::SCALAR, &input, codebook, size).expect("finite");
    for backend in simd() {
        let got = quantized(backend, &input, codebook, size).expect("finite");
        assert_eq!(
            bits(&got.1),
            bits(&expected.1),
            "absmax, {}",
            backend.name()
        );
        assert!(
            got.0 == expected.0,
            "codes, {}: first at byte {:?}",
            backend.name(),
            got.0.iter().zip(&expected.0).position(|(a, b)| a != b)
        );
    }
}

fn check_dequantize<T: Element>(seed: u64, length: usize, codebook: &Codebook, size: BlockSize) {
    let mut random = Random(seed);
    let layout = Layout::new(length as u64, size, codebook.code_bits());
    let packed: Vec<u8> = (0..layout.packed_bytes)
        .map(|_| random.next() as u8)
        .collect();
    // Of either sign, of any size, and now and then hostile.
    let scale = |random: &mut Random| match random.below(8) {
        0 => 0.0,
        1 => -0.0,
        2 => 2.0_f32.powi(-130),
        3 => [f32::INFINITY, f32::NAN, f32::MAX, -f32::MAX][random.below(4)],
        4 | 5 => random.finite_bits(),
        _ => random.normal(),
    };
    let absmax: Vec<f32> = (0..layout.blocks).map(|_| scale(&mut random)).collect();
    let decoded = |backend| {
        let mut output = vec![T::from_f32(-3.0); length];
        blockwise::dequantize_with(backend, &packed, &absmax, codebook, size, &mut output)
            .expect("right sizes");
        bits(&output)
    };
    let expected = decoded(Backend::SCALAR);
    for backend in simd() {
        let got = decoded(backend);
        let first = got.iter().zip(&expected).position(|(a, b)| a != b);
        assert!(got == expected, "{}: first at {first:?}", backend.name());
    }
}

/// A map of the given number of entries and codes of the given bits, with gaps and repeated
/// values, in no order.
fn user_map(seed: u64) -> Codebook {
    let mut random = Random(seed);
    let codes = [4, 16, 256][random.below(3)];
    let entries = 2 + random.below(codes - 1);
    let mut indices: Vec<u64> = (0..codes as u64).collect();
    for last in (1..codes).rev() {
        indices.swap(last, random.below(last + 1));
    }
    let mut map: Vec<(u64, f32)> = indices[..entries]
        .iter()
        .map(|&index| (index, (random.unit() * 64.0).round() / 64.0))
        .collect();
    (map[0].1, map[1].1) = (-1.0, 1.0);
    let ties = [Ties::Lower, Ties::Upper][random.below(2)];
    Codebook::from_map("user", &map, ties).expect("a good map")
}

fn codebooks() -> impl Strategy<Value = Codebook> {
    prop_oneof![
        3 => Just(Codebook::nf4().clone()),
        1 => Just(Codebook::fp4().clone()),
        1 => Just(Codebook::int4().clone()),
        1 => Just(Codebook::dynamic_signed().clone()),
        1 => Just(Codebook::dynamic_unsigned().clone()),
        4 => any::<u64>().prop_map(user_map),
    ]
}

fn block_sizes() -> impl Strategy<Value = BlockSize> {
    (5_u32..=12).prop_map(|log| BlockSize::new(1 << log).expect("of the format"))
}

/// Everything up to two blocks and a bit, and lengths about a task's end.
fn lengths(size: BlockSize) -> impl Strategy<Value = usize> {
    let size = size.get();
    prop_oneof![
        6 => 0..=2 * size + 1,
        3 => 0..=8 * size,
        1 => (1_usize << 16) - 2..=(1 << 16) + 2,
    ]
}

fn cases() -> impl Strategy<Value = (u64, Codebook, BlockSize, usize)> {
    (any::<u64>(), codebooks(), block_sizes()).prop_flat_map(|(seed, codebook, size)| {
        (Just(seed), Just(codebook), Just(size), lengths(size))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_backend_quantizes_to_the_same_bytes((seed, codebook, size, length) in cases()) {
        check_quantize::<f32>(seed, length, &codebook, size);
        check_quantize::<f16>(seed, length, &codebook, size);
        check_quantize::<bf16>(seed, length, &codebook, size);
    }

    #[test]
    fn every_backend_dequantizes_to_the_same_bits((seed, codebook, size, length) in cases()) {
        check_dequantize::<f32>(seed, length, &codebook, size);
        check_dequantize::<f16>(seed, length, &codebook, size);
        check_dequantize::<bf16>(seed, length, &codebook, size);
    }

    #[test]
    fn every_backend_finds_the_first_element_that_is_not_finite(
        (seed, codebook, size, length) in cases(),
        places in proptest::collection::vec(any::<prop::sample::Index>(), 1..4),
    ) {
        prop_assume!(length > 0);
        let mut input = input::<bf16>(seed, length, &codebook, size);
        for (place, bad) in places.iter().zip([bf16::NAN, bf16::INFINITY, bf16::NEG_INFINITY]) {
            input[place.index(length)] = bad;
        }
        let first = input.iter().position(|x| !x.is_finite()).expect("one was put there") as u64;
        for backend in Backend::available() {
            match quantized(backend, &input, &codebook, size) {
                Err(Error::NonFinite { index, value }) => {
                    prop_assert_eq!(index, first);
                    prop_assert!(!value.is_finite());
                }
                other => prop_assert!(false, "{}: {:?}", backend.name(), other.is_ok()),
            }
        }
    }
}

#[test]
fn there_is_something_to_test() {
    let expected = if cfg!(target_arch = "aarch64") {
        "neon"
    } else {
        "avx2"
    };
    let names: Vec<_> = simd().into_iter().map(Backend::name).collect();
    // Every processor of the last ten years.
    assert!(names.contains(&expected), "{names:?}");
}

#[test]
fn every_pattern_of_16_bits_quantizes_to_the_same_bytes() {
    fn check<T: Element>(patterns: impl Iterator<Item = T>) {
        let input: Vec<T> = patterns.filter(|x| x.to_f32().is_finite()).collect();
        for codebook in [Codebook::nf4(), Codebook::fp4(), Codebook::dynamic_signed()] {
            let expected =
                quantized(Backend::SCALAR, &input, codebook, BlockSize::DEFAULT).expect("finite");
            for backend in simd() {
                let got = quantized(backend, &input, codebook, BlockSize::DEFAULT).expect("finite");
                assert!(got == expected, "{} {}", backend.name(), codebook.name());
            }
        }
    }
    check((0..=u16::MAX).map(bf16::from_bits));
    check((0..=u16::MAX).map(f16::from_bits));
}

#[test]
fn a_non_finite_element_of_every_type_is_found_in_whole_groups_and_tails() {
    fn check<T: Element>() {
        for length in [64, 65, 95, 129] {
            for place in 0..length {
                for bad in [f32::NAN, f32::NEG_INFINITY] {
                    let mut input = vec![T::from_f32(0.5); length];
                    input[place] = T::from_f32(bad);
                    for backend in Backend::available() {
                        let result =
                            quantized(backend, &input, Codebook::nf4(), BlockSize::DEFAULT);
                        assert!(
                            matches!(result, Err(Error::NonFinite { index, .. })
                                if index == place as u64),
                            "{} {place} of {length}",
                            backend.name()
                        );
                    }
                }
            }
        }
    }
    check::<f32>();
    check::<f16>();
    check::<bf16>();
}

#[test]
fn the_number_of_threads_does_not_matter() {
    let codebook = Codebook::nf4();
    let length = SEVERAL_TASKS + 12_345;
    let mut input = input::<bf16>(7, length, codebook, BlockSize::DEFAULT);
    let on = |threads: usize, input: &[bf16]| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .expect("a pool");
        pool.install(|| {
            Backend::available()
                .into_iter()
                .map(|backend| {
                    let (packed, absmax) = quantized(backend, input, codebook, BlockSize::DEFAULT)?;
                    let mut output = vec![bf16::ZERO; input.len()];
                    blockwise::dequantize_with(
                        backend,
                        &packed,
                        &absmax,
                        codebook,
                        BlockSize::DEFAULT,
                        &mut output,
                    )?;
                    Ok((packed, bits(&absmax), bits(&output)))
                })
                .collect::<Result<Vec<_>, Error>>()
        })
    };
    let expected = on(1, &input).expect("finite");
    assert!(expected.iter().all(|result| *result == expected[0]));
    for threads in [2, 7] {
        assert!(
            on(threads, &input).expect("finite") == expected,
            "{threads} threads"
        );
    }
    // With several bad elements in several tasks, the first is named whoever meets it first.
    for place in [length - 1, 150_000, 70_000] {
        input[place] = bf16::NAN;
        for threads in [1, 2, 7] {
            let result = on(threads, &input).map(|_| ());
            assert!(
                matches!(result, Err(Error::NonFinite { index, .. }) if index == place as u64),
                "{threads} threads"
            );
        }
    }
}

#[test]
fn large_outputs_and_outputs_at_any_address_decode_alike() {
    // 33 MiB: written past the cache. One element further on, no write is aligned.
    let length = 33 << 19;
    let mut random = Random(3);
    let packed: Vec<u8> = (0..length / 2).map(|_| random.next() as u8).collect();
    let absmax: Vec<f32> = (0..length / 64).map(|_| random.normal()).collect();
    let decoded = |backend, output: &mut [bf16]| {
        blockwise::dequantize_with(
            backend,
            &packed,
            &absmax,
            Codebook::nf4(),
            BlockSize::DEFAULT,
            output,
        )
        .expect("right sizes");
    };
    let mut expected = vec![bf16::ZERO; length];
    decoded(Backend::SCALAR, &mut expected);
    let mut room = vec![bf16::ONE; length + 64];
    let aligned = room.as_ptr().align_offset(64);
    for backend in simd() {
        for start in [aligned, aligned + 1] {
            let output = &mut room[start..start + length];
            output.fill(bf16::ONE);
            decoded(backend, output);
            assert!(output == expected, "{} at {start}", backend.name());
        }
    }
}

/// Every number at which a code may change, and every number at which a way to find it may: ranks
/// are counts of midpoints below a number, and SIMD code finds them by a number's leading bits.
#[test]
fn codes_of_the_dynamic_maps_change_at_midpoints_and_nowhere_else() {
    let size = BlockSize::new(256).expect("of the format");
    for (codebook, signed) in [
        (Codebook::dynamic_signed(), true),
        (Codebook::dynamic_unsigned(), false),
    ] {
        // All leading 16 bits of numbers up to 1.
        let leading = (0..=1.0_f32.to_bits() >> 16).map(|bits| f32::from_bits(bits << 16));
        let values = codebook.values().iter().chain(codebook.midpoints());
        let near = leading.chain(values.map(|number| number.abs()));
        let near = near.flat_map(|x| [x.next_down(), x, x.next_up()]);
        let numbers: Vec<f32> = near
            .flat_map(|x| if signed { [x, -x] } else { [x, x] })
            .map(|x| x.clamp(-1.0, 1.0))
            .collect();
        // Each in every second place of a group, in blocks of scale 1.
        for shift in [0, 1] {
            let mut input = vec![0.0; shift];
            for chunk in numbers.chunks(255 - shift) {
                input.resize(input.len().next_multiple_of(256) + shift, 0.0);
                input.push(1.0);
                input.extend(chunk);
            }
            let expected: Vec<u8> = input.iter().map(|&x| codebook.encode(x)).collect();
            for backend in Backend::available() {
                let (codes, _) = quantized(backend, &input, codebook, size).expect("finite");
                let wrong = codes.iter().zip(&expected).position(|(a, b)| a != b);
                assert!(
                    wrong.is_none(),
                    "{} {}: {:?}",
                    backend.name(),
                    codebook.name(),
                    wrong.map(|at| input[at])
                );
            }
        }
    }
}
