// y = x W^T + bias for a few rows of x: 1, 2, 4 or 8 in one pass over the packed weight, more in
// several. For every dtype, N and K; from sm_80 on, matvec_tensor.cu is for what it takes of bf16
// and f16, and the tensor cores' product (matmul.cu) for more rows.
//
// Parameters of fourbit_matvec_<rows>:
//   x              ELEMENT [m, k]
//   packed         u8 [ceil(n k / 2)], 4-bit codes of W [n, k], the first of two in the high bits;
//                  the address a multiple of 16
//   absmax         f32 [ceil(n k / BLOCK_SIZE)], or u8 codes with DOUBLE_QUANT
//   nested_absmax  f32 [ceil(blocks / 256)], null without DOUBLE_QUANT
//   nested_offset  f32 [1], null without DOUBLE_QUANT
//   bias           ELEMENT [n], or null
//   y              ELEMENT [m, n]
//   m, n, k        i64
// Values and scales are in single precision, as are the sums; the result is rounded once. The order
// of a sum depends on k and the kernel alone.
//
// Launch: block 256; grid (ceil(n / 16), ceil(m / rows)); dynamic shared memory 32 KiB of table and
// at most 32 KiB of x: rows x 1024 x sizeof(ELEMENT) bytes for every 1024 columns or part of them.
//
// Floor: 0.5 bytes a weight for codes and 1 / BLOCK_SIZE (with DOUBLE_QUANT) or 4 / BLOCK_SIZE
// bytes for scales, read once. Rows m 1 to 8 share that one pass.
// Why it should be reached: a warp has two rows of W; a lane reads 16 bytes, 32 codes, of each and
// asks for the next before it uses them, so a block has 8 KiB under way beside the 8 that it works
// on, and three blocks of an H100 processor 24 KiB of the former, where 18 are needed. The first
// are asked for before the table is filled and x is read, which a lane does by four reads at once.
// Two codes, a byte, take one look into a table of pairs in shared memory, which stands there 16
// times, once for each bank pair: no look meets another's bank. x lies in shared memory in the
// order in which lanes read it, moved so that neither reads nor the writes of whole granules have
// conflicts (a test computes it).
// Counted for bf16, one row, double quantization: a lane's 64 codes take 300 instructions on sm_80
// and 317 on sm_90, of which 66 multiply-adds, 40 shared reads and 65 shifts and masks for
// addresses: 4.7 and 5.0 a code. A warp's 2048 codes so take 75 and 79 cycles of issue and 80 of
// shared memory, and the memory 73 cycles of an H100, 79 of an A100, 51 of an H200 (4.8 TB/s) and
// 340 of an RTX 4090. On an A100 and an H100 all three come out near each other, and at best nine
// tenths of the memory's speed is left; besides, where k is 4096 a block's start, table and x, has
// some 240 instructions a thread beside the 1,270 of its loop. More rows add to the
// instructions: 693 (sm_90 712) for 4 and 1203 (1237) for 8, of which 512 multiply-adds; these bind
// on the large cards, at two fifths and a quarter of the memory's speed. An RTX 4090 has room for
// 21 instructions a code.
//
// Where k is no multiple of 32, rows of W begin anywhere in the stream of codes. Codes are then
// read by the same aligned 16 bytes, of which lanes leave out what is another row's.
#include "product.cuh"

static_assert(CODE_BITS == 4, "two codes a byte");
static_assert(BLOCK_SIZE % 32 == 0, "a chunk has one scale");

constexpr u32 WARPS = 8;
constexpr u32 THREADS = WARPS * WARP;
// Rows of W of a warp.
constexpr u32 ROWS = 2;
// Codes that a lane, and a warp, take at a time.
constexpr u32 CHUNK = 32;
constexpr u32 WINDOW = CHUNK * WARP;
// Numbers of x that are read together.
constexpr u32 GRANULE = 4;
constexpr u32 GRANULES = CHUNK / GRANULE;
constexpr u32 TABLE_COPIES = 16;
constexpr u32 TABLE_BYTES = 256 * TABLE_COPIES * 8;
constexpr u32 X_BYTES = 32768;

struct alignas(8) ValuePair {
    float first;
    float second;
};

// The value of a code. The compiler makes this a choice among constants, without a look into memory
// that a block would wait for as it begins.
__device__ __forceinline__ float value_of_code(u32 code) {
    constexpr float VALUES[1 << CODE_BITS] = CODEBOOK_VALUES;
    return VALUES[code];
}

// The values of both codes of every byte; copy c of byte b is number 16 b + c. A thread writes one
// byte's copies, two at a time, each thread of eight beginning with another pair of copies: the
// 16 bytes that eight lanes write together lie in different banks.
__device__ __forceinline__ void fill_table(ValuePair* table) {
    static_assert(THREADS == 256, "a thread has a byte");
    const u32 byte = threadIdx.x;
    const float value = value_of_code(byte & 15);
    const ValuePair both{__shfl_sync(ALL_LANES, value, int(byte >> 4)), value};
    auto* pairs = reinterpret_cast<Pack<ValuePair, 2>*>(table + byte * TABLE_COPIES);
#pragma unroll
    for (u32 i = 0; i < TABLE_COPIES / 2; ++i) {
        pairs[(i + byte) % (TABLE_COPIES / 2)] = {both, both};
    }
}

// Byte `which` of a word, looked up. `mine` is the offset of the lane's copy.
__device__ __forceinline__ ValuePair look_up(const u8* table, u32 word, u32 which, u32 mine) {
    const u32 shifted = which == 0 ? word << 7 : word >> (8 * which - 7);
    return *reinterpret_cast<const ValuePair*>(table + ((shifted & 0x7f80u) | mine));
}

// Some columns of some rows of x, in shared memory. Of a window of 1024 columns, lane l reads
// columns 32 l to 32 l + 31, four at a time: granule j of all lanes lies together.
template <u32 M> struct Columns {
    static constexpr u32 COUNT = X_BYTES / (M * sizeof(ELEMENT));
    static_assert(COUNT % WINDOW == 0, "whole windows");
    static constexpr u32 WINDOW_GRANULES = WINDOW / GRANULE;
    // Granules that a thread reads before it writes them.
    static constexpr u32 AT_ONCE = 4;

    using Granule = Pack<ELEMENT, GRANULE>;
    Granule* granules;

    // Of granule j of lane l, within those of all lanes. Threads that follow each other bring one
    // lane's granules 0 to 7: were l their place, those would lie in the same bank. As it is, 128
    // bytes that are written together lie in all banks, and so do 128 that are read.
    __device__ __forceinline__ static u32 swizzled(u32 lane, u32 j) {
        return lane ^ (16 / u32(sizeof(Granule)) * j);
    }

    __device__ __forceinline__ static u32 place(u32 row, u32 granule) {
        const u32 in_window = granule % WINDOW_GRANULES;
        const u32 j = in_window % GRANULES, lane = in_window / GRANULES;
        return (granule / WINDOW_GRANULES * M + row) * WINDOW_GRANULES + j * WARP +
               swizzled(lane, j);
    }

    // Rows from `first_row` on and columns from `first` on; zeros beyond the ends.
    __device__ __forceinline__ void fill(const ELEMENT* x, i64 m, i64 k, i64 first_row, i64 first) {
        const u32 used = u32(min(i64(COUNT), k - first));
        const u32 count = (used + WINDOW - 1) / WINDOW * WINDOW_GRANULES;
        const bool wide = k % GRANULE == 0 && reinterpret_cast<u64>(x) % sizeof(Granule) == 0;
#pragma unroll 1
        for (u32 row = 0; row < M; ++row) {
            const bool there = first_row + row < m;
            const ELEMENT* source = x + (first_row + row) * k + first;
            if (there && wide) {
#pragma unroll 1
                for (u32 i = threadIdx.x; i < count; i += AT_ONCE * THREADS) {
                    Granule read[AT_ONCE] = {};
#pragma unroll
                    for (u32 a = 0; a < AT_ONCE; ++a) {
                        const u32 start = (i + a * THREADS) * GRANULE;
                        if (start < used) {
                            read[a] = *reinterpret_cast<const Granule*>(source + start);
                        }
                    }
#pragma unroll
                    for (u32 a = 0; a < AT_ONCE; ++a) {
                        const u32 granule = i + a * THREADS;
                        if (granule < count) granules[place(row, granule)] = read[a];
                    }
                }
            } else {
#pragma unroll 1
                for (u32 i = threadIdx.x; i < count; i += THREADS) {
                    Granule granule{};
#pragma unroll
                    for (u32 e = 0; e < GRANULE; ++e) {
                        const u32 column = i * GRANULE + e;
                        if (there && column < used) granule.elements[e] = source[column];
                    }
                    granules[place(row, i)] = granule;
                }
            }
        }
    }

    __device__ __forceinline__ Granule granule(u32 row, u32 window, u32 lane, u32 j) const {
        return granules[(window * M + row) * WINDOW_GRANULES + j * WARP + swizzled(lane, j)];
    }

    __device__ __forceinline__ float number(u32 row, u32 column) const {
        const Granule& g = granules[place(row, column / GRANULE)];
        return to_float(g.elements[column % GRANULE]);
    }
};

struct Weight {
    const u8* packed;
    Scales scales;
    i64 n;
    i64 k;

    // Chunk `chunk` of the stream of codes, without what lies behind its end.
    __device__ __forceinline__ Wide read(i64 chunk) const {
        const i64 bytes = (n * k + 1) / 2;
        if (chunk * 16 + 16 <= bytes) {
            return load_once(reinterpret_cast<const Wide*>(packed) + chunk);
        }
        Wide wide{};
#pragma unroll
        for (u32 i = 0; i < 16; ++i) {
            if (chunk * 16 + i < bytes) {
                wide.words[i / 4] |= u32(packed[chunk * 16 + i]) << i % 4 * 8;
            }
        }
        return wide;
    }
};

// A lane's chunks of its warp's rows, and their scales.
struct Chunks {
    Wide codes[ROWS];
    Scales::Fetched scales[ROWS];
};

// k is a multiple of 32: rows of W begin with a chunk.
template <u32 M>
__device__ __forceinline__ void sum_aligned(float (&sums)[ROWS][M], const Weight& weight,
                                            const ELEMENT* x, i64 m, i64 first_x, i64 first_row,
                                            u8* table, Columns<M> columns) {
    const u32 lane = threadIdx.x % WARP;
    const u32 mine = lane % TABLE_COPIES * sizeof(ValuePair);
    const float offset = weight.scales.offset();
    const u32 row_chunks = u32(weight.k / CHUNK);
    const Wide* codes[ROWS];
    RowScales scales[ROWS];
    bool there[ROWS];
#pragma unroll
    for (u32 row = 0; row < ROWS; ++row) {
        const u64 first_chunk = u64(first_row + row) * row_chunks;
        codes[row] = reinterpret_cast<const Wide*>(weight.packed) + first_chunk;
        scales[row] = RowScales(weight.scales, first_chunk);
        there[row] = first_row + row < weight.n;
    }
    const auto fetch = [&](u32 chunk) {
        Chunks chunks{};
#pragma unroll
        for (u32 row = 0; row < ROWS; ++row) {
            if (chunk < row_chunks && there[row]) {
                chunks.codes[row] = load_once(codes[row] + chunk);
                chunks.scales[row] = scales[row].fetch(chunk);
            }
        }
        return chunks;
    };
    u32 chunk = lane;
    Chunks next = fetch(chunk);
    // While those are on their way.
    fill_table(reinterpret_cast<ValuePair*>(table));
    for (i64 begin = 0; begin < weight.k; begin += Columns<M>::COUNT) {
        if (begin) __syncthreads();
        columns.fill(x, m, weight.k, first_x, begin);
        __syncthreads();
        const u32 used = u32(min(i64(Columns<M>::COUNT), weight.k - begin));
        for (u32 window = 0; window * WINDOW < used; ++window) {
            const Chunks chunks = next;
            const bool inside = chunk < row_chunks;
            chunk += WARP;
            next = fetch(chunk);
            float parts[ROWS][M] = {};
#pragma unroll
            for (u32 j = 0; j < GRANULES; ++j) {
                float values[ROWS][GRANULE];
#pragma unroll
                for (u32 row = 0; row < ROWS; ++row) {
#pragma unroll
                    for (u32 pair = 0; pair < GRANULE / 2; ++pair) {
                        const u32 byte = j * (GRANULE / 2) + pair;
                        const ValuePair both =
                            look_up(table, chunks.codes[row].words[byte / 4], byte % 4, mine);
                        values[row][2 * pair] = both.first;
                        values[row][2 * pair + 1] = both.second;
                    }
                }
#pragma unroll
                for (u32 i = 0; i < M; ++i) {
                    const auto granule = columns.granule(i, window, lane, j);
#pragma unroll
                    for (u32 e = 0; e < GRANULE; ++e) {
                        const float number = to_float(granule.elements[e]);
#pragma unroll
                        for (u32 row = 0; row < ROWS; ++row) {
                            parts[row][i] += values[row][e] * number;
                        }
                    }
                }
            }
#pragma unroll
            for (u32 row = 0; row < ROWS; ++row) {
                const float scale = weight.scales.decode(chunks.scales[row], offset);
                // The values of codes that are not there might be NaN.
#pragma unroll
                for (u32 i = 0; i < M; ++i) {
                    sums[row][i] = inside ? sums[row][i] + scale * parts[row][i] : sums[row][i];
                }
            }
        }
    }
}

// Any k.
template <u32 M>
__device__ __forceinline__ void sum_any(float (&sums)[ROWS][M], const Weight& weight,
                                        const ELEMENT* x, i64 m, i64 first_x, i64 first_row,
                                        u8* table, Columns<M> columns) {
    const u32 lane = threadIdx.x % WARP;
    const u32 mine = lane % TABLE_COPIES * sizeof(ValuePair);
    const float offset = weight.scales.offset();
    fill_table(reinterpret_cast<ValuePair*>(table));
    for (i64 begin = 0; begin < weight.k; begin += Columns<M>::COUNT) {
        if (begin) __syncthreads();
        columns.fill(x, m, weight.k, first_x, begin);
        __syncthreads();
        const i64 used = min(i64(Columns<M>::COUNT), weight.k - begin);
#pragma unroll
        for (u32 row = 0; row < ROWS; ++row) {
            if (first_row + row >= weight.n) break;
            // Codes of this row and these columns, in the stream.
            const i64 start = (first_row + row) * weight.k + begin;
            for (i64 chunk = start / CHUNK + lane; chunk * CHUNK < start + used; chunk += WARP) {
                const Wide codes = weight.read(chunk);
                const auto fetched = weight.scales.fetch(chunk * CHUNK / BLOCK_SIZE);
                const float scale = weight.scales.decode(fetched, offset);
                const i64 first_column = chunk * CHUNK - start;
                float parts[M] = {};
                // Unrolled, this path would take more instructions than all others together.
#pragma unroll 1
                for (u32 w = 0; w < 4; ++w) {
                    const u32 word = w == 0   ? codes.words[0]
                                     : w == 1 ? codes.words[1]
                                     : w == 2 ? codes.words[2]
                                              : codes.words[3];
#pragma unroll
                    for (u32 byte = 0; byte < 4; ++byte) {
                        const ValuePair both = look_up(table, word, byte, mine);
                        const float values[2] = {both.first, both.second};
#pragma unroll
                        for (u32 e = 0; e < 2; ++e) {
                            const i64 column = first_column + 8 * w + 2 * byte + e;
                            if (column < 0 || column >= used) continue;
#pragma unroll
                            for (u32 i = 0; i < M; ++i) {
                                parts[i] += values[e] * columns.number(i, u32(column));
                            }
                        }
                    }
                }
#pragma unroll
                for (u32 i = 0; i < M; ++i) sums[row][i] += scale * parts[i];
            }
        }
    }
}

template <u32 M>
__device__ __forceinline__ void matvec(const ELEMENT* x, const Weight& weight, const ELEMENT* bias,
                                       ELEMENT* y, i64 m) {
    u8* table = dynamic_shared();
    const Columns<M> columns{reinterpret_cast<typename Columns<M>::Granule*>(table + TABLE_BYTES)};
    const u32 lane = threadIdx.x % WARP;
    const i64 first_row = (i64(blockIdx.x) * WARPS + threadIdx.x / WARP) * ROWS;
    const i64 first_x = i64(blockIdx.y) * M;
    float sums[ROWS][M] = {};
    if (weight.k % CHUNK == 0) {
        sum_aligned<M>(sums, weight, x, m, first_x, first_row, table, columns);
    } else {
        sum_any<M>(sums, weight, x, m, first_x, first_row, table, columns);
    }
#pragma unroll
    for (u32 row = 0; row < ROWS; ++row) {
#pragma unroll
        for (u32 i = 0; i < M; ++i) {
            float sum = sums[row][i];
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) {
                sum += __shfl_xor_sync(ALL_LANES, sum, distance);
            }
            const i64 column = first_row + row;
            if (lane == row * M + i && column < weight.n && first_x + i < m) {
                if (bias) sum += to_float(bias[column]);
                y[(first_x + i) * weight.n + column] = from_float<ELEMENT>(sum);
            }
        }
    }
}

// So many blocks fit a processor's shared memory, and must fit its registers.
#define MATVEC(rows)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, rows < 4 ? 3 : 2)                \
        fourbit_matvec_##rows(                                                                 \
        const ELEMENT* x, const u8* packed, const void* absmax, const f32* nested_absmax,      \
        const f32* nested_offset, const ELEMENT* bias, ELEMENT* y, i64 m, i64 n, i64 k) {      \
        matvec<rows>(x, {packed, {absmax, nested_absmax, nested_offset}, n, k}, bias, y, m);   \
    }

MATVEC(1)
MATVEC(2)
MATVEC(4)
MATVEC(8)

#ifdef FOURBIT_EMULATED
FOURBIT_EMULATE(fourbit_matvec_1)
FOURBIT_EMULATE(fourbit_matvec_2)
FOURBIT_EMULATE(fourbit_matvec_4)
FOURBIT_EMULATE(fourbit_matvec_8)
#endif
