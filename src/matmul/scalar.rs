//! The specification, for every shape and width of code.

use super::matrix::PackedMatrix;

/// The number in a row and column of the weight, given the scales from a row's first block on.
fn weight(
    matrix: &PackedMatrix<'_>,
    scales: &[f32],
    first: usize,
    [row, column]: [usize; 2],
) -> f32 {
    let (columns, size) = (matrix.in_features, matrix.block_size.get());
    let bits = matrix.codebook.code_bits() as usize;
    let per_byte = 8 / bits;
    let element = row * columns + column;
    let shift = 8 - bits * (element % per_byte + 1);
    let code = matrix.packed[element / per_byte] >> shift & (u8::MAX >> (8 - bits));
    let scale = scales[element / size - first * columns / size];
    matrix.codebook.values()[usize::from(code)] * scale
}

/// Sums [count, rows] of `count` rows of the weight from `first` on with `x`, [rows, in].
///
/// `scales` begins with that of the block in which the first row begins.
pub(super) fn forward(
    x: &[f32],
    matrix: &PackedMatrix<'_>,
    scales: &[f32],
    first: usize,
    rows: usize,
    sums: &mut [f32],
) {
    for (row, sums) in sums.chunks_mut(rows).enumerate() {
        for (sum, x) in sums.iter_mut().zip(x.chunks(matrix.in_features.max(1))) {
            let products = x.iter().enumerate().map(|(column, number)| {
                number * weight(matrix, scales, first, [first + row, column])
            });
            *sum = products.sum();
        }
    }
}

/// Adds to sums [rows, in] the products of `count` rows of the weight from `first` on with `y`,
/// [rows, out]. `scales` as for [`forward`].
pub(super) fn transposed(
    y: &[f32],
    matrix: &PackedMatrix<'_>,
    scales: &[f32],
    first: usize,
    count: usize,
    sums: &mut [f32],
) {
    let rows = y.chunks(matrix.out_features);
    for (y, sums) in rows.zip(sums.chunks_mut(matrix.in_features)) {
        for (row, factor) in y.iter().enumerate().skip(first).take(count) {
            for (column, sum) in sums.iter_mut().enumerate() {
                *sum += factor * weight(matrix, scales, first, [row, column]);
            }
        }
    }
}
