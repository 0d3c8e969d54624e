// dx = dy W on tensor cores: the gradient of y = x W^T, for rows of dy up to where decoding the
// weight once and the vendor's product are faster. bf16 and f16, accumulated in single precision.
//
// Parameters of fourbit_matmul_transposed_<rows>:
//   dy             ELEMENT [m, n]
//   packed         u8 [n k / 2], 4-bit codes of W [n, k], the first of two in the high bits; the
//                  address a multiple of 16
//   absmax         f32 [ceil(n k / BLOCK_SIZE)], or u8 codes with DOUBLE_QUANT
//   nested_absmax  f32 [ceil(blocks / 256)], null without DOUBLE_QUANT
//   nested_offset  f32 [1], null without DOUBLE_QUANT
//   dx             ELEMENT [m, k]
//   partial        f32 [splits, tiles of k x tiles of m, rows * 128], workspace of any contents;
//                  null where splits is 1
//   arrived        u32 [tiles of k x tiles of m], zeros, and zeros again afterwards; or null, for
//                  the kernel's own, of which a launch has a slot, with no more tiles than a slot
//                  has counters
//   m, n, k        i64; k a multiple of 32. Any m and n; n a multiple of 8 is faster.
//   splits         u32, the grid's third dimension
//   slot           u32, of the kernel's own counters: no two launches at a time may have the same
// The product runs over rows of W, and scales lie along them: one scale belongs to 32 or more
// results and no single sum, so it is folded in before the multiplication. The decoded weight is
// rounded to ELEMENT, as `fourbit_dequantize` rounds it. Splits are added in their order by the
// block that comes last, so the result depends on n, splits and the kernel alone.
//
// Launch: block 256; grid (ceil(k / 128), ceil(m / rows), splits); dynamic shared memory
// 34,816 + 128 * TABLE_COPIES * 16 + 288 * rows bytes, TABLE_COPIES 8 before sm_80 and 16 from there
// on: 69,888 for 8 rows to 86,016 for 64 (sm_80). rows is 8, 16, 32 or 64; before sm_80 f16 alone,
// and not 64 rows. Good splits fill the card: processors / (tiles of k x tiles of m), and no more
// than n / 256.
//
// Floor: 0.5 bytes a weight for codes, 1 / BLOCK_SIZE or 4 / BLOCK_SIZE for scales, read once for
// each tile of m; 2 m n k operations. Beside it dy is read once for each 128 columns of W.
// Why it should come near: a thread holds the 16 bytes of two coming stages in registers, 8 KiB a
// block; 128 columns of a row are 64 bytes side by side. Decoding is one 64-bit look a byte, into a
// table of pairs that stands in shared memory 16 times, so that no look meets another's bank, two
// multiplications and one packing. Tiles have rows of 16 bytes more than a multiple of 128, and
// threads of the right half of a row write its pieces in another order: neither these writes nor
// ldmatrix meet bank conflicts. The decoded tile is W and the left operand its transpose, which
// ldmatrix.trans gives. Tiles are double: one barrier a stage, and fast warps decode while slow ones
// multiply.
#include "common.cuh"

static_assert(CODE_BITS == 4, "two codes a byte");
static_assert(BLOCK_SIZE % 32 == 0, "a chunk has one scale");
static_assert(sizeof(ELEMENT) == 2, "tensor cores take 16 bits");

constexpr u32 THREADS = 256;
// Columns of W of a warp and of a block; rows of W of a stage.
constexpr u32 WARP_COLUMNS = 16;
constexpr u32 BLOCK_COLUMNS = THREADS / WARP * WARP_COLUMNS;
constexpr u32 DEPTH = 64;
constexpr u32 CHUNK = 32;
constexpr u32 ROW_CHUNKS = BLOCK_COLUMNS / CHUNK;
static_assert(THREADS == DEPTH * ROW_CHUNKS, "a thread brings one chunk of a stage");
constexpr u32 W_STRIDE = BLOCK_COLUMNS * 2 + 16;
constexpr u32 W_BYTES = DEPTH * W_STRIDE;
constexpr u32 Y_STRIDE = DEPTH * 2 + 16;
// Of dy, 16 bytes.
constexpr u32 PIECE = 8;
constexpr u32 ROW_PIECES = DEPTH / PIECE;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
constexpr u32 TABLE_COPIES = 16;
#else
constexpr u32 TABLE_COPIES = 8;
#endif
constexpr u32 TABLE_BYTES = 256 * TABLE_COPIES * 8;

static __device__ const float CODEBOOK[16] = CODEBOOK_VALUES;

// Zeros before and after every launch: a slot's are counted by one launch at a time.
static __device__ u32 COUNTERS[COUNTER_SLOTS][SLOT_COUNTERS];

struct alignas(8) ValuePair {
    float first;
    float second;
};

// The values of both codes of every byte; the copies of a byte lie together.
__device__ __forceinline__ void fill_table(ValuePair* table) {
    for (u32 i = threadIdx.x; i < 256 * TABLE_COPIES; i += THREADS) {
        const u32 byte = i / TABLE_COPIES;
        table[i] = {CODEBOOK[byte >> 4], CODEBOOK[byte & 15]};
    }
}

// What a thread brings of W: 32 columns of one row in every 64.
struct Chunk {
    Wide codes;
    Scales::Fetched scale;
    bool there;
};

struct Problem {
    const ELEMENT* dy;
    const u8* packed;
    Scales scales;
    i64 m;
    i64 n;
    i64 k;
};

__device__ __forceinline__ Chunk fetch(const Problem& problem, i64 first_column, u32 step,
                                       u32 end) {
    const i64 row = i64(step) * DEPTH + threadIdx.x / ROW_CHUNKS;
    const i64 column = first_column + threadIdx.x % ROW_CHUNKS * CHUNK;
    Chunk chunk{};
    chunk.there = step < end && row < problem.n && column < problem.k;
    if (chunk.there) {
        const u64 at = (u64(row) * u64(problem.k) + u64(column)) / CHUNK;
        chunk.codes = load_once(reinterpret_cast<const Wide*>(problem.packed) + at);
        chunk.scale = problem.scales.fetch(i64(at / (BLOCK_SIZE / CHUNK)));
    }
    return chunk;
}

// Writes a chunk into a tile of W; zeros for what is not there.
__device__ __forceinline__ void decode(u8* tile, const Problem& problem, const Chunk& chunk,
                                       const u8* table, float offset) {
    const u32 column_chunk = threadIdx.x % ROW_CHUNKS;
    const u32 mine = threadIdx.x % TABLE_COPIES * sizeof(ValuePair);
    const float scale = problem.scales.decode(chunk.scale, offset);
    u8* target = tile + threadIdx.x / ROW_CHUNKS * W_STRIDE + column_chunk * CHUNK * 2;
    // The right half of the row begins with its third piece.
    const u32 turn = column_chunk / 2 * 2;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const u32 word = turn ? chunk.codes.words[(i + 2) % 4] : chunk.codes.words[i];
        Wide piece{};
#pragma unroll
        for (u32 byte = 0; byte < 4; ++byte) {
            const u32 code = (word >> 8 * byte) & 0xff;
            const u32 at = code * (TABLE_COPIES * sizeof(ValuePair)) + mine;
            const ValuePair both = *reinterpret_cast<const ValuePair*>(table + at);
            piece.words[byte] = pack_pair<ELEMENT>(both.first * scale, both.second * scale);
        }
        if (!chunk.there) piece = Wide{};
        *reinterpret_cast<Wide*>(target + (i + turn) % 4 * 16) = piece;
    }
}

// Begins to copy a stage of M rows of dy; zeros for what is not there. `wide`: every piece is 16
// aligned bytes of one row.
template <u32 M>
__device__ __forceinline__ void copy_dy(u8* tile, const Problem& problem, i64 first_row, u32 step,
                                        bool wide) {
    for (u32 i = threadIdx.x; i < M * ROW_PIECES; i += THREADS) {
        const u32 row = i / ROW_PIECES, piece = i % ROW_PIECES;
        const i64 column = i64(step) * DEPTH + piece * PIECE;
        const bool there = first_row + row < problem.m && column < problem.n;
        u8* target = tile + row * Y_STRIDE + piece * 16;
        const ELEMENT* source = problem.dy + (there ? (first_row + row) * problem.n + column : 0);
        if (wide) {
            copy_async_16(target, source, there ? 16 : 0);
            continue;
        }
        Pack<ELEMENT, PIECE> elements{};
        const u32 left = there ? u32(min(i64(PIECE), problem.n - column)) : 0;
#pragma unroll
        for (u32 e = 0; e < PIECE; ++e) {
            if (e < left) elements.elements[e] = source[e];
        }
        *reinterpret_cast<Pack<ELEMENT, PIECE>*>(target) = elements;
    }
}

// Adds the product of a stage to a warp's sums: 16 columns of W by M rows of dy.
template <u32 M>
__device__ __forceinline__ void multiply(float (&sums)[M / 8][4], const u8* w, const u8* y) {
    const u32 lane = threadIdx.x % WARP;
    const u32 in_matrix = lane % 8, matrix = lane / 8;
    const u8* w_row = w + (matrix / 2 * 8 + in_matrix) * W_STRIDE +
                      (threadIdx.x / WARP * WARP_COLUMNS + matrix % 2 * 8) * 2;
    const u8* y_row = y + in_matrix * Y_STRIDE + matrix * 16;
#pragma unroll
    for (u32 half = 0; half < DEPTH / 32; ++half) {
        u32 left[2][4];
        load_matrix_x4_transposed(left[0], w_row + half * 32 * W_STRIDE);
        load_matrix_x4_transposed(left[1], w_row + (half * 32 + 16) * W_STRIDE);
#pragma unroll
        for (u32 tile = 0; tile < M / 8; ++tile) {
            u32 right[4];
            load_matrix_x4(right, y_row + tile * 8 * Y_STRIDE + half * 64);
            mma_16x8x16<ELEMENT>(sums[tile], left[0], {right[0], right[1]});
            mma_16x8x16<ELEMENT>(sums[tile], left[1], {right[2], right[3]});
        }
    }
}

template <u32 M>
__device__ __forceinline__ void matmul_transposed(const Problem& problem,
                                                  const Output<ELEMENT>& output) {
    u8* table = dynamic_shared();
    u8* w_tiles = table + TABLE_BYTES;
    u8* y_tiles = w_tiles + 2 * W_BYTES;
    const i64 first_column = i64(blockIdx.x) * BLOCK_COLUMNS, first_row = i64(blockIdx.y) * M;
    const bool wide = problem.n % PIECE == 0 && reinterpret_cast<u64>(problem.dy) % 16 == 0;
    const float offset = problem.scales.offset();
    const u32 steps = u32((problem.n + DEPTH - 1) / DEPTH);
    const u32 begin = u32(u64(steps) * blockIdx.z / output.splits);
    const u32 end = u32(u64(steps) * (blockIdx.z + 1) / output.splits);

    Chunk chunk = fetch(problem, first_column, begin, end);
    Chunk next = fetch(problem, first_column, begin + 1, end);
    if (begin < end) copy_dy<M>(y_tiles, problem, first_row, begin, wide);
    copy_async_commit();
    fill_table(reinterpret_cast<ValuePair*>(table));
    __syncthreads();

    float sums[M / 8][4] = {};
    for (u32 step = begin; step < end; ++step) {
        const u32 tile = (step - begin) % 2;
        u8* w = w_tiles + tile * W_BYTES;
        u8* y = y_tiles + tile * (M * Y_STRIDE);
        // The tile of two stages ago: all passed a barrier since they read it.
        decode(w, problem, chunk, table, offset);
        chunk = next;
        next = fetch(problem, first_column, step + 2, end);
        copy_async_wait<0>();
        // This stage is there, and all are done with the one before.
        __syncthreads();
        if (step + 1 < end) {
            copy_dy<M>(y_tiles + (1 - tile) * (M * Y_STRIDE), problem, first_row, step + 1, wide);
        }
        copy_async_commit();
        multiply<M>(sums, w, y);
    }
    copy_async_wait<0>();
    output.write(sums, first_column, first_row);
}

#define MATMUL_TRANSPOSED(rows)                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS) fourbit_matmul_transposed_##rows(    \
        const ELEMENT* dy, const u8* packed, const void* absmax, const f32* nested_absmax,     \
        const f32* nested_offset, ELEMENT* dx, f32* partial, u32* arrived, i64 m, i64 n,       \
        i64 k, u32 splits, u32 slot) {                                                         \
        matmul_transposed<rows>({dy, packed, {absmax, nested_absmax, nested_offset}, m, n, k}, \
                                {nullptr, dx, partial, arrived ? arrived : COUNTERS[slot],     \
                                 m, k, splits});                                               \
    }

MATMUL_TRANSPOSED(8)
MATMUL_TRANSPOSED(16)
MATMUL_TRANSPOSED(32)
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
MATMUL_TRANSPOSED(64)
#endif

#ifdef FOURBIT_EMULATED
FOURBIT_EMULATE(fourbit_matmul_transposed_8)
FOURBIT_EMULATE(fourbit_matmul_transposed_16)
FOURBIT_EMULATE(fourbit_matmul_transposed_32)
FOURBIT_EMULATE(fourbit_matmul_transposed_64)
#endif
