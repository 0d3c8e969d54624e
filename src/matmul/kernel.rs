//! What the loops need from an instruction set, and how they are compiled for it.
#![allow(unsafe_code)]

/// What the loops need from an instruction set.
///
/// # Safety
/// For every function: the processor has the features of the implementation; pointers are good for
/// what is said to be read or written, at any alignment.
pub(super) trait Kernel {
    /// Codes of a step.
    type Codes: Copy;
    /// The sixteen values, for look-ups.
    type Table: Copy;
    /// The numbers of a part.
    type Values: Copy;
    /// A register of single precision.
    type Sum: Copy;
    /// Which scale goes where.
    type Lanes: Copy;
    /// Columns of a step; two of them are a byte.
    const STEP: usize;
    /// Parts of a step.
    const PARTS: usize;
    /// The column of the step that is at a place in the order in which numbers come.
    fn column(place: usize) -> usize;

    unsafe fn table(values: &[f32; 256]) -> Self::Table;
    /// Reads the codes of `columns` columns, of a step or less, a multiple of 32. What is not there
    /// is filled with some codes that are.
    unsafe fn codes(at: *const u8, columns: usize) -> Self::Codes;
    /// The numbers of the part that is next.
    unsafe fn values(table: Self::Table, codes: Self::Codes) -> Self::Values;
    /// Makes the next part the next one.
    unsafe fn next(codes: Self::Codes) -> Self::Codes;

    /// For blocks of so many columns; as for [`Self::codes`] for the columns.
    unsafe fn lanes(block_size: usize, columns: usize) -> Self::Lanes;
    /// The scales of a step; reads four from the first block's.
    unsafe fn scale(at: *const f32, lanes: Self::Lanes) -> Self::Sum;
    unsafe fn splat(number: f32) -> Self::Sum;
    unsafe fn multiply(a: Self::Sum, b: Self::Sum) -> Self::Sum;
    /// `sum + a * b`
    unsafe fn add_product(sum: Self::Sum, a: Self::Sum, b: Self::Sum) -> Self::Sum;
    /// The sum of all lanes.
    unsafe fn total(sum: Self::Sum) -> f32;
    /// [`Self::total`] of several.
    #[inline(always)]
    unsafe fn totals<const R: usize>(sums: [Self::Sum; R]) -> [f32; R] {
        // SAFETY: the caller answers for the features.
        sums.map(|sum| unsafe { Self::total(sum) })
    }

    /// Reads the numbers of a part.
    unsafe fn load(at: *const f32) -> Self::Values;
    unsafe fn store(values: Self::Values, at: *mut f32);
    unsafe fn scaled(values: Self::Values, scale: Self::Sum) -> Self::Values;
    /// `sum + values * x`, all of them summed.
    unsafe fn dot(sum: Self::Sum, values: Self::Values, x: Self::Values) -> Self::Sum;
    /// `sums + values * factor`
    unsafe fn add_scaled(
        sums: Self::Values,
        values: Self::Values,
        factor: Self::Sum,
    ) -> Self::Values;
    /// Asks for a line of memory. Any address will do.
    unsafe fn prefetch(address: *const u8);
}

/// The loops compiled for one instruction set and for each number of rows: how many rows of the
/// weight at a time, and whether scales are applied early, forward and transposed.
macro_rules! entry_points {
    ($kernel:ident, $features:literal, $most:literal, {
        $($rows:literal => ($at_a_time:literal, $early:literal)),+
    }, {
        $($rows_t:literal => ($at_a_time_t:literal, $early_t:literal)),+
    }) => {
        /// Rows of `x` that the loops take.
        pub(in crate::matmul) const MOST_ROWS: usize = $most;

        /// [`loops::forward`] for `rows` rows of `x`, up to [`MOST_ROWS`].
        #[target_feature(enable = $features)]
        pub(in crate::matmul) fn forward(
            tile: Tile<'_>,
            rows: usize,
            x: &[f32],
            sums: &mut [f32],
        ) {
            // SAFETY: this function has the features of the kernel.
            unsafe {
                match rows {
                    $($rows => loops::forward::<$kernel, $at_a_time, $rows, $early>(
                        tile, x, sums,
                    ),)+
                    _ => unreachable!("more rows than the loops take"),
                }
            }
        }

        /// [`loops::transposed`] for `rows` rows of `y`, up to eight.
        #[target_feature(enable = $features)]
        pub(in crate::matmul) fn transposed(
            tile: Tile<'_>,
            rows: usize,
            y: &[f32],
            stride: usize,
            sums: &mut [f32],
        ) {
            // SAFETY: this function has the features of the kernel.
            unsafe {
                match rows {
                    $($rows_t => loops::transposed::<$kernel, $at_a_time_t, $rows_t, $early_t>(
                        tile, y, stride, sums,
                    ),)+
                    _ => unreachable!("more rows than the loops take"),
                }
            }
        }

        /// Asks for some memory, soon to be read.
        #[target_feature(enable = $features)]
        pub(in crate::matmul) fn ask(memory: std::ops::Range<*const u8>) {
            let mut line = memory.start;
            while line < memory.end {
                // SAFETY: this function has the features of the kernel.
                unsafe { <$kernel>::prefetch(line) };
                line = line.wrapping_add(64);
            }
        }

        /// [`loops::arrange`]
        #[target_feature(enable = $features)]
        pub(in crate::matmul) fn arrange(numbers: &[f32], row: usize, rows: usize, x: &mut [f32]) {
            // SAFETY: this function has the features of the kernel.
            unsafe { loops::arrange::<$kernel>(numbers, row, rows, x) }
        }

        /// [`loops::dots`]
        #[target_feature(enable = $features)]
        pub(in crate::matmul) fn dots(row: &[f32], x: &[f32], sums: &mut [f32]) {
            // SAFETY: this function has the features of the kernel.
            unsafe { loops::dots::<$kernel>(row, x, sums) }
        }

        /// [`loops::spread`]
        #[target_feature(enable = $features)]
        pub(in crate::matmul) fn spread(
            row: &[f32],
            factors: impl Iterator<Item = f32>,
            sums: &mut [f32],
        ) {
            // SAFETY: this function has the features of the kernel.
            unsafe { loops::spread::<$kernel>(row, factors, sums) }
        }
    };
}
pub(super) use entry_points;
