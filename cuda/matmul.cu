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
//   partial        f32 [splits, m, n], workspace of any contents; null where splits is 1
//   arrived        u32 [tiles of n x tiles of m], zeros; zeros again afterwards; null where splits
//                  is 1
//   m, n, k        i64; k a multiple of 32. Any m and n.
//   splits         u32, the grid's third dimension
// Values are rounded to ELEMENT, scales stay in single precision and multiply the sum over each 32
// columns: more exact than a dense product, whose weight is rounded after scaling. Splits are added
// in their order by the block that comes last, so the result depends on k, splits and the kernel
// alone.
//
// Launch: block 256; grid (ceil(n / 128), ceil(m / rows), splits); dynamic shared memory
// 32,768 + STAGES * (7,168 + 192 rows) bytes, STAGES 2 before sm_80 and 3 from there on: 58,880 for
// 8 rows to 91,136 for 64 (sm_80). rows is 8, 16, 32 or 64; before sm_80 8, 16 or 32 (64
// needs more shared memory than they have), and f16 alone (they have no bf16 mma). Good splits fill
// the card: processors / (tiles of n x tiles of m), and no more than k / 256.
//
// Floor: 0.5 bytes a weight for codes, 1 / BLOCK_SIZE or 4 / BLOCK_SIZE for scales, read once for
// each tile of m; 2 m n k operations. Beside it x is read once for each 128 rows of W, from the
// second-level cache.
// Why it should come near: codes and x come by cp.async, two stages ahead: a block has 8 KiB of
// codes under way. An H100 processor has room for 3 blocks of 8 or 16 rows and 2 of 32 or 64,
// with x 30 to 48 KiB; an A100 for 2 (1 of 64 rows), an RTX 4090 for 1. Codes go to the tensor
// cores without a stop: W is the left operand (16 x 16), x the right (16 x 8), and the columns
// of a step are so dealt out that the 8 codes of a 32-bit word are a lane's part of two steps. A
// byte is a pair of values, looked up in a table that stands in shared memory 32 times, once for
// each bank; x is read by 16 bytes. Rows of both tiles are padded so that no read meets
// another's bank.
// Counted for bf16, double quantization, on a warp's stage of 16 rows and 64 columns of W, 32
// codes a lane (fillers between mma left out); cycles are of a processor's shared memory, the
// copies' writes with them, where an H100's memory takes 37, an A100's 39 and an RTX 4090's 170:
//   rows of x   sm_80   sm_90   mma   shared reads (looks, codes and scales, x)   cycles
//           8     134     138     4   16 + 8 + 2                                      38
//          16     153     172     8   16 + 8 + 4                                      47
//          32     179     182    16   16 + 8 + 8                                      65
//          64     249     251    32   16 + 8 + 16                                    101
// Issue takes a quarter of the instructions in cycles: 35 to 63. So for 8 rows memory and shared
// memory come out alike on the large cards; for more it is shared memory that binds, at 79 percent
// of the memory's speed on an H100 for 16, 57 for 32 and 37 for 64. On an RTX 4090 the memory binds
// for all. Four multiply-adds for the scale go with every two mma.
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

// Where things lie in a stage's part of shared memory: codes, scales, x.
template <u32 M> struct Stage {
    static constexpr u32 BYTES = W_BYTES + SCALE_BYTES + M * X_STRIDE;

    __device__ __forceinline__ static u32 codes(u32 row) { return row * W_STRIDE; }
    // By chunk, then by row: lanes of a row read one number, rows neighbouring ones.
    __device__ __forceinline__ static u32 scale(u32 row, u32 chunk) {
        return W_BYTES + (chunk * BLOCK_ROWS + row) * 4;
    }
    __device__ __forceinline__ static u32 x(u32 row) {
        return W_BYTES + SCALE_BYTES + row * X_STRIDE;
    }
    // The stage that is filled or used after this one.
    __device__ __forceinline__ static u32 after(u32 stage) {
        return stage == TABLE_BYTES + (STAGES - 1) * BYTES ? TABLE_BYTES : stage + BYTES;
    }
};

// What a thread brings for every stage: the same chunk of 32 codes of one row, and some of x. All
// that does not change from stage to stage is computed once. Chunks count from the thread's own in
// the first stage on, so those of stage s have number CHUNKS s.
template <u32 M> struct Loader {
    // Pieces of 16 bytes.
    static constexpr u32 ROW_PIECES = DEPTH / 8;
    static constexpr u32 PIECES = (M * ROW_PIECES + THREADS - 1) / THREADS;
    static constexpr bool EVEN = M * ROW_PIECES % THREADS == 0;

    const Wide* codes;
    RowScales scales;
    const ELEMENT* x[PIECES];
    // How many chunks there are: none where the row is not there.
    u32 chunks;
    u32 x_chunks[PIECES];
    // Places within a stage.
    u32 codes_at;
    u32 scale_at;
    u32 x_at;

    __device__ __forceinline__ Loader(const Problem& problem, i64 first_row, i64 first_x) {
        const u32 of_row = u32(problem.k / CHUNK);
        const u32 row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        const bool there = first_row + row < problem.n && chunk < of_row;
        chunks = computed(there ? of_row - chunk : 0);
        // What does not exist takes the address of something that does, and is not read.
        const u64 first_chunk = there ? u64(first_row + row) * of_row + chunk : 0;
        codes = reinterpret_cast<const Wide*>(problem.packed) + first_chunk;
        scales = RowScales(problem.scales, first_chunk);
        codes_at = Stage<M>::codes(row) + chunk * 16;
        scale_at = computed(Stage<M>::scale(row, chunk));
        const u32 x_row = threadIdx.x / ROW_PIECES, column = threadIdx.x % ROW_PIECES * 8;
        const u32 x_chunk = column / CHUNK;
        x_at = Stage<M>::x(x_row) + column * 2;
#pragma unroll
        for (u32 piece = 0; piece < PIECES; ++piece) {
            const i64 from = first_x + x_row + piece * (THREADS / ROW_PIECES);
            const bool x_there = from < problem.m && x_chunk < of_row;
            x_chunks[piece] = x_there ? of_row - x_chunk : 0;
            x[piece] = problem.x + (x_there ? from * problem.k + column : 0);
        }
    }

    // Begins the copies of a stage.
    __device__ __forceinline__ void copy(u8* stage, u32 step) const {
        const u32 at = step * CHUNKS;
        const bool full = at < chunks;
        copy_async_16(stage + codes_at, codes + (full ? at : 0), full ? 16 : 0);
        if (!EVEN && threadIdx.x >= M * ROW_PIECES) return;
#pragma unroll
        for (u32 piece = 0; piece < PIECES; ++piece) {
            const bool read = at < x_chunks[piece];
            copy_async_16(stage + x_at + piece * (THREADS / ROW_PIECES) * X_STRIDE,
                          x[piece] + (read ? step * DEPTH : 0), read ? 16 : 0);
        }
    }

    __device__ __forceinline__ Scales::Fetched fetch_scale(u32 step) const {
        const u32 at = step * CHUNKS;
        return at < chunks ? scales.fetch(at) : Scales::Fetched{};
    }

    __device__ __forceinline__ void store_scale(u8* stage, float scale) const {
        *reinterpret_cast<float*>(stage + scale_at) = scale;
    }
};

// What a lane reads of a stage, and where its copy of the table begins.
//
// Lane 4 g + t holds word t of a chunk's 16 bytes: columns 8 t to 8 t + 7, of which the first four
// take the places of its part of one mma, and the others of the next. Which column has which place
// is the same for W and x, and so does not matter.
template <u32 M> struct Lane {
    u32 codes;
    u32 scales;
    u32 x;
    u32 table;

    __device__ __forceinline__ Lane() {
        const u32 lane = threadIdx.x % WARP;
        const u32 row = threadIdx.x / WARP * WARP_ROWS + lane / 4;
        codes = computed(Stage<M>::codes(row) + lane % 4 * 4);
        scales = computed(Stage<M>::scale(row, 0));
        x = computed(Stage<M>::x(lane / 4) + lane % 4 * 16);
        table = computed(lane * 4);
    }
};

template <class T> __device__ __forceinline__ T at(const u8* shared, u32 place) {
    return *reinterpret_cast<const T*>(shared + place);
}

// Adds the product of a stage's first `chunks` chunks to a warp's sums: 16 rows of W (lane / 4, and
// 8 more) by M rows of x (for tile t of 8: 8 t + 2 (lane % 4), and one more).
template <u32 M>
__device__ __forceinline__ void multiply(float (&sums)[M / 8][4], const u8* shared, u32 stage,
                                         const Lane<M>& lane, u32 chunks) {
#pragma unroll
    for (u32 chunk = 0; chunk < CHUNKS; ++chunk) {
        // No product with what is not there: the value of its codes might be NaN.
        if (chunk >= chunks) break;
        const u32 codes = stage + lane.codes + chunk * 16;
        const u32 upper = at<u32>(shared, codes);
        const u32 lower = at<u32>(shared, codes + Stage<M>::codes(8));
        u32 left[2][4];
#pragma unroll
        for (u32 step = 0; step < 2; ++step) {
            left[step][0] = look_up(shared, upper, 2 * step, lane.table);
            left[step][1] = look_up(shared, lower, 2 * step, lane.table);
            left[step][2] = look_up(shared, upper, 2 * step + 1, lane.table);
            left[step][3] = look_up(shared, lower, 2 * step + 1, lane.table);
        }
        const u32 scales = stage + lane.scales + chunk * (BLOCK_ROWS * 4);
        const float upper_scale = at<float>(shared, scales);
        const float lower_scale = at<float>(shared, scales + 8 * 4);
#pragma unroll
        for (u32 tile = 0; tile < M / 8; ++tile) {
            const Wide right =
                at<Wide>(shared, stage + lane.x + tile * 8 * X_STRIDE + chunk * CHUNK * 2);
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

template <u32 M>
__device__ __forceinline__ void matmul(const Problem& problem, const Output<ELEMENT>& output) {
    // The table, and then the stages.
    u8* const shared = dynamic_shared();
    const i64 first_row = i64(blockIdx.x) * BLOCK_ROWS, first_x = i64(blockIdx.y) * M;
    const Loader<M> loader(problem, first_row, first_x);
    const float offset = problem.scales.offset();

    const u32 chunks = u32(problem.k / CHUNK);
    // This split's steps.
    const u32 steps = u32((problem.k + DEPTH - 1) / DEPTH);
    const u32 begin = u32(u64(steps) * blockIdx.z / output.splits);
    const u32 end = u32(u64(steps) * (blockIdx.z + 1) / output.splits);

    const Lane<M> lane;
    u32 filled = TABLE_BYTES;
#pragma unroll
    for (u32 ahead = 0; ahead < STAGES - 1; ++ahead) {
        const u32 step = begin + ahead;
        if (step < end) {
            loader.copy(shared + filled, step);
            const auto fetched = loader.fetch_scale(step);
            loader.store_scale(shared + filled, problem.scales.decode(fetched, offset));
        }
        copy_async_commit();
        filled = Stage<M>::after(filled);
    }
    fill_table(reinterpret_cast<u32*>(shared));

    float sums[M / 8][4] = {};
    u32 used = TABLE_BYTES;
    for (u32 step = begin; step < end; ++step) {
        copy_async_wait<STAGES - 2>();
        // What this stage needs is there, and all are done with the one that is filled next.
        __syncthreads();
        const u32 next = step + STAGES - 1;
        Scales::Fetched fetched{};
        if (next < end) {
            loader.copy(shared + filled, next);
            fetched = loader.fetch_scale(next);
        }
        copy_async_commit();
        multiply<M>(sums, shared, used, lane, chunks - step * CHUNKS);
        if (next < end) {
            loader.store_scale(shared + filled, problem.scales.decode(fetched, offset));
        }
        used = Stage<M>::after(used);
        filled = Stage<M>::after(filled);
    }
    copy_async_wait<0>();

    output.write(sums, first_row, first_x);
}

// Two blocks must fit a processor's registers: without a bound the compiler stays below 64
// registers for some and spills, or goes beyond 128.
#define MATMUL(rows)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) fourbit_matmul_##rows(             \
        const ELEMENT* x, const u8* packed, const void* absmax, const f32* nested_absmax,       \
        const f32* nested_offset, const ELEMENT* bias, ELEMENT* y, f32* partial, u32* arrived,  \
        i64 m, i64 n, i64 k, u32 splits) {                                                      \
        matmul<rows>({x, packed, {absmax, nested_absmax, nested_offset}, m, n, k},              \
                     {bias, y, partial, arrived, m, n, splits});                                \
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
