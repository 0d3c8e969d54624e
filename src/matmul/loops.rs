//! The loops of the products, written once over what an instruction set gives.
//!
//! Codes are read a step at a time, a register of them. A step's numbers come in parts: one part is
//! what one decoding gives. `x` and the sums of [`transposed`] lie in the order in which numbers
//! come, [steps, rows, columns of a step].
//!
//! For each number of the weight there is the work of decoding it, once for all rows of `x`, and a
//! multiplication a row. Scales are applied to the sums of a step where there are few rows, else to
//! the decoded numbers. Several rows of the weight at a time share what is read of `x`, and their
//! sums give the processor chains of additions that do not wait for each other.
#![allow(unsafe_code)]
// Rows are counted where several arrays have a place for each.
#![allow(clippy::needless_range_loop, clippy::manual_memcpy)]

use super::kernel::Kernel;
use super::tile::{NextTile, Place, Streams, TILE_ROWS, Tile, columns_at_a_time, each_step};

/// Up to how many rows of `x` a weight is read in streams: with four as fast as in chunks where `x`
/// has 4096 columns, with eight slower.
pub(super) const MOST_ROWS_OF_STREAMS: usize = 4;

/// Up to how many rows of `y` their sums may come from the second-level cache, for the sake of
/// reading the weight in order.
const MOST_ROWS_IN_ORDER: usize = 2;

/// `x W^T`: sums [count, M] of a tile's rows with `M` rows of `x`, `R` rows of the weight at a time.
/// With `EARLY`, scales are applied to the numbers, else to sums.
///
/// # Safety
/// The processor has the features of `K`.
#[inline(always)]
pub(super) unsafe fn forward<K: Kernel, const R: usize, const M: usize, const EARLY: bool>(
    tile: Tile<'_>,
    x: &[f32],
    sums: &mut [f32],
) {
    let columns = tile.matrix.in_features;
    assert!(x.len() >= columns.next_multiple_of(K::STEP) * M);
    assert!(sums.len() == tile.count * M);
    // SAFETY: the caller answers for the features. A tile has the codes and scales of all its rows
    // and columns; x has `M * STEP` numbers for each step begun.
    unsafe {
        if M <= MOST_ROWS_OF_STREAMS {
            let (table, x) = (K::table(tile.matrix.codebook.values()), x.as_ptr());
            forward_in_streams::<K, R, M>(tile, &Single::<K, EARLY> { table, x }, sums);
        } else {
            forward_in_chunks::<K, R, M, EARLY>(tile, x, sums);
        }
    }
}

/// What a step adds to the sums of `R` rows of the weight with `M` rows of `x`.
pub(super) trait Steps<K: Kernel, const R: usize, const M: usize> {
    /// For the step that begins with a column.
    ///
    /// # Safety
    /// The processor has the features of the implementation, and `x` that step.
    unsafe fn add(
        &self,
        column: usize,
        codes: [K::Codes; R],
        scales: [K::Sum; R],
        totals: &mut [[K::Sum; M]; R],
    );
}

/// Steps in single precision.
struct Single<K: Kernel, const EARLY: bool> {
    table: K::Table,
    x: *const f32,
}

impl<K: Kernel, const R: usize, const M: usize, const EARLY: bool> Steps<K, R, M>
    for Single<K, EARLY>
{
    #[inline(always)]
    unsafe fn add(
        &self,
        column: usize,
        codes: [K::Codes; R],
        scales: [K::Sum; R],
        totals: &mut [[K::Sum; M]; R],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let x = self.x.add(column * M);
            add_step::<K, R, M, EARLY>(self.table, codes, scales, x, totals);
        }
    }
}

/// [`forward`] with each row read from its first column to its last, and every row of the `R` at
/// the head of a run of rows, so that the weight comes in `R` streams.
///
/// Reading is all that has to happen here, and the processor's own prefetching follows a stream for
/// some lines, up to a page's end. This loop in C on two cores of Sapphire Rapids, 4096 columns, from
/// memory: 20.5 GB/s in one stream, 25.7 in four, where a loop that only reads got 30.0. Streams have
/// to be pages apart: with nothing asked for ahead, four neighbouring rows came at 10 GB/s and four
/// runs of rows at 19.
///
/// # Safety
/// The processor has the features of `K`; `steps` has all steps of the tile.
#[inline(always)]
pub(super) unsafe fn forward_in_streams<K: Kernel, const R: usize, const M: usize>(
    tile: Tile<'_>,
    steps: &impl Steps<K, R, M>,
    sums: &mut [f32],
) {
    let columns = tile.matrix.in_features;
    assert!(sums.len() == tile.count * M);
    // SAFETY: the caller's promise; a tile has the codes and scales of all its rows and columns.
    unsafe {
        let apart = tile.count.div_ceil(R);
        let streams = Streams::<R>::new(&tile, apart);
        for row in 0..apart {
            let place = Place::<R>::new(&tile, row, apart);
            let mut totals = [[K::splat(0.0); M]; R];
            each_step!(
                tile,
                K,
                place,
                0,
                columns,
                |column| streams.ask::<K>((row * columns + column) / 2),
                |codes, scales| steps.add(column, codes, scales, &mut totals)
            );
            for m in 0..M {
                let column = totals.map(|totals| totals[m]);
                let rows = sums.iter_mut().skip(row * M + m).step_by(apart * M);
                for (sum, total) in rows.zip(K::totals(column)) {
                    *sum = total;
                }
            }
        }
    }
}

/// [`forward`] with as many columns at a time for all rows as `x` stays in the first-level cache.
///
/// # Safety
/// As for [`forward`].
#[inline(always)]
unsafe fn forward_in_chunks<K: Kernel, const R: usize, const M: usize, const EARLY: bool>(
    tile: Tile<'_>,
    x: &[f32],
    sums: &mut [f32],
) {
    let columns = tile.matrix.in_features;
    assert!(tile.count <= TILE_ROWS);
    // SAFETY: the caller's promise.
    unsafe {
        let table = K::table(tile.matrix.codebook.values());
        let mut totals = [[K::splat(0.0); M]; TILE_ROWS];
        let mut next = NextTile::new(&tile);
        let chunk = columns_at_a_time(K::STEP, M);
        for from in (0..columns).step_by(chunk) {
            let to = columns.min(from + chunk);
            for row in (0..tile.count).step_by(R) {
                let place = Place::<R>::new(&tile, row, 1);
                let mut sums = [[K::splat(0.0); M]; R];
                for r in 0..R {
                    sums[r] = totals[row + r];
                }
                each_step!(
                    tile,
                    K,
                    place,
                    from,
                    to,
                    |column| next.ask::<K>(R),
                    |codes, scales| {
                        let x = x.as_ptr().add(column * M);
                        add_step::<K, R, M, EARLY>(table, codes, scales, x, &mut sums);
                    }
                );
                for r in 0..R {
                    totals[row + r] = sums[r];
                }
            }
        }
        for row in 0..tile.count {
            for m in 0..M {
                sums[row * M + m] = K::total(totals[row][m]);
            }
        }
    }
}

/// Adds the products of a step.
///
/// # Safety
/// The processor has the features of `K`; `x` points to `M * STEP` numbers.
#[inline(always)]
unsafe fn add_step<K: Kernel, const R: usize, const M: usize, const EARLY: bool>(
    table: K::Table,
    mut codes: [K::Codes; R],
    scales: [K::Sum; R],
    x: *const f32,
    totals: &mut [[K::Sum; M]; R],
) {
    // SAFETY: the caller answers for the features and the pointer.
    unsafe {
        let part_columns = K::STEP / K::PARTS;
        let mut sums = if EARLY {
            *totals
        } else {
            [[K::splat(0.0); M]; R]
        };
        for part in 0..K::PARTS {
            let values = decode::<K, R, EARLY>(table, &mut codes, scales);
            for m in 0..M {
                let x = K::load(x.add(m * K::STEP + part * part_columns));
                for r in 0..R {
                    sums[r][m] = K::dot(sums[r][m], values[r], x);
                }
            }
        }
        for r in 0..R {
            for m in 0..M {
                totals[r][m] = if EARLY {
                    sums[r][m]
                } else {
                    K::add_product(totals[r][m], sums[r][m], scales[r])
                };
            }
        }
    }
}

/// The numbers of the part that is next, and makes the one after it the next.
///
/// # Safety
/// The processor has the features of `K`.
#[inline(always)]
unsafe fn decode<K: Kernel, const R: usize, const SCALED: bool>(
    table: K::Table,
    codes: &mut [K::Codes; R],
    scales: [K::Sum; R],
) -> [K::Values; R] {
    // SAFETY: the caller answers for the features.
    unsafe {
        let mut values = [K::values(table, codes[0]); R];
        for r in 0..R {
            values[r] = K::values(table, codes[r]);
            codes[r] = K::next(codes[r]);
            if SCALED {
                values[r] = K::scaled(values[r], scales[r]);
            }
        }
        values
    }
}

/// `y W`: adds to sums, [steps, M, columns of a step] in the kernel's order, the products of a
/// tile's rows with factors [M, `stride`], `R` rows of the weight at a time. `EARLY` as for
/// [`forward`]; else scales are applied to the factors.
///
/// # Safety
/// The processor has the features of `K`.
#[inline(always)]
pub(super) unsafe fn transposed<K: Kernel, const R: usize, const M: usize, const EARLY: bool>(
    tile: Tile<'_>,
    y: &[f32],
    stride: usize,
    sums: &mut [f32],
) {
    let columns = tile.matrix.in_features;
    assert!(sums.len() >= columns.next_multiple_of(K::STEP) * M);
    // SAFETY: the caller answers for the features. A tile has the codes and scales of all its rows
    // and columns; there are `M * STEP` sums for each step begun.
    unsafe {
        let table = K::table(tile.matrix.codebook.values());
        let mut next = NextTile::new(&tile);
        let chunk = if M <= MOST_ROWS_IN_ORDER {
            columns.max(1)
        } else {
            columns_at_a_time(K::STEP, M)
        };
        for from in (0..columns).step_by(chunk) {
            let to = columns.min(from + chunk);
            for row in (0..tile.count).step_by(R) {
                let place = Place::<R>::new(&tile, row, 1);
                let mut factors = [[K::splat(0.0); M]; R];
                for r in 0..R.min(tile.count - row) {
                    for m in 0..M {
                        factors[r][m] = K::splat(y[m * stride + row + r]);
                    }
                }
                each_step!(
                    tile,
                    K,
                    place,
                    from,
                    to,
                    |column| next.ask::<K>(R),
                    |codes, scales| {
                        let sums = sums.as_mut_ptr().add(column * M);
                        spread_step::<K, R, M, EARLY>(table, codes, scales, factors, sums);
                    }
                );
            }
        }
    }
}

/// Adds the products of a step with factors to its sums.
///
/// # Safety
/// The processor has the features of `K`; `sums` points to `M * STEP` numbers.
#[inline(always)]
unsafe fn spread_step<K: Kernel, const R: usize, const M: usize, const EARLY: bool>(
    table: K::Table,
    mut codes: [K::Codes; R],
    scales: [K::Sum; R],
    mut factors: [[K::Sum; M]; R],
    sums: *mut f32,
) {
    // SAFETY: the caller answers for the features and the pointer.
    unsafe {
        let part_columns = K::STEP / K::PARTS;
        if !EARLY {
            for r in 0..R {
                for m in 0..M {
                    factors[r][m] = K::multiply(factors[r][m], scales[r]);
                }
            }
        }
        for part in 0..K::PARTS {
            let values = decode::<K, R, EARLY>(table, &mut codes, scales);
            for m in 0..M {
                let at = sums.add(m * K::STEP + part * part_columns);
                let mut sum = K::load(at);
                for r in 0..R {
                    sum = K::add_scaled(sum, values[r], factors[r][m]);
                }
                K::store(sum, at);
            }
        }
    }
}

/// Puts a row of `x`, `numbers`, where it belongs among `rows` of them: [steps, rows, columns of a
/// step], in the kernel's order. `x` is to be filled up with zeros.
///
/// # Safety
/// The processor has the features of `K`.
#[inline(always)]
pub(super) unsafe fn arrange<K: Kernel>(numbers: &[f32], row: usize, rows: usize, x: &mut [f32]) {
    let steps = x.chunks_exact_mut(K::STEP).skip(row).step_by(rows);
    for (target, source) in steps.zip(numbers.chunks(K::STEP)) {
        if source.len() == K::STEP {
            for (place, number) in target.iter_mut().enumerate() {
                // SAFETY: a step has as many columns as places.
                *number = unsafe { *source.get_unchecked(K::column(place)) };
            }
        } else {
            for (place, number) in target.iter_mut().enumerate() {
                *number = source.get(K::column(place)).copied().unwrap_or(0.0);
            }
        }
    }
}

/// Sums of products of a decoded row with each row of `x`, [sums, row].
///
/// # Safety
/// The processor has the features of `K`.
#[inline(always)]
pub(super) unsafe fn dots<K: Kernel>(row: &[f32], x: &[f32], sums: &mut [f32]) {
    let part = K::STEP / K::PARTS;
    let whole = row.len() / (4 * part) * (4 * part);
    for (sum, x) in sums.iter_mut().zip(x.chunks_exact(row.len().max(1))) {
        // SAFETY: the caller answers for the features; both slices are of one length.
        unsafe {
            let mut four = [K::splat(0.0); 4];
            for column in (0..whole).step_by(4 * part) {
                for (i, sum) in four.iter_mut().enumerate() {
                    let at = column + i * part;
                    *sum = K::dot(
                        *sum,
                        K::load(row.as_ptr().add(at)),
                        K::load(x.as_ptr().add(at)),
                    );
                }
            }
            *sum = four.into_iter().map(|sum| K::total(sum)).sum();
        }
        for (number, x) in row[whole..].iter().zip(&x[whole..]) {
            *sum += number * x;
        }
    }
}

/// Adds a decoded row times each of the factors to a row of sums, [factors, row].
///
/// # Safety
/// The processor has the features of `K`.
#[inline(always)]
pub(super) unsafe fn spread<K: Kernel>(
    row: &[f32],
    factors: impl Iterator<Item = f32>,
    sums: &mut [f32],
) {
    let part = K::STEP / K::PARTS;
    let whole = row.len() / part * part;
    for (factor, sums) in factors.zip(sums.chunks_exact_mut(row.len().max(1))) {
        // SAFETY: the caller answers for the features; both slices are of one length.
        unsafe {
            let splat = K::splat(factor);
            for column in (0..whole).step_by(part) {
                let at = sums.as_mut_ptr().add(column);
                let number = K::load(row.as_ptr().add(column));
                K::store(K::add_scaled(K::load(at), number, splat), at);
            }
        }
        for (sum, number) in sums[whole..].iter_mut().zip(&row[whole..]) {
            *sum += number * factor;
        }
    }
}
