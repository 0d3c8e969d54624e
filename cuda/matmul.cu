// y = x W^T + bias on tensor cores, for rows of x from a handful up to where decoding the weight
// once and the vendor's product are faster. bf16 and f16, accumulated in single precision.
//
// Parameters of fourbit_matmul_<rows>:
//   x              ELEMENT [m, k], the address a multiple of 16
//   packed         u8 [n k / 2], 4-bit codes of W [n, k], the first of two in the high bits; the
//                  address a multiple of 16
//   absmax         f32 [ceil(n k / BLOCK_SIZE)], or u8 codes with DOUBLE_QUANT
//   nested_absmax  f32 [ceil(blocks / 256)], null without DOUBLE_QUANT
//   nested_offset  f32 [1], null without DOUBLE_QUANT
//   bias           ELEMENT [n], or null
//   y              ELEMENT [m, n]
//   partial        f32 [splits, tiles of n x tiles of m, rows * 128], workspace of any contents;
//                  null where splits is 1
//   arrived        u32 [tiles of n x tiles of m], zeros, and zeros again afterwards; or null, for
//                  the kernel's own, of which a launch has a slot, with no more tiles than a slot
//                  has counters
//   m, n, k        i64; k a multiple of 32, and for 8 and 16 rows of min(64, BLOCK_SIZE). Any m and
//                  n.
//   splits         u32, the grid's third dimension
//   slot           u32, of the kernel's own counters: no two launches at a time may have the same
// Values are rounded to ELEMENT, scales stay in single precision and multiply the sum over the 32
// or 64 columns of a warp: more exact than a dense product, whose weight is rounded after scaling.
// A result is the sum over the first halves of stages plus that over the second; splits are added
// in their order by the block that comes last. So the result depends on k, BLOCK_SIZE, splits and
// the kernel alone.
//
// Launch: block 256; grid (ceil(n / 128), ceil(m / rows), splits); dynamic shared memory 33,792
// bytes of tables and `stages` times
//   11,264 for 8 rows, 13,312 for 16: stages of 128 columns (of 64, BLOCK_SIZE 32: 6,144 and 7,168)
//    9,216 for 32 rows, 13,312 for 64: stages of 64 columns.
// The kernel uses as many as the launch gives room for, 2 to 6. src/gpu/products.rs gives what
// shared memory affords for two blocks a processor, if that is three stages or more, else for one:
//   rows                        8           16           32           64   room for stages
//   sm_75, 64 KiB           1 x 2        1 x 2        1 x 3            -   31,616
//   sm_80, 164 KiB          2 x 4        2 x 3        2 x 5        2 x 3   49,024
//   sm_86, 89, 120: 100     1 x 5        1 x 5        1 x 6        1 x 5   67,456
//   sm_90, 100: 228         2 x 6        2 x 6        2 x 6        2 x 6   81,792
// (blocks x stages; room in bytes a block: shared memory of a processor / blocks, less 1 KiB that
// the system takes, 128 for the kernel's own, and the tables.) Splits fill processors x blocks; the
// model by which they are chosen stands there too. rows is 8, 16, 32 or 64; before sm_80 8, 16 or
// 32 and f16 alone, since they have no bf16 mma.
//
// Floor: 0.5 bytes a weight for codes, 1 / BLOCK_SIZE or 4 / BLOCK_SIZE for scales, read once for
// each tile of m; 2 m n k operations. Beside it x is read once for each 128 rows of W, and sums of
// splits are written and read once, by way of the second-level cache.
// Under way: all stages but one, of 8 KiB of codes for 8 and 16 rows and of 4 for more: 40 to 80
// KiB an H100 processor, 16 to 48 an A100's, 16 to 32 an RTX 4090's.
// How codes become operands: W is the left operand (16 x 16), x the right (16 x 8). Two warps share
// 32 rows of W, and each has half of a stage's columns, so that what is read of x serves 32 rows.
// Columns are so dealt out that the 8 codes of a 32-bit word are a lane's part of two mma. A byte
// is a pair of values, looked up in a table that stands in shared memory 32 times, once for each
// bank. A scale is applied once for 4 mma (2 for 32 and 64 rows, or blocks of 32). Rows change the
// order of their pieces so that neither the copies' writes nor any read meets another's bank.
//
// Counted for bf16, BLOCK_SIZE 64, double quantization, on 16 rows and 64 columns of W, 32 codes a
// lane: instructions that run (the waits that are jumped over left out); cycles are of a
// processor's shared memory, the copies' writes with them, where an H100's memory takes 37, an
// A100's 39, an RTX 4090's 170 and a B200's 19:
//   rows of x   sm_80   sm_90   mma   shared reads (looks, codes, scales, x)   cycles
//           8      94      97     4   16 + 2 + 0.5 + 1                            32
//          16     102     103     8   16 + 2 + 0.5 + 2                            37
//          32     166     169    16   16 + 4 + 1 + 4                              50
//          64     269     269    32   16 + 4 + 1 + 8                              70
// Issue takes a quarter of the instructions in cycles: 24 to 67; an mma takes 2 of an A100's. So
// for 8 and 16 rows nothing asks for more than the memory of an H100 or A100 gives, though for 16
// shared memory is as busy as memory; no processor overlaps all of it, and 70 to 85 percent of the
// memory's speed is what to expect of long sums. For 32 rows shared memory binds at 74 percent, for
// 64 shared memory, issue and mma alike at 53: there 40 to 50 is what to expect. On an RTX 4090 the
// memory binds for all. On a B200 shared memory binds from 8 rows on, at 59 percent. To that come,
// for each wave of blocks, the wait for the first stage and the table (a microsecond or two), and
// the same once more for adding up splits. All of this is reckoned; none was measured.
#include "product.cuh"

static_assert(CODE_BITS == 4, "two codes a byte");
static_assert(BLOCK_SIZE % 32 == 0, "a chunk has one scale");
static_assert(sizeof(ELEMENT) == 2, "tensor cores take 16 bits");

constexpr u32 THREADS = 256;
// Rows of W of a block, and of a warp: two fragments of the left operand.
constexpr u32 BLOCK_ROWS = 128;
constexpr u32 FRAGMENTS = 2;
constexpr u32 WARP_ROWS = FRAGMENTS * 16;
// Two warps share rows of W: each has half of a stage's columns.
constexpr u32 HALVES = THREADS / WARP / (BLOCK_ROWS / WARP_ROWS);
static_assert(HALVES == 2 && THREADS == HALVES * BLOCK_ROWS, "a thread brings one scale");
constexpr u32 TABLE_BYTES = 256 * WARP * 4;
// Both tables; the stages follow.
constexpr u32 TABLES_BYTES = TABLE_BYTES + 256 * 4;
constexpr u32 MOST_STAGES = 6;

static __device__ const float CODEBOOK[16] = CODEBOOK_VALUES;

// Zeros before and after every launch: a slot's are counted by one launch at a time.
static __device__ u32 COUNTERS[COUNTER_SLOTS][SLOT_COUNTERS];

template <class T> __device__ __forceinline__ T at(const u8* shared, u32 place) {
    return *reinterpret_cast<const T*>(shared + place);
}

// Waits until at most `pending` of the newest groups of copies are under way, or fewer.
__device__ __forceinline__ void copy_async_wait_but(u32 pending) {
    if (pending >= 4) return copy_async_wait<4>();
    if (pending == 3) return copy_async_wait<3>();
    if (pending == 2) return copy_async_wait<2>();
    if (pending == 1) return copy_async_wait<1>();
    copy_async_wait<0>();
}

// Both values of every byte, the first in the lower half; copy c of byte b is number 32 b + c. A
// thread has bytes whose second code is `threadIdx.x / 8 % 16`, of that value.
__device__ __forceinline__ void fill_table(u8* shared, float second) {
    const float values[16] = CODEBOOK_VALUES;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        const float first = threadIdx.x / 128 ? values[2 * i + 1] : values[2 * i];
        const u32 pair = pack_pair<ELEMENT>(first, second);
        reinterpret_cast<Wide*>(shared)[i * THREADS + threadIdx.x] = {{pair, pair, pair, pair}};
    }
}

// Byte `which` of a word, looked up. `mine` is the offset of the lane's copy.
__device__ __forceinline__ u32 look_up(const u8* shared, u32 word, u32 which, u32 mine) {
    const u32 shifted = which == 0 ? word << 7 : word >> (8 * which - 7);
    return at<u32>(shared, (shifted & 0x7f80u) | mine);
}

struct Problem {
    const ELEMENT* x;
    const u8* packed;
    Scales scales;
    i64 m;
    i64 n;
    i64 k;
};

// Where things lie in a stage's part of shared memory: codes, scales, x. Pieces are of 16 bytes.
// Rows take turns in their order, so that those that are read together lie in different banks.
template <u32 M> struct Stage {
    // Columns of a warp, which share a scale, and of a stage.
    static constexpr u32 PART = M <= 16 && BLOCK_SIZE >= 64 ? 64 : 32;
    static constexpr u32 DEPTH = HALVES * PART;
    static constexpr u32 W_STRIDE = DEPTH / 2;
    static constexpr u32 X_STRIDE = DEPTH * 2;
    static constexpr u32 SCALES = BLOCK_ROWS * W_STRIDE;
    static constexpr u32 X = SCALES + HALVES * BLOCK_ROWS * 4;
    static constexpr u32 BYTES = X + M * X_STRIDE;

    __device__ __forceinline__ static u32 codes(u32 row, u32 piece) {
        const u32 turn = PART == 64 ? row / 2 % 2 * 2 : row / 4 % 2;
        return row * W_STRIDE + (piece ^ turn) * 16;
    }
    // The four rows of a lane lie side by side.
    __device__ __forceinline__ static u32 scale(u32 row, u32 half) {
        const u32 place = row / WARP_ROWS * WARP_ROWS + row % 8 * 4 + row % WARP_ROWS / 8;
        return SCALES + (half * BLOCK_ROWS + place) * 4;
    }
    __device__ __forceinline__ static u32 x(u32 row, u32 piece) {
        return X + row * X_STRIDE + (piece ^ (PART == 64 ? row % 2 : row % 2 * 4)) * 16;
    }
};

// What a thread brings for every stage: some codes, a scale, and some of x. All that does not
// change from stage to stage is computed once.
template <u32 M> struct Loader {
    using S = Stage<M>;
    // Pieces of a row, and of a thread.
    static constexpr u32 W_PIECES = S::DEPTH / 32;
    static constexpr u32 X_PIECES = S::DEPTH / 8;
    static constexpr u32 W_COUNT = BLOCK_ROWS * W_PIECES / THREADS;
    static constexpr u32 X_COUNT = (M * X_PIECES + THREADS - 1) / THREADS;
    // Rows between the pieces of x of a thread.
    static constexpr u32 X_APART = THREADS / X_PIECES;
    static constexpr bool EVEN = M * X_PIECES % THREADS == 0;

    // Of the first stage.
    const Wide* codes[W_COUNT];
    const ELEMENT* x;
    RowScales scales;
    // The stages that have such a thing.
    u32 codes_end[W_COUNT];
    u32 x_end[X_COUNT];
    u32 scale_end;
    // Places within a stage.
    u32 codes_at;
    u32 x_at;
    u32 scale_at;

    __device__ __forceinline__ Loader(const Problem& problem, i64 first_row, i64 first_x) {
        const u32 of_row = u32(problem.k / 32);
        const u32 row = threadIdx.x / W_PIECES, piece = threadIdx.x % W_PIECES;
        codes_at = computed(S::codes(row, piece));
#pragma unroll
        for (u32 i = 0; i < W_COUNT; ++i) {
            const i64 from = first_row + row + i * (THREADS / W_PIECES);
            // What does not exist takes the address of something that does, and is not read.
            const bool there = from < problem.n && piece < of_row;
            codes_end[i] = computed(there ? stages(of_row - piece) : 0);
            codes[i] = reinterpret_cast<const Wide*>(problem.packed);
            if (there) codes[i] += u64(from) * of_row + piece;
        }
        const u32 x_row = threadIdx.x / X_PIECES, x_piece = threadIdx.x % X_PIECES;
        x_at = computed(S::x(x_row, x_piece));
        const bool x_there = first_x + x_row < problem.m && x_piece / 4 < of_row;
        x = problem.x + (x_there ? (first_x + x_row) * problem.k + x_piece * 8 : 0);
#pragma unroll
        for (u32 i = 0; i < X_COUNT; ++i) {
            const bool there = x_there && first_x + x_row + i * X_APART < problem.m;
            x_end[i] = computed(there ? stages(of_row - x_piece / 4) : 0);
        }
        const u32 scale_row = threadIdx.x % BLOCK_ROWS, half = threadIdx.x / BLOCK_ROWS;
        const u32 before = half * (S::PART / 32);
        const bool there = first_row + scale_row < problem.n && before < of_row;
        scale_end = computed(there ? stages(of_row - before) : 0);
        scales = RowScales(problem.scales,
                           there ? u64(first_row + scale_row) * of_row + before : 0);
        scale_at = computed(S::scale(scale_row, half));
    }

    // Of so many chunks of 32 columns from the thread's first on.
    __device__ __forceinline__ static u32 stages(u32 chunks) {
        return (chunks + S::DEPTH / 32 - 1) / (S::DEPTH / 32);
    }

    // Begins the copies of a stage; zeros for what does not exist.
    __device__ __forceinline__ void copy(u8* stage, u32 step, i64 k) const {
#pragma unroll
        for (u32 i = 0; i < W_COUNT; ++i) {
            copy_async_16(stage + codes_at + i * (THREADS / W_PIECES) * S::W_STRIDE,
                          codes[i] + u64(step) * W_PIECES, step < codes_end[i] ? 16 : 0);
        }
        if (!EVEN && threadIdx.x >= M * X_PIECES) return;
#pragma unroll
        for (u32 i = 0; i < X_COUNT; ++i) {
            copy_async_16(stage + x_at + i * X_APART * S::X_STRIDE,
                          x + i * X_APART * k + u64(step) * S::DEPTH, step < x_end[i] ? 16 : 0);
        }
    }

    __device__ __forceinline__ Scales::Fetched fetch_scale(u32 step) const {
        return step < scale_end ? scales.fetch(step * (S::DEPTH / 32)) : Scales::Fetched{};
    }

    __device__ __forceinline__ void store_scale(u8* shared, u32 stage,
                                                const Scales::Fetched& fetched,
                                                float offset) const {
        const float* nested = reinterpret_cast<const float*>(shared + TABLE_BYTES);
        const float scale = Scales::decode(fetched, offset, nested);
        *reinterpret_cast<float*>(shared + stage + scale_at) = scale;
    }
};

// What a lane reads of a stage, and where its copy of the table begins.
//
// Lane 4 g + t has columns PART / 4 * t and following of its warp's: words of 8 codes, of which the
// first four take the places of its part of one mma, and the others of the next. Which column has
// which place is the same for W and x, and so does not matter.
template <u32 M> struct Lane {
    using S = Stage<M>;
    static constexpr u32 WORDS = S::PART / 32;

    u32 codes;
    u32 scales;
    u32 x[WORDS];
    u32 table;
    // The stages in which its warp has columns.
    u32 end;

    __device__ __forceinline__ explicit Lane(const Problem& problem) {
        const u32 lane = threadIdx.x % WARP, half = threadIdx.x / WARP % HALVES;
        const u32 row = threadIdx.x / WARP / HALVES * WARP_ROWS + lane / 4, t = lane % 4;
        // For 64 rows no register is left, and most of these are computed anew for each stage.
        const auto kept = [](u32 place) { return M == 64 ? place : computed(place); };
        codes = kept(S::codes(row, half * WORDS + t * WORDS / 4) + t * WORDS * 4 % 16);
        scales = kept(S::scale(row, half));
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i) {
            x[i] = kept(S::x(lane / 4, half * WORDS * 4 + t * WORDS + i));
        }
        table = computed(lane * 4);
        const i64 columns = problem.k - half * S::PART;
        end = u32(columns > 0 ? (columns + S::DEPTH - 1) / S::DEPTH : 0);
    }
};

// Adds the product of a stage's columns to a warp's sums: 2 x 16 rows of W (lane / 4, and 8 more)
// by M rows of x (for tile t of 8: 8 t + 2 (lane % 4), and one more).
template <u32 M>
__device__ __forceinline__ void multiply(float (&sums)[FRAGMENTS][M / 8][4], const u8* shared,
                                         u32 stage, const Lane<M>& lane) {
    using S = Stage<M>;
    constexpr u32 WORDS = Lane<M>::WORDS;
    u32 left[FRAGMENTS][2 * WORDS][4];
#pragma unroll
    for (u32 f = 0; f < FRAGMENTS; ++f) {
        const u32 codes = stage + lane.codes + f * 16 * S::W_STRIDE;
        const auto upper = at<Pack<u32, WORDS>>(shared, codes);
        const auto lower = at<Pack<u32, WORDS>>(shared, codes + 8 * S::W_STRIDE);
#pragma unroll
        for (u32 step = 0; step < 2 * WORDS; ++step) {
            const u32 first = upper.elements[step / 2], second = lower.elements[step / 2];
            const u32 byte = step % 2 * 2;
            left[f][step][0] = look_up(shared, first, byte, lane.table);
            left[f][step][1] = look_up(shared, second, byte, lane.table);
            left[f][step][2] = look_up(shared, first, byte + 1, lane.table);
            left[f][step][3] = look_up(shared, second, byte + 1, lane.table);
        }
    }
    const auto scales = at<Pack<float, 4>>(shared, stage + lane.scales);
#pragma unroll
    for (u32 tile = 0; tile < M / 8; ++tile) {
        Wide right[WORDS];
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i) {
            right[i] = at<Wide>(shared, stage + lane.x[i] + tile * 8 * S::X_STRIDE);
        }
#pragma unroll
        for (u32 f = 0; f < FRAGMENTS; ++f) {
            float part[4] = {};
#pragma unroll
            for (u32 i = 0; i < WORDS; ++i) {
                const u32(&words)[4] = right[i].words;
                mma_16x8x16<ELEMENT>(part, left[f][2 * i], {words[0], words[1]});
                mma_16x8x16<ELEMENT>(part, left[f][2 * i + 1], {words[2], words[3]});
            }
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                sums[f][tile][i] += scales.elements[2 * f + i / 2] * part[i];
            }
        }
    }
}

// Adds the sums of two warps with the same rows: each gets those of one fragment.
template <u32 TILES>
__device__ __forceinline__ void add_halves(const float (&sums)[FRAGMENTS][TILES][4], u8* shared,
                                           float (&totals)[TILES][4]) {
    using Four = Pack<float, 4>;
    static_assert(THREADS * TILES * sizeof(Four) <= TABLE_BYTES, "they take the table's place");
    Four* const exchange = reinterpret_cast<Four*>(shared) + threadIdx.x;
    const bool second = threadIdx.x / WARP % HALVES;
    // All are done with the table.
    __syncthreads();
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile) {
        Four given;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            given.elements[i] = second ? sums[0][tile][i] : sums[1][tile][i];
            totals[tile][i] = second ? sums[1][tile][i] : sums[0][tile][i];
        }
        exchange[tile * THREADS] = given;
    }
    __syncthreads();
    const Four* const theirs = second ? exchange - WARP : exchange + WARP;
#pragma unroll
    for (u32 tile = 0; tile < TILES; ++tile) {
        const Four other = theirs[tile * THREADS];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) totals[tile][i] += other.elements[i];
    }
}

template <u32 M>
__device__ __forceinline__ void matmul(const Problem& problem, const Output<ELEMENT>& output) {
    using S = Stage<M>;
    u8* const shared = dynamic_shared();
    // As many as the launch has room for; every launch has it for two.
    const u32 stages = max(min((dynamic_bytes() - TABLES_BYTES) / S::BYTES, MOST_STAGES), 2u);
    const u32 behind = TABLES_BYTES + stages * S::BYTES;
    const i64 first_row = i64(blockIdx.x) * BLOCK_ROWS, first_x = i64(blockIdx.y) * M;
    const Loader<M> loader(problem, first_row, first_x);
    const Lane<M> lane(problem);

    // This split's steps.
    const u32 steps = u32((problem.k + S::DEPTH - 1) / S::DEPTH);
    const u32 begin = u32(u64(steps) * blockIdx.z / output.splits);
    const u32 end = u32(u64(steps) * (blockIdx.z + 1) / output.splits);

    // All that the first stages need is asked for before any of it is waited for.
    Scales::Fetched first_scales[MOST_STAGES - 1];
#pragma unroll
    for (u32 ahead = 0; ahead < MOST_STAGES - 1; ++ahead) {
        first_scales[ahead] = {};
        const bool wanted = ahead < stages - 1 && begin + ahead < end;
        if (wanted) first_scales[ahead] = loader.fetch_scale(begin + ahead);
    }
    Scales::Fetched fetched = loader.fetch_scale(begin + stages - 1);
    const float offset = problem.scales.offset();
    const float second = CODEBOOK[threadIdx.x / 8 % 16], nested = NESTED_TABLE[threadIdx.x];
#pragma unroll
    for (u32 ahead = 0; ahead < MOST_STAGES - 1; ++ahead) {
        if (ahead >= stages - 1) break;
        if (begin + ahead < end) {
            loader.copy(shared + TABLES_BYTES + ahead * S::BYTES, begin + ahead, problem.k);
        }
        copy_async_commit();
    }
    fill_table(shared, second);
    reinterpret_cast<float*>(shared + TABLE_BYTES)[threadIdx.x] = nested;
    __syncthreads();
#pragma unroll
    for (u32 ahead = 0; ahead < MOST_STAGES - 1; ++ahead) {
        if (ahead >= stages - 1) break;
        const u32 stage = TABLES_BYTES + ahead * S::BYTES;
        loader.store_scale(shared, stage, first_scales[ahead], offset);
    }

    float sums[FRAGMENTS][M / 8][4] = {};
    u32 used = TABLES_BYTES;
    for (u32 step = begin; step < end; ++step) {
        copy_async_wait_but(stages - 2);
        // What this stage needs is there, and all are done with the one that is filled next.
        __syncthreads();
        const u32 next = step + stages - 1;
        if (next < end) {
            const u32 filled = (used == TABLES_BYTES ? behind : used) - S::BYTES;
            loader.copy(shared + filled, next, problem.k);
            // Fetched a stage ago.
            loader.store_scale(shared, filled, fetched, offset);
            fetched = loader.fetch_scale(next + 1);
        }
        copy_async_commit();
        // No product with what is not there: the value of its codes might be NaN.
        if (step < lane.end) multiply<M>(sums, shared, used, lane);
        used = used + S::BYTES == behind ? TABLES_BYTES : used + S::BYTES;
    }
    copy_async_wait<0>();

    float totals[M / 8][4];
    add_halves(sums, shared, totals);
    output.write(totals, first_row, first_x);
}

// Two blocks must fit a processor's registers: without a bound the compiler stays below 64
// registers for some and spills, or goes beyond 128.
#define MATMUL(rows)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) fourbit_matmul_##rows(             \
        const ELEMENT* x, const u8* packed, const void* absmax, const f32* nested_absmax,       \
        const f32* nested_offset, const ELEMENT* bias, ELEMENT* y, f32* partial, u32* arrived,  \
        i64 m, i64 n, i64 k, u32 splits, u32 slot) {                                            \
        matmul<rows>({x, packed, {absmax, nested_absmax, nested_offset}, m, n, k},              \
                     {bias, y, partial, arrived ? arrived : COUNTERS[slot], m, n, splits});     \
    }

MATMUL(8)
MATMUL(16)
MATMUL(32)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
MATMUL(64)
#endif

#ifdef FOURBIT_EMULATED
FOURBIT_EMULATE(fourbit_matmul_8)
FOURBIT_EMULATE(fourbit_matmul_16)
FOURBIT_EMULATE(fourbit_matmul_32)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
FOURBIT_EMULATE(fourbit_matmul_64)
#endif
#endif
