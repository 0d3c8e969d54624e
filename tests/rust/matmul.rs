//! Products with packed weights against double precision, on every backend.
#![allow(clippy::unwrap_used)] // that is how tests fail

use fourbit::codebook::Ties;
use fourbit::layout::Layout;
use fourbit::matmul::{PackedMatrix, Scales, fused_rows, multiply_transposed_with, multiply_with};
use fourbit::{Backend, BlockSize, Codebook, Element, blockwise, double_quant};
use half::{bf16, f16};
use proptest::prelude::*;

/// More rows than any kernel takes at a time.
const MOST_ROWS: usize = 17;

/// A packed weight that owns its parts.
struct Weight {
    packed: Vec<u8>,
    absmax: Vec<f32>,
    codes: Vec<u8>,
    nested: Vec<f32>,
    offset: f32,
    codebook: Codebook,
    block_size: BlockSize,
    shape: [usize; 2],
}

impl Weight {
    fn random(shape: [usize; 2], codebook: &Codebook, block_size: BlockSize, seed: u64) -> Self {
        let dense = numbers(shape[0] * shape[1], seed);
        let layout = Layout::new(dense.len() as u64, block_size, codebook.code_bits());
        let mut packed = vec![0; layout.packed_bytes as usize];
        let mut absmax = vec![0.0; layout.blocks as usize];
        blockwise::quantize(&dense, codebook, block_size, &mut packed, &mut absmax).unwrap();
        let mut codes = vec![0; absmax.len()];
        let mut nested = vec![0.0; layout.nested_blocks as usize];
        let offset = double_quant::quantize(&absmax, &mut codes, &mut nested).unwrap();
        Self {
            packed,
            absmax,
            codes,
            nested,
            offset,
            codebook: codebook.clone(),
            block_size,
            shape,
        }
    }

    fn matrix(&self, double: bool) -> PackedMatrix<'_> {
        let scales = if double {
            Scales::Double {
                codes: &self.codes,
                nested_absmax: &self.nested,
                offset: self.offset,
            }
        } else {
            Scales::Plain(&self.absmax)
        };
        let (codebook, size) = (&self.codebook, self.block_size);
        PackedMatrix::new(&self.packed, scales, codebook, size, self.shape).unwrap()
    }

    fn dense(&self, double: bool) -> Vec<f32> {
        let mut absmax = self.absmax.clone();
        if double {
            double_quant::dequantize(&self.codes, &self.nested, self.offset, &mut absmax).unwrap();
        }
        let mut dense = vec![0.0; self.shape[0] * self.shape[1]];
        let (codebook, size) = (&self.codebook, self.block_size);
        blockwise::dequantize(&self.packed, &absmax, codebook, size, &mut dense).unwrap();
        dense
    }
}

/// Sums of uniform numbers: near enough to normal ones.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..count)
        .map(|_| uniform() + uniform() + uniform())
        .collect()
}

/// Which product: `x W^T + bias` or `y W`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Side {
    Forward,
    Transposed,
}

const SIDES: [Side; 2] = [Side::Forward, Side::Transposed];

/// A product of random numbers, in memory that is as long as it has to be and no longer.
fn product<T: Element>(
    backend: Backend,
    side: Side,
    weight: &Weight,
    double: bool,
    rows: usize,
    seed: u64,
) -> Vec<T> {
    let [outs, ins] = weight.shape;
    let matrix = weight.matrix(double);
    let [from, to] = if side == Side::Forward {
        [ins, outs]
    } else {
        [outs, ins]
    };
    let operand = operand::<T>(rows * from, seed).into_boxed_slice();
    let mut output = vec![T::from_f32(f32::NAN); rows * to];
    if side == Side::Forward {
        let bias = operand_bias::<T>(outs, seed);
        multiply_with(backend, &operand, &matrix, Some(&bias), &mut output).unwrap();
    } else {
        multiply_transposed_with(backend, &operand, &matrix, &mut output).unwrap();
    }
    output
}

fn operand<T: Element>(count: usize, seed: u64) -> Vec<T> {
    numbers(count, seed).into_iter().map(T::from_f32).collect()
}

fn operand_bias<T: Element>(count: usize, seed: u64) -> Vec<T> {
    operand(count, seed ^ 0xb1a5)
}

/// The largest error relative to the sum of the magnitudes of a product's terms.
fn worst<T: Element>(
    backend: Backend,
    side: Side,
    weight: &Weight,
    double: bool,
    rows: usize,
    seed: u64,
) -> f64 {
    let [outs, ins] = weight.shape;
    let output = product::<T>(backend, side, weight, double, rows, seed);
    let dense = weight.dense(double);
    let [from, to] = if side == Side::Forward {
        [ins, outs]
    } else {
        [outs, ins]
    };
    let x = operand::<T>(rows * from, seed);
    let bias = operand_bias::<T>(outs, seed);
    let mut worst = 0.0_f64;
    for row in 0..rows {
        for column in 0..to {
            let start = match side {
                Side::Forward => f64::from(bias[column].to_f32()),
                Side::Transposed => 0.0,
            };
            let terms = (0..from).map(|index| {
                let weight = match side {
                    Side::Forward => dense[column * ins + index],
                    Side::Transposed => dense[index * ins + column],
                };
                f64::from(x[row * from + index].to_f32()) * f64::from(weight)
            });
            let (sum, size) = terms.fold((start, start.abs() + 1e-30), |(sum, size), term| {
                (sum + term, size + term.abs())
            });
            let error = f64::from(output[row * to + column].to_f32()) - sum;
            assert!(error.is_finite());
            worst = worst.max(error.abs() / size);
        }
    }
    worst
}

/// What an error may be. Of single precision (units of 6e-8 relative to the sum of magnitudes): a
/// number is rounded when its value is scaled and when it is multiplied, a sum once a term, of
/// which the largest of a few thousand was seen to stay far below the bound. Of `f16`: one
/// rounding of the output, 2^-11, which is subnormal below 6e-5, above that. Of `bf16`: the output
/// and, on some instruction sets, the codebook's values, 2^-8 each, as
/// where a weight is decoded to `bf16`.
fn allowed<T: Element>() -> f64 {
    match size_of::<T>() {
        4 => 1e-6,
        _ if T::from_f32(1.0e-20).to_f32() == 0.0 => 1e-3,
        _ => 2.0 / 256.0 + 1e-5,
    }
}

fn check<T: Element>(
    backend: Backend,
    side: Side,
    weight: &Weight,
    double: bool,
    rows: usize,
    seed: u64,
) {
    let error = worst::<T>(backend, side, weight, double, rows, seed);
    let (name, shape, bytes) = (backend.name(), weight.shape, size_of::<T>());
    assert!(
        error < allowed::<T>(),
        "{name} {side:?} {shape:?} {rows} rows, {bytes} bytes: {error}"
    );
}

#[test]
fn every_backend_and_number_of_rows() {
    let size = BlockSize::DEFAULT;
    for backend in Backend::available() {
        // Tiles and blocks of several rows cut short; more columns than the loops go over at a
        // time; steps cut short; shapes whose blocks cross rows, odd ones too.
        for shape in [
            [33, 64],
            [5, 128],
            [40, 192],
            [17, 1024],
            [3, 4160],
            [9, 130],
            [7, 333],
            [70, 64],
        ] {
            let weight = Weight::random(shape, Codebook::nf4(), size, 7);
            for rows in (1..=MOST_ROWS).filter(|rows| shape[0] == 17 || rows % 5 < 2) {
                for side in SIDES {
                    check::<f32>(backend, side, &weight, rows % 2 == 0, rows, 3);
                    check::<f16>(backend, side, &weight, rows % 2 == 1, rows, 3);
                    check::<bf16>(backend, side, &weight, rows % 2 == 1, rows, 3);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_shape_and_block_size(
        outs in 1_usize..40,
        ins in 1_usize..300,
        rows in 1_usize..20,
        power in 5_u32..13,
        double in any::<bool>(),
        aligned in any::<bool>(),
        codebook in 0_usize..3,
        seed in any::<u64>(),
    ) {
        let block_size = BlockSize::new(1 << power).unwrap();
        let ins = if aligned { ins.next_multiple_of((1 << power).min(1024)) } else { ins };
        let codebook = [Codebook::nf4(), Codebook::fp4(), Codebook::int4()][codebook];
        let weight = Weight::random([outs, ins], codebook, block_size, seed);
        for backend in Backend::available() {
            for side in SIDES {
                check::<f32>(backend, side, &weight, double, rows, seed ^ 5);
                check::<bf16>(backend, side, &weight, double, rows, seed ^ 6);
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_threads(
        outs in 100_usize..700,
        blocks in 1_usize..6,
        odd in 0_usize..3,
        rows in 1_usize..20,
        seed in any::<u64>(),
    ) {
        let shape = [outs, blocks * 128 + odd];
        let weight = Weight::random(shape, Codebook::nf4(), BlockSize::DEFAULT, seed);
        for backend in Backend::available().into_iter().skip(1) {
            for side in SIDES {
                let [one, two, seven] = [1, 2, 7].map(|threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let work = || product::<f32>(backend, side, &weight, true, rows, seed);
                    pool.unwrap().install(work).iter().map(|n| n.to_bits()).collect::<Vec<_>>()
                });
                prop_assert!(one == two && one == seven);
            }
        }
    }
}

/// What is not a weight's must not reach its products: with numbers that are not numbers where the
/// code or the scale of something else is read, sums would not be numbers either.
#[test]
fn values_that_are_not_numbers_stay_where_they_are() {
    let size = BlockSize::new(32).unwrap();
    let late = Codebook::from_map("late", &[(3, -1.0), (7, 0.5), (9, 1.0)], Ties::Lower).unwrap();
    for columns in [32, 96, 160, 224] {
        let mut weight = Weight::random([18, columns], &late, size, 1);
        // The second row is scaled by infinity, so that zeros of its own would be NaN.
        for scale in &mut weight.absmax[columns / 32..2 * columns / 32] {
            *scale = f32::INFINITY;
        }
        for backend in Backend::available() {
            let output = product::<f32>(backend, Side::Forward, &weight, false, 3, 2);
            for (index, number) in output.iter().enumerate() {
                assert_eq!(
                    number.is_finite(),
                    index % 18 != 1,
                    "{} {columns}",
                    backend.name()
                );
            }
        }
    }
}

#[test]
fn fused_products_are_recommended_where_there_are_kernels() {
    let size = BlockSize::DEFAULT;
    assert_eq!(fused_rows::<f32>(Backend::SCALAR, 4, size, 128), 0);
    for backend in Backend::available().into_iter().skip(1) {
        let single = fused_rows::<f32>(backend, 4, size, 128);
        // AVX2 without FMA, which only virtual machines have, is the exception.
        let none = backend.name() == "avx2" && single == 0;
        assert!(none || single > 0);
        let brain = |columns| fused_rows::<bf16>(backend, 4, size, columns);
        assert_eq!(brain(128) == usize::MAX, backend.name() == "amx");
        // Rows that begin inside a block are not for tiles.
        assert_eq!(brain(130), single);
    }
}

#[test]
fn many_rows_with_pieces_of_every_kind() {
    // More rows of the weight than a task takes and than are decoded at a time; more rows of x
    // than are multiplied at a time; all of them cut short.
    let weight = Weight::random([600, 1120], Codebook::nf4(), BlockSize::new(32).unwrap(), 2);
    for backend in Backend::available().into_iter().skip(1) {
        for rows in [16, 31, 33, 64, 100, 545] {
            if rows > 40 && backend.name() != "amx" {
                continue;
            }
            for side in [Side::Forward, Side::Transposed] {
                check::<bf16>(backend, side, &weight, rows % 2 == 0, rows, 9);
            }
        }
    }
}

#[test]
fn codebooks_of_other_widths_and_with_gaps() {
    let ternary = Codebook::from_map("ternary", &[(0, -1.0), (1, 0.0), (2, 1.0)], Ties::Lower);
    let late = Codebook::from_map("late", &[(3, -1.0), (7, 0.5), (9, 1.0)], Ties::Lower);
    let eight = Codebook::dynamic_signed().clone();
    for codebook in [ternary.unwrap(), late.unwrap(), eight] {
        let weight = Weight::random([9, 160], &codebook, BlockSize::new(32).unwrap(), 1);
        for backend in Backend::available() {
            for side in SIDES {
                check::<f32>(backend, side, &weight, true, 3, 2);
            }
        }
    }
}

/// Rows of a kind, by name.
fn rows_of_kinds(columns: usize) -> Vec<(&'static str, Vec<f32>)> {
    let normal = numbers(columns, 5);
    let with = |change: &dyn Fn(usize, f32) -> f32| {
        let changed = normal.iter().enumerate();
        changed
            .map(|(index, &number)| change(index, number))
            .collect()
    };
    vec![
        ("normal", normal.clone()),
        ("positive", with(&|_, number| number.abs() + 0.5)),
        ("equal", vec![257.0 / 256.0; columns]),
        ("tails", with(&|_, number| number.powi(5))),
        (
            "far apart",
            with(&|index, number| number * 4.0_f32.powi(index as i32 % 12 - 6)),
        ),
        (
            "one large",
            with(&|index, number| if index == 77 { 300.0 } else { number }),
        ),
        (
            "one too large",
            with(&|index, number| if index == 77 { 3e4 } else { number }),
        ),
        (
            "one alone",
            with(&|index, _| if index == 77 { 1.0 } else { 0.0 }),
        ),
        ("small", with(&|_, number| number * 1e-3)),
    ]
}

/// Root of the mean square of the errors of a product with one row, and that of a dense product
/// with a weight of the same type, both as the output's type has them.
fn errors<T: Element>(backend: Backend, weight: &Weight, x: &[f32], rows: usize) -> [f64; 2] {
    let [outs, ins] = weight.shape;
    let x: Vec<T> = x.iter().copied().map(T::from_f32).collect();
    let mut output = vec![T::from_f32(f32::NAN); rows * outs];
    multiply_with(
        backend,
        &x.repeat(rows),
        &weight.matrix(true),
        None,
        &mut output,
    )
    .unwrap();
    let dense = weight.dense(true);
    let mut squares = [0.0; 2];
    for (row, output) in dense.chunks_exact(ins).zip(&output) {
        let dot = |value: &dyn Fn(f32) -> f32| -> f64 {
            let terms = row.iter().zip(&x);
            terms
                .map(|(&weight, x)| f64::from(value(weight)) * f64::from(x.to_f32()))
                .sum()
        };
        let exact = dot(&|weight| weight);
        let rounded = dot(&|weight| T::from_f32(weight).to_f32());
        let theirs = f64::from(T::from_f32(rounded as f32).to_f32()) - exact;
        let ours = f64::from(output.to_f32()) - exact;
        squares[0] += ours * ours;
        squares[1] += theirs * theirs;
    }
    squares.map(|sum| (sum / outs as f64).sqrt())
}

/// Whatever the numbers of `x` are like. A tenth is for chance, as other numbers are rounded; where
/// the codebook's values are rounded in place of the weight's numbers, a product with a single term
/// is rounded twice and not once.
#[test]
fn few_rows_are_as_exact_as_in_a_dense_product() {
    fn check<T: Element>(backend: Backend, weight: &Weight, rows: usize) {
        for (kind, x) in rows_of_kinds(weight.shape[1]) {
            let [ours, theirs] = errors::<T>(backend, weight, &x, rows);
            let slack = match backend.name() {
                "avx2" | "neon" => 1.5,
                _ => 1.1,
            };
            let (name, codebook) = (backend.name(), weight.codebook.name());
            assert!(
                ours <= theirs * slack,
                "{name}, {codebook}, {kind}, {rows} rows, {} bits: {ours} to {theirs}",
                8 * size_of::<T>(),
            );
        }
    }
    for (codebook, size) in [
        (Codebook::nf4(), 64),
        (Codebook::fp4(), 32),
        (Codebook::int4(), 64),
    ] {
        let size = BlockSize::new(size).unwrap();
        let weight = Weight::random([300, 1120], codebook, size, 3);
        for backend in Backend::available() {
            for rows in [1, 2] {
                check::<bf16>(backend, &weight, rows);
                check::<f16>(backend, &weight, rows);
            }
        }
    }
}

#[test]
fn empty_products() {
    let weight = Weight::random([4, 64], Codebook::nf4(), BlockSize::DEFAULT, 1);
    let mut nothing: [f32; 0] = [];
    multiply_with(
        Backend::SCALAR,
        &[],
        &weight.matrix(false),
        None,
        &mut nothing,
    )
    .unwrap();
    let narrow = Weight::random([4, 0], Codebook::nf4(), BlockSize::DEFAULT, 1);
    let mut output = [1.0_f32; 8];
    for backend in Backend::available() {
        let matrix = narrow.matrix(false);
        multiply_with(
            backend,
            &[],
            &matrix,
            Some(&[1.0, 2.0, 3.0, 4.0]),
            &mut output,
        )
        .unwrap();
        assert_eq!(output, [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
        multiply_transposed_with(backend, &[0.0; 8], &matrix, &mut nothing).unwrap();
        let short = Weight::random([0, 64], Codebook::nf4(), BlockSize::DEFAULT, 1);
        let mut output = [1.0_f32; 128];
        multiply_transposed_with(backend, &[], &short.matrix(true), &mut output).unwrap();
        assert_eq!(output, [0.0; 128]);
    }
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    let weight = Weight::random([4, 64], Codebook::nf4(), BlockSize::DEFAULT, 1);
    let matrix = weight.matrix(true);
    let mut output = [0.0_f32; 4];
    for x in [63, 65, 128] {
        let x = vec![0.0_f32; x];
        assert!(multiply_with(Backend::SCALAR, &x, &matrix, None, &mut output).is_err());
    }
    let x = [0.0_f32; 64];
    let bias = [0.0; 3];
    assert!(multiply_with(Backend::SCALAR, &x, &matrix, Some(&bias), &mut output).is_err());
    for y in [3, 5, 8] {
        let y = vec![0.0_f32; y];
        assert!(multiply_transposed_with(Backend::SCALAR, &y, &matrix, &mut [0.0; 64]).is_err());
    }
    let scales = Scales::Plain(&weight.absmax[1..]);
    let size = BlockSize::DEFAULT;
    assert!(PackedMatrix::new(&weight.packed, scales, Codebook::nf4(), size, [4, 64]).is_err());
}
