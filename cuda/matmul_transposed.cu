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
// 35,840 + 128 * TABLE_COPIES * 16 + 288 * rows bytes, TABLE_COPIES 8 before sm_80 and 16 from
// there on: 70,912 for 8 rows to 87,040 for 64 (sm_80). rows is 8, 16, 32 or 64; before sm_80
// f16 alone, and not 64 rows. Splits fill processors x blocks; src/gpu/products.rs has the model by
// which they are chosen.
//
// Floor: 0.5 bytes a weight for codes, 1 / BLOCK_SIZE or 4 / BLOCK_SIZE for scales, read once for
// each tile of m; 2 m n k operations. Beside it dy is read once for each 128 columns of W.
// Why it comes near where it does: a thread holds the 16 bytes of two coming stages in registers,
// 8 KiB a block; an H100 processor has room for 3 blocks of 8 or 16 rows and 2 of 32 or 64, an A100
// for 2 (1 of 64 rows), an RTX 4090 for 1. 128 columns of a row are 64 bytes side by side. Decoding
// is one 64-bit look a byte, into a table of pairs that stands in shared memory 16 times, so
// that no look meets another's bank, two multiplications and one packing. Tiles have rows of 16
// bytes more than a multiple of 128, and threads of the right half of a row write its pieces in
// another order: neither these writes nor ldmatrix meet bank conflicts. The decoded tile is W
// and the left operand its transpose, which ldmatrix.trans gives. Tiles are double: one barrier
// a stage, and fast warps decode while slow ones multiply. Codes and scales of the first two
// stages are asked for before anything is waited for; the nested codebook stands in shared memory.
// Counted for bf16, double quantization, n a multiple of 8, on a warp's share of a stage, 32
// codes a lane (fillers between mma left out); cycles are of a processor's shared memory, the
// copies' writes with them, where an H100's memory takes 37, an A100's 39 and an RTX 4090's 170:
//   rows of dy   sm_80   sm_90   mma   shared accesses (looks, writes, ldmatrix)   cycles
//            8     221     242     4   16 + 4 + 6                                      73
//           16     234     255     8   16 + 4 + 8                                      82
//           32     228     249    16   16 + 4 + 12                                    100
//           64     311     328    32   16 + 4 + 20                                    136
// Issue takes a quarter of the instructions in cycles. Shared memory binds on the large cards,
// at half of the memory's speed for 8 rows and a quarter for 64: the decoded tile goes through it
// once in and once out, and every warp reads all of dy's. There the floor is not reached. On an
// RTX 4090 the memory binds.
#include "product.cuh"

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
// Both tables; the tiles follow.
constexpr u32 TABLES_BYTES = TABLE_BYTES + 256 * 4;

static __device__ const float CODEBOOK[16] = CODEBOOK_VALUES;

// Zeros before and after every launch: a slot's are counted by one launch at a time.
static __device__ u32 COUNTERS[COUNTER_SLOTS][SLOT_COUNTERS];

struct alignas(8) ValuePair {
    float first;
    float second;
};

// The values of both codes of every byte; the copies of a byte lie together. A thread writes two
// copies at a time, of bytes that share their second code, `second_of_thread`, of that value.
constexpr u32 BYTES_AT_ONCE = 2 * THREADS / TABLE_COPIES;

__device__ __forceinline__ u32 second_of_thread() {
    return threadIdx.x / (TABLE_COPIES / 2) % 16;
}

__device__ __forceinline__ void fill_table(u8* table, float second) {
    const float values[16] = CODEBOOK_VALUES;
    // First codes of the bytes that are written at once, and the thread's.
    constexpr u32 FIRSTS = BYTES_AT_ONCE / 16;
    const u32 mine = threadIdx.x / (THREADS / FIRSTS);
#pragma unroll
    for (u32 i = 0; i < 16 / FIRSTS; ++i) {
        float first = values[i * FIRSTS];
#pragma unroll
        for (u32 other = 1; other < FIRSTS; ++other) {
            if (mine == other) first = values[i * FIRSTS + other];
        }
        const u32 low = float_to_bits(first), high = float_to_bits(second);
        reinterpret_cast<Wide*>(table)[i * THREADS + threadIdx.x] = {{low, high, low, high}};
    }
}

// Byte `which` of a word, looked up. `mine` is the offset of the lane's copy.
__device__ __forceinline__ ValuePair look_up(const u8* table, u32 word, u32 which, u32 mine) {
    constexpr u32 SHIFT = TABLE_COPIES == 16 ? 7 : 6;
    static_assert(TABLE_COPIES * sizeof(ValuePair) == 1 << SHIFT, "a shift in place of a product");
    const u32 shifted = which == 0 ? word << SHIFT : word >> (8 * which - SHIFT);
    return *reinterpret_cast<const ValuePair*>(table + ((shifted & 0xff << SHIFT) | mine));
}

struct Problem {
    const ELEMENT* dy;
    const u8* packed;
    Scales scales;
    i64 m;
    i64 n;
    i64 k;
};

// What a thread brings of W: 32 columns of one row in every 64.
struct Chunk {
    Wide codes;
    Scales::Fetched scale;
    bool there;
};

// What a thread brings for every stage: a chunk of W and some of dy. All that does not change from
// stage to stage is computed once.
template <u32 M> struct Loader {
    static constexpr u32 PIECES = (M * ROW_PIECES + THREADS - 1) / THREADS;
    static constexpr bool EVEN = M * ROW_PIECES % THREADS == 0;

    const Problem& problem;
    float offset;
    // The thread's chunk of the first stage, chunks from stage to stage, and stages that have one.
    u64 first_chunk;
    u64 stride;
    u32 chunk_end;
    // Pieces of dy in the first stage, and how many elements from there to their row's end.
    const ELEMENT* dy[PIECES];
    bool dy_there[PIECES];
    i64 dy_left;
    // Every piece is 16 aligned bytes of one row.
    bool wide;
    // Places in shared memory: of the lane's copy in the table, within a tile of W and one of dy.
    u32 mine;
    u32 w_at;
    u32 turn;
    u32 dy_at;

    __device__ __forceinline__ Loader(const Problem& of, i64 first_column, i64 first_row, u32 end)
        : problem(of), offset(of.scales.offset()) {
        const u32 row = threadIdx.x / ROW_CHUNKS, column_chunk = threadIdx.x % ROW_CHUNKS;
        const i64 column = first_column + column_chunk * CHUNK;
        first_chunk = (u64(row) * u64(of.k) + u64(column)) / CHUNK;
        stride = u64(of.k) * (DEPTH / CHUNK);
        const i64 stages = row < of.n && column < of.k ? (of.n - row + DEPTH - 1) / DEPTH : 0;
        chunk_end = computed(u32(min(i64(end), stages)));
        mine = computed(threadIdx.x % TABLE_COPIES * u32(sizeof(ValuePair)));
        w_at = row * W_STRIDE + column_chunk * CHUNK * 2;
        // The right half of the row begins with its third piece.
        turn = computed(column_chunk / 2 * 2);

        const u32 dy_row = threadIdx.x / ROW_PIECES;
        const u32 dy_column = threadIdx.x % ROW_PIECES * PIECE;
        wide = of.n % PIECE == 0 && reinterpret_cast<u64>(of.dy) % 16 == 0;
        dy_left = of.n - dy_column;
        dy_at = computed(dy_row * Y_STRIDE + dy_column * 2);
#pragma unroll
        for (u32 piece = 0; piece < PIECES; ++piece) {
            const i64 from = first_row + dy_row + piece * (THREADS / ROW_PIECES);
            dy_there[piece] = from < of.m;
            // What does not exist takes the address of something that does, and is not read.
            dy[piece] = of.dy + (dy_there[piece] && dy_left > 0 ? from * of.n + dy_column : 0);
        }
    }

    __device__ __forceinline__ Chunk fetch(u32 step) const {
        Chunk chunk{};
        chunk.there = step < chunk_end;
        if (chunk.there) {
            const u64 at = first_chunk + step * stride;
            chunk.codes = load_once(reinterpret_cast<const Wide*>(problem.packed) + at);
            chunk.scale = problem.scales.fetch(i64(at / (BLOCK_SIZE / CHUNK)));
        }
        return chunk;
    }

    // Writes a chunk into a tile of W; zeros for what is not there.
    __device__ __forceinline__ void decode(u8* tile, const Chunk& chunk, const u8* table) const {
        const float* nested = reinterpret_cast<const float*>(table + TABLE_BYTES);
        u8* target = tile + w_at;
        if (!chunk.there) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) *reinterpret_cast<Wide*>(target + i * 16) = Wide{};
            return;
        }
        const float scale = Scales::decode(chunk.scale, offset, nested);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 word = turn ? chunk.codes.words[(i + 2) % 4] : chunk.codes.words[i];
            Wide piece{};
#pragma unroll
            for (u32 byte = 0; byte < 4; ++byte) {
                const ValuePair both = look_up(table, word, byte, mine);
                piece.words[byte] = pack_pair<ELEMENT>(both.first * scale, both.second * scale);
            }
            *reinterpret_cast<Wide*>(target + (i + turn) % 4 * 16) = piece;
        }
    }

    // Begins to copy a stage of dy; zeros for what is not there.
    __device__ __forceinline__ void copy_dy(u8* tile, u32 step) const {
        if (!EVEN && threadIdx.x >= M * ROW_PIECES) return;
        const i64 left_in_row = dy_left - i64(step) * DEPTH;
#pragma unroll
        for (u32 piece = 0; piece < PIECES; ++piece) {
            const bool there = dy_there[piece] && left_in_row > 0;
            u8* target = tile + dy_at + piece * (THREADS / ROW_PIECES) * Y_STRIDE;
            const ELEMENT* source = dy[piece] + (there ? i64(step) * DEPTH : 0);
            if (wide) {
                copy_async_16(target, source, there ? 16 : 0);
                continue;
            }
            Pack<ELEMENT, PIECE> elements{};
            const u32 left = there ? u32(min(i64(PIECE), left_in_row)) : 0;
#pragma unroll
            for (u32 e = 0; e < PIECE; ++e) {
                if (e < left) elements.elements[e] = source[e];
            }
            *reinterpret_cast<Pack<ELEMENT, PIECE>*>(target) = elements;
        }
    }
};

// Adds the product of a stage to a warp's sums: 16 columns of W by M rows of dy. The addresses are
// those of the rows that the lane gives to ldmatrix.
template <u32 M>
__device__ __forceinline__ void multiply(float (&sums)[M / 8][4], const u8* w_row,
                                         const u8* y_row) {
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
    u8* w_tiles = table + TABLES_BYTES;
    u8* y_tiles = w_tiles + 2 * W_BYTES;
    const i64 first_column = i64(blockIdx.x) * BLOCK_COLUMNS, first_row = i64(blockIdx.y) * M;
    const u32 steps = u32((problem.n + DEPTH - 1) / DEPTH);
    const u32 begin = u32(u64(steps) * blockIdx.z / output.splits);
    const u32 end = u32(u64(steps) * (blockIdx.z + 1) / output.splits);

    const Loader<M> loader(problem, first_column, first_row, end);
    const u32 in_matrix = threadIdx.x % 8, matrix = threadIdx.x % WARP / 8;
    const u32 w_row =
        computed((matrix / 2 * 8 + in_matrix) * W_STRIDE +
                 (threadIdx.x / WARP * WARP_COLUMNS + matrix % 2 * 8) * 2);
    const u32 y_row = computed(in_matrix * Y_STRIDE + matrix * 16);

    // All that the first stages need is asked for before any of it is waited for.
    Chunk chunk = loader.fetch(begin);
    Chunk next = loader.fetch(begin + 1);
    const float second = CODEBOOK[second_of_thread()], nested = NESTED_TABLE[threadIdx.x];
    if (begin < end) loader.copy_dy(y_tiles, begin);
    copy_async_commit();
    fill_table(table, second);
    reinterpret_cast<float*>(table + TABLE_BYTES)[threadIdx.x] = nested;
    __syncthreads();

    float sums[M / 8][4] = {};
    for (u32 step = begin; step < end; ++step) {
        const u32 tile = (step - begin) % 2;
        u8* w = w_tiles + tile * W_BYTES;
        u8* y = y_tiles + tile * (M * Y_STRIDE);
        // The tile of two stages ago: all passed a barrier since they read it.
        loader.decode(w, chunk, table);
        chunk = next;
        next = loader.fetch(step + 2);
        copy_async_wait<0>();
        // This stage is there, and all are done with the one before.
        __syncthreads();
        if (step + 1 < end) loader.copy_dy(y_tiles + (1 - tile) * (M * Y_STRIDE), step + 1);
        copy_async_commit();
        multiply<M>(sums, w + w_row, y + y_row);
    }
    copy_async_wait<0>();
    output.write(sums, first_column, first_row);
}

// Two blocks must fit a processor's registers: without a bound the compiler stays below 64
// registers for some and spills, or goes beyond 128.
#define MATMUL_TRANSPOSED(rows)                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) fourbit_matmul_transposed_##rows( \
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
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
FOURBIT_EMULATE(fourbit_matmul_transposed_64)
#endif
#endif
