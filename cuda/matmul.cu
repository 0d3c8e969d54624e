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
//   m, n, k        i64; k a multiple of 32. Any m and n.
//   splits         u32, the grid's third dimension
//   slot           u32, of the kernel's own counters: no two launches at a time may have the same
// Values are rounded to ELEMENT, scales stay in single precision and multiply the sum over each 32
// columns: more exact than a dense product, whose weight is rounded after scaling. Splits are added
// in their order by the block that comes last, so the result depends on k, splits and the kernel
// alone.
//
// Launch: block 256; grid (ceil(n / 128), ceil(m / rows), splits); dynamic shared memory
// 32,768 + STAGES * (7,168 + 192 rows) bytes, STAGES 2 before sm_80 and 3 from there on: 61,952 for
// 8 rows, 85,504 ... 91,136 for 64 (sm_80). rows is 8, 16, 32 or 64; before sm_80 8, 16 or 32 (64
// needs more shared memory than they have), and f16 alone (they have no bf16 mma). Good splits fill
// the card: processors / (tiles of n x tiles of m), and no more than k / 256.
//
// Floor: 0.5 bytes a weight for codes, 1 / BLOCK_SIZE or 4 / BLOCK_SIZE for scales, read once for
// each tile of m; 2 m n k operations. Beside it x is read once for each 128 rows of W, from the
// second-level cache.
// Why it should come near: codes and x come by cp.async, two stages ahead: a block has 8 KiB of
// codes and 2 blocks of an H100 processor, with x, have 40 KiB in flight. Codes go to the tensor
// cores without a stop: W is the left operand (16 x 16), x the right (16 x 8), and the columns of a
// step are so dealt out that the 8 codes of a 32-bit word are a lane's part of two steps. A byte is
// a pair of values, looked up in a table that stands in shared memory 32 times, once for each bank;
// x is read by 16 bytes. Rows of both tiles are padded so that no read meets another's bank. For 16
// rows and 32 columns of W that is 8 looks and 16 shifts and masks a lane; the multiplications take
// two mma for every 8 rows of x and four multiply-adds for the scale.
#include "common.cuh"

static_assert(CODE_BITS == 4, "two codes a byte");
static_assert(BLOCK_SIZE % 32 == 0, "a chunk has one scale");
static_assert(sizeof(ELEMENT) == 2, "tensor cores take 16 bits");

constexpr u32 WARPS = 8;
constexpr u32 THREADS = WARPS * WARP;
// Rows of W of a warp and of a block.
constexpr u32 WARP_ROWS = 16;
constexpr u32 BLOCK_ROWS = WARPS * WARP_ROWS;
// Columns that share a scale, and columns of a stage.
constexpr u32 CHUNK = 32;
constexpr u32 CHUNKS = 2;
constexpr u32 DEPTH = CHUNK * CHUNKS;
// Bytes from row to row in shared memory: of W an odd multiple of 16, of x 64 more than a multiple
// of 128, so that the eight rows that are read together lie in different banks.
constexpr u32 W_STRIDE = DEPTH / 2 + 16;
constexpr u32 X_STRIDE = DEPTH * 2 + 64;
constexpr u32 W_BYTES = BLOCK_ROWS * W_STRIDE;
constexpr u32 SCALE_BYTES = BLOCK_ROWS * CHUNKS * 4;
constexpr u32 TABLE_BYTES = 256 * WARP * 4;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr u32 STAGES = 3;
#else
constexpr u32 STAGES = 2;
#endif
static_assert(THREADS == BLOCK_ROWS * CHUNKS, "a thread brings a chunk of codes and its scale");

static __device__ const float CODEBOOK[16] = CODEBOOK_VALUES;

// Zeros before and after every launch: a slot's are counted by one launch at a time.
static __device__ u32 COUNTERS[COUNTER_SLOTS][SLOT_COUNTERS];

// Both values of every byte, the first in the lower half; copy c of byte b is number 32 b + c.
__device__ __forceinline__ void fill_table(u32* table) {
    for (u32 i = threadIdx.x; i < 256 * WARP; i += THREADS) {
        const u32 byte = i / WARP;
        table[i] = pack_pair<ELEMENT>(CODEBOOK[byte >> 4], CODEBOOK[byte & 15]);
    }
}

// Byte `which` of a word, looked up. `mine` is the offset of the lane's copy.
__device__ __forceinline__ u32 look_up(const u8* table, u32 word, u32 which, u32 mine) {
    const u32 shifted = which == 0 ? word << 7 : word >> (8 * which - 7);
    return *reinterpret_cast<const u32*>(table + ((shifted & 0x7f80u) | mine));
}

struct Problem {
    const ELEMENT* x;
    const u8* packed;
    Scales scales;
    i64 m;
    i64 n;
    i64 k;
};

// One stage's part of shared memory: codes, scales, x.
template <u32 M> struct Stage {
    static constexpr u32 BYTES = W_BYTES + SCALE_BYTES + M * X_STRIDE;

    u8* memory;

    __device__ __forceinline__ u8* codes(u32 row) const { return memory + row * W_STRIDE; }
    // By chunk, then by row: lanes of a row read one number, rows neighbouring ones.
    __device__ __forceinline__ float* scales(u32 chunk) const {
        return reinterpret_cast<float*>(memory + W_BYTES) + chunk * BLOCK_ROWS;
    }
    __device__ __forceinline__ u8* x(u32 row) const {
        return memory + W_BYTES + SCALE_BYTES + row * X_STRIDE;
    }
};

// What a thread brings for every stage: the same chunk of 32 codes of one row, and some of x. All
// that does not change from stage to stage is computed once.
template <u32 M> struct Loader {
    // Pieces of 16 bytes.
    static constexpr u32 ROW_PIECES = DEPTH / 8;
    static constexpr u32 PIECES = (M * ROW_PIECES + THREADS - 1) / THREADS;
    static constexpr bool EVEN = M * ROW_PIECES % THREADS == 0;

    const Wide* codes;
    RowScales scales;
    const ELEMENT* x[PIECES];
    bool x_there[PIECES];
    u32 x_chunk;
    u32 chunks;
    u32 chunk;
    bool there;
    // Places within a stage.
    u32 codes_at;
    u32 scale_at;
    u32 x_at;

    __device__ __forceinline__ Loader(const Problem& problem, i64 first_row, i64 first_x) {
        const u32 row = threadIdx.x / CHUNKS;
        chunk = threadIdx.x % CHUNKS;
        chunks = u32(problem.k / CHUNK);
        there = first_row + row < problem.n;
        // What does not exist takes the address of something that does, and is not read.
        const u64 first_chunk = there ? u64(first_row + row) * chunks : 0;
        codes = reinterpret_cast<const Wide*>(problem.packed) + first_chunk;
        scales = RowScales(problem.scales, first_chunk);
        codes_at = row * W_STRIDE + chunk * 16;
        scale_at = W_BYTES + (chunk * BLOCK_ROWS + row) * 4;
        const u32 x_row = threadIdx.x / ROW_PIECES, column = threadIdx.x % ROW_PIECES * 8;
        x_at = W_BYTES + SCALE_BYTES + x_row * X_STRIDE + column * 2;
        x_chunk = column / CHUNK;
#pragma unroll
        for (u32 piece = 0; piece < PIECES; ++piece) {
            const i64 from = first_x + x_row + piece * (THREADS / ROW_PIECES);
            x_there[piece] = from < problem.m;
            x[piece] = problem.x + (x_there[piece] ? from * problem.k + column : 0);
        }
    }

    // Begins the copies of a stage.
    __device__ __forceinline__ void copy(u8* stage, u32 step) const {
        const bool full = there && step * CHUNKS + chunk < chunks;
        copy_async_16(stage + codes_at, full ? codes + (step * CHUNKS + chunk) : codes,
                      full ? 16 : 0);
        if (!EVEN && threadIdx.x >= M * ROW_PIECES) return;
        const bool inside = step * CHUNKS + x_chunk < chunks;
#pragma unroll
        for (u32 piece = 0; piece < PIECES; ++piece) {
            const bool read = inside && x_there[piece];
            copy_async_16(stage + x_at + piece * (THREADS / ROW_PIECES) * X_STRIDE,
                          read ? x[piece] + step * DEPTH : x[piece], read ? 16 : 0);
        }
    }

    __device__ __forceinline__ Scales::Fetched fetch_scale(u32 step) const {
        const bool full = there && step * CHUNKS + chunk < chunks;
        return full ? scales.fetch(step * CHUNKS + chunk) : Scales::Fetched{};
    }

    __device__ __forceinline__ void store_scale(u8* stage, float scale) const {
        *reinterpret_cast<float*>(stage + scale_at) = scale;
    }
};

// Adds the product of a stage's first `chunks` chunks to a warp's sums: 16 rows of W (lane / 4, and 8 more) by M rows of x
// (for tile t of 8: 8 t + 2 (lane % 4), and one more).
//
// Lane 4 g + t holds word t of a chunk's 16 bytes: columns 8 t to 8 t + 7, of which the first four
// take the places of its part of one mma, and the others of the next. Which column has which place
// is the same for W and x, and so does not matter.
template <u32 M>
__device__ __forceinline__ void multiply(float (&sums)[M / 8][4], const Stage<M>& stage,
                                         const u8* table, u32 chunks) {
    const u32 lane = threadIdx.x % WARP;
    const u32 row = threadIdx.x / WARP * WARP_ROWS + lane / 4;
    const u32 mine = lane * 4;
#pragma unroll
    for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
        // No product with what is not there: the value of its codes might be NaN.
        if (chunk >= chunks) break;
        const u32 at = chunk * 16 + lane % 4 * 4;
        const u32 upper = *reinterpret_cast<const u32*>(stage.codes(row) + at);
        const u32 lower = *reinterpret_cast<const u32*>(stage.codes(row + 8) + at);
        u32 left[2][4];
#pragma unroll
        for (u32 step = 0; step < 2; ++step) {
            left[step][0] = look_up(table, upper, 2 * step, mine);
            left[step][1] = look_up(table, lower, 2 * step, mine);
            left[step][2] = look_up(table, upper, 2 * step + 1, mine);
            left[step][3] = look_up(table, lower, 2 * step + 1, mine);
        }
        const float upper_scale = stage.scales(chunk)[row];
        const float lower_scale = stage.scales(chunk)[row + 8];
#pragma unroll
        for (u32 tile = 0; tile < M / 8; ++tile) {
            const u8* x = stage.x(tile * 8 + lane / 4) + chunk * CHUNK * 2 + lane % 4 * 16;
            const Wide right = *reinterpret_cast<const Wide*>(x);
            float part[4] = {};
            mma_16x8x16<ELEMENT>(part, left[0], {right.words[0], right.words[1]});
            mma_16x8x16<ELEMENT>(part, left[1], {right.words[2], right.words[3]});
            sums[tile][0] += upper_scale * part[0];
            sums[tile][1] += upper_scale * part[1];
            sums[tile][2] += lower_scale * part[2];
            sums[tile][3] += lower_scale * part[3];
        }
    }
}

template <u32 M> __device__ __forceinline__ void matmul(const Problem& problem, const Output<ELEMENT>& output) {
    u8* table = dynamic_shared();
    u8* const stages = table + TABLE_BYTES;
    const auto after = [&](u8* stage) {
        return stage == stages + (STAGES - 1) * Stage<M>::BYTES ? stages : stage + Stage<M>::BYTES;
    };
    const i64 first_row = i64(blockIdx.x) * BLOCK_ROWS, first_x = i64(blockIdx.y) * M;
    const Loader<M> loader(problem, first_row, first_x);
    const float offset = problem.scales.offset();

    // This split's steps.
    const u32 steps = u32((problem.k + DEPTH - 1) / DEPTH);
    const u32 begin = u32(u64(steps) * blockIdx.z / output.splits);
    const u32 end = u32(u64(steps) * (blockIdx.z + 1) / output.splits);

    u8* filled = stages;
#pragma unroll
    for (u32 ahead = 0; ahead < STAGES - 1; ++ahead) {
        const u32 step = begin + ahead;
        if (step < end) {
            loader.copy(filled, step);
            loader.store_scale(filled, problem.scales.decode(loader.fetch_scale(step), offset));
        }
        copy_async_commit();
        filled = after(filled);
    }
    fill_table(reinterpret_cast<u32*>(table));

    float sums[M / 8][4] = {};
    u8* used = stages;
    for (u32 step = begin; step < end; ++step) {
        copy_async_wait<STAGES - 2>();
        // What this stage needs is there, and all are done with the one that is filled next.
        __syncthreads();
        const u32 next = step + STAGES - 1;
        Scales::Fetched fetched{};
        if (next < end) {
            loader.copy(filled, next);
            fetched = loader.fetch_scale(next);
        }
        copy_async_commit();
        multiply<M>(sums, Stage<M>{used}, table, loader.chunks - step * CHUNKS);
        if (next < end) loader.store_scale(filled, problem.scales.decode(fetched, offset));
        used = after(used);
        filled = after(filled);
    }
    copy_async_wait<0>();

    output.write(sums, first_row, first_x);
}

#define MATMUL(rows)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) fourbit_matmul_##rows(                \
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
FOURBIT_EMULATE(fourbit_matmul_64)
#endif
