// y = x W^T + bias for a few rows of x, 1, 2 or 4 in one pass over the packed weight, on tensor
// cores from sm_80 on. bf16 and f16. What it does not take is for matvec.cu (float32, older cards,
// other k, x too large for shared memory) or matmul.cu (more rows).
//
// Parameters of fourbit_matvec_tensor_<rows>:
//   x              ELEMENT [m, k], the address a multiple of 16
//   packed         u8 [n k / 2], 4-bit codes of W [n, k], the first of two in the high bits; the
//                  address a multiple of 16
//   absmax         f32 [ceil(n k / BLOCK_SIZE)], or u8 codes with DOUBLE_QUANT
//   nested_absmax  f32 [ceil(blocks / 256)], null without DOUBLE_QUANT
//   nested_offset  f32 [1], null without DOUBLE_QUANT
//   bias           ELEMENT [n], or null
//   y              ELEMENT [m, n]
//   m, n, k        i64; k a positive multiple of 64, or of 32 where BLOCK_SIZE is 32; n rounded up
//                  to 16, times k, below 2^37
// Values are rounded to ELEMENT, as in matmul.cu; scales stay in single precision and multiply sums
// over 64 columns (32 where BLOCK_SIZE is 32). The order of a sum depends on k and the kernel
// alone.
//
// Launch: block 512; grid (min(ceil(n / 16), processors), ceil(m / rows)); dynamic shared memory
// 128 max(512, 256 + lines) + 1,024 + 2,048 rows bytes, where lines = 8 rows ceil(k / 512): 68,608
// for one row up to k = 16,384. All of x must fit: `matvec_tensor_takes` in src/gpu/matvec.rs.
//
// Floor: 0.5 bytes a weight for codes and 1 / BLOCK_SIZE or 4 / BLOCK_SIZE for scales, read once.
//
// How: a block has a multiprocessor to itself and takes tiles of 16 rows of W, cut into windows of
// 512 columns; each of its 16 warps takes every sixteenth window. A lane has 16 bytes of two rows
// of each quarter of a window (stretch) in registers and asks for the same of its next window as
// soon as it has looked them up. Of a warp, four lanes so read 64 bytes of a row together.
// W is the left operand (16 x 16), x the right (16 x 8), and the columns of W are so dealt out that
// a lane's bytes are its part of eight products, as in matmul.cu. Of the right operand's eight
// columns one row of x needs but one; so the others hold other columns of x, zeros where a lane is
// not of their group of 64: with one row, columns 2 s and 2 s + 1 are for the two groups of stretch
// s. A product with stretch s makes sums in all eight, of which those two are kept. So x is read
// once a window, and each lane needs four different scales a window and not the same as its
// neighbours. With four rows a right operand is one stretch. More rows, 8, would take 16 bytes of
// shared memory a column, 224 KiB at k = 14,336, and as many cycles to read as the table; matmul.cu
// splits k among blocks and so needs a part of x only.
// At the end of a round the sums of 16 windows meet in shared memory, where 16 threads a row of x
// add them in the order of the columns. There is one barrier a round.
//
// In flight: 16 warps x 4 KiB of codes = 64 KiB a processor at the start, before anything is
// computed, and 48 KiB while a warp works on a stretch; 3.35 TB/s at 700 ns on the 132 processors
// of an H100 are 17.8 KB, and 4.8 TB/s of an H200 25.5.
// Shared memory: a byte, two codes, takes one look into a table of pairs with a copy for each bank.
// An entry begins at a multiple of 256 bytes, so a look's offset is one byte moved (PRMT), without
// shift and mask; between the entries lies x. But for the nested codebook, no access has a bank
// conflict (a test computes it).
// A window's 8,192 codes take 128 looks, 16 cycles for x (32 and 64 for 2 and 4 rows), 4 for the
// nested codebook and 4 (8 and 12) shuffles: 54, 48 and 39 codes a cycle.
// Counted for BLOCK_SIZE 64, bf16 and double quantization, on the way from barrier to barrier of a
// window that is whole: a lane's 256 codes take
//   rows     1      2      4
//   sm_80   537    567    662   2.1, 2.2 and 2.6 a code
//   sm_90   529    564    651   2.1, 2.2 and 2.5
//   sm_100  635    681    724   2.5, 2.7 and 2.8: look-ups take an addition more
// of which 128 PRMT, 128 LDS and 32 HMMA. matvec.cu takes 5.0 a code for one row. At full memory
// speed an A100 (2.0 TB/s) can issue 4.9, an H100 4.6, an H200 3.2, a B200 2.3 and an RTX 4090 21;
// and their shared memory must give 26, 28, 40, 57 and 6 codes a cycle. So for one row neither
// holds an A100 or H100 (45 % of issue, half of shared memory), an H200 uses 65 % and 74 %, and a
// B200 is held by both; for four rows shared memory holds an H200 as well. None of this has been
// measured.
// What does hold is the start: launch, first latency, and the last round's sums may come to 1 to 2
// microseconds, where an H100 reads a weight of 4096 x 4096 in 2.6 and of 14336 x 4096 in 9. The
// table's fill, 256 cycles of shared memory and some 250 of issue, is under way together with the
// first codes; beside the 4,700 cycles that 2 tiles of k = 4096 (n = 4096 on an H100) take to come
// it would be 5 %, beside the 16,400 of 7 tiles (n = 14336) 2 %.
// Where tiles do not divide among processors, those that have more find more of the bandwidth at
// the end, and can use twice their share.
#include "product.cuh"

static_assert(CODE_BITS == 4, "two codes a byte");
static_assert(BLOCK_SIZE % 32 == 0, "a chunk has one scale");
static_assert(sizeof(ELEMENT) == 2, "tensor cores take 16 bits");

constexpr u32 WARPS = 16;
constexpr u32 THREADS = WARPS * WARP;
// Rows of W of a tile.
constexpr u32 TILE = 16;
// Columns of which a lane reads the codes at once; of the four lanes of a row; of what a warp takes
// at a time.
constexpr u32 CHUNK = 32;
constexpr u32 STRETCH = 4 * CHUNK;
constexpr u32 STRETCHES = 4;
constexpr u32 WINDOW = STRETCHES * STRETCH;
// Columns whose products are added before they are scaled, lanes that read them, and how many such
// groups a stretch has.
constexpr u32 GROUP = BLOCK_SIZE < 64 ? BLOCK_SIZE : 64;
constexpr u32 GROUP_LANES = GROUP / CHUNK;
constexpr u32 GROUPS = 4 / GROUP_LANES;

// Shared memory: 256 entries of a table, 32 words each, and between them lines of x, each as large
// as an entry; more lines of x; the nested codebook; sums of windows.
constexpr u32 LINE = 128;
constexpr u32 LINE_COLUMNS = LINE / sizeof(ELEMENT);
constexpr u32 LINE_PIECES = LINE / 16;
constexpr u32 ENTRIES = 256;
constexpr u32 NESTED_BYTES = 1024;

static __device__ const float CODEBOOK[16] = CODEBOOK_VALUES;

// Of line `line` of x, the offset.
__device__ __forceinline__ u32 place_of_line(u32 line) {
    return (line + min(line + 1, ENTRIES)) * LINE;
}

// Of a piece of 16 bytes of line `line` of row `row` of x, the offset in that line. Lanes that read
// together read piece i or i + 4 of lines and rows of which some are even and some odd.
__device__ __forceinline__ u32 place_of_piece(u32 piece, u32 row, u32 line) {
    return (piece ^ ((row ^ line) & 1)) * 16;
}

// Both values of every byte, the first in the lower half, once for each bank. A thread writes half
// of an entry, 16 bytes at a time, each of four neighbouring entries from another place on: what
// eight lanes write together lies in different banks.
// `value` is that of code threadIdx.x % 16.
__device__ __forceinline__ void fill_table(u8* table, float value) {
    static_assert(THREADS == 2 * ENTRIES, "a thread has half an entry");
    const u32 byte = threadIdx.x / 2, half = threadIdx.x % 2;
    const float first = __shfl_sync(ALL_LANES, value, int(byte >> 4));
    const float second = __shfl_sync(ALL_LANES, value, int(byte & 15));
    const u32 both = pack_pair<ELEMENT>(first, second);
    u8* entry = table + byte * 2 * LINE + half * (LINE / 2);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        *reinterpret_cast<Wide*>(entry + (i + byte) % 4 * 16) = {{both, both, both, both}};
    }
}

// Byte `which` of a word, looked up. `mine` is the offset of the lane's copy. That an entry begins
// at a multiple of 256 bytes makes its offset a matter of moving one byte.
__device__ __forceinline__ u32 look_up(const u8* table, u32 word, u32 which, u32 mine) {
    return *reinterpret_cast<const u32*>(table + __byte_perm(word, mine, 0x5504 | which << 4));
}

struct Problem {
    const ELEMENT* x;
    const u8* packed;
    Scales scales;
    const ELEMENT* bias;
    ELEMENT* y;
    i64 m;
    i64 n;
    i64 k;
};

// How the eight columns of a product's right operand are dealt out to M rows of x.
template <u32 M> struct Deal {
    // Rows of x of a product, and products for all of them.
    static constexpr u32 ROWS = M * GROUPS < 8 ? M : 8 / GROUPS;
    static constexpr u32 PRODUCTS = M / ROWS;
    // Groups that a right operand holds, and stretches that they make up.
    static constexpr u32 SLOTS = 8 / ROWS;
    static constexpr u32 SHARING = SLOTS / GROUPS;
    static constexpr u32 SETS = STRETCHES / SHARING;
    // Scales of a window that a lane fetches for a row of W: the four lanes of a row share them.
    static constexpr u32 SCALES = GROUPS * STRETCHES / 4;
    static_assert(M % ROWS == 0 && STRETCHES % SHARING == 0);
};

// A window of a tile.
struct Position {
    u32 tile;
    u32 window;
};

// The windows of a block's tiles, in their order: those of one tile, then those of the next.
struct Walk {
    u32 tiles;
    u32 windows;

    __device__ __forceinline__ bool there(Position at) const { return at.tile < tiles; }

    // The position `steps` after the beginning of a tile.
    __device__ __forceinline__ Position after(u32 tile, u32 steps) const {
        return {tile + steps / windows * gridDim.x, steps % windows};
    }

    // Further by a number of steps, given as what `after` says of it for tile 0.
    __device__ __forceinline__ Position further(Position at, Position steps) const {
        Position next{at.tile + steps.tile, at.window + steps.window};
        if (next.window >= windows) {
            next.window -= windows;
            next.tile += gridDim.x;
        }
        return next;
    }
};

// What a lane reads of a window: its chunks of rows lane / 4 and lane / 4 + 8 of the tile, and the
// scales of the sums that it will have. What does not exist takes the place of something that does.
// Chunks of the whole weight are counted with 32 bits.
template <u32 M> struct Source {
    using D = Deal<M>;

    const Wide* codes;
    u32 row_chunks[2];
    u32 first_chunk;
    u32 last_chunk;
    u32 t;

    // For lane 4 g + t.
    __device__ __forceinline__ Source(const Problem& problem, Position at, u32 g, u32 t) : t(t) {
        const u32 chunks = u32(problem.k / CHUNK), last_row = u32(problem.n - 1);
        codes = reinterpret_cast<const Wide*>(problem.packed);
        last_chunk = chunks - 1;
        first_chunk = at.window * (WINDOW / CHUNK);
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = min(at.tile * TILE + half * 8 + g, last_row);
            row_chunks[half] = row * chunks;
        }
    }

    // Both halves' codes of a stretch, if they are `wanted`.
    __device__ __forceinline__ void read(Wide (&wide)[2], u32 stretch, bool wanted) const {
        const u32 chunk = min(first_chunk + stretch * 4 + t, last_chunk);
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            load_once_if(wide[half], codes + (row_chunks[half] + chunk), wanted);
        }
    }

    // Scale i of this lane is that of this group of the window: where a lane's sums in columns 2 t
    // and 2 t + 1 belong to two groups, of those; else of every fourth.
    __device__ __forceinline__ static u32 group_of_scale(u32 t, u32 i) {
        return D::ROWS == 1 ? i / 2 * 8 + t * 2 + i % 2 : i * 4 + t;
    }

    __device__ __forceinline__ void read(Scales::Fetched (&fetched)[D::SCALES][2],
                                         const Scales& scales) const {
#pragma unroll
        for (u32 i = 0; i < D::SCALES; ++i) {
            const u32 chunk = min(first_chunk + group_of_scale(t, i) * GROUP_LANES, last_chunk);
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                const u32 block = (row_chunks[half] + chunk) / (BLOCK_SIZE / CHUNK);
                if (DOUBLE_QUANT) {
                    fetched[i][half].code = static_cast<const u8*>(scales.absmax)[block];
                    fetched[i][half].absmax = scales.nested_absmax[block / 256];
                } else {
                    fetched[i][half].absmax = static_cast<const f32*>(scales.absmax)[block];
                }
            }
        }
    }
};

// The group of a window that a lane's sums in column 2 t + i belong to.
template <u32 M> __device__ __forceinline__ u32 group_of_sum(u32 t, u32 set, u32 i) {
    return set * Deal<M>::SLOTS + (t * 2 + i) / Deal<M>::ROWS;
}

// Its scale, which this lane or another of the four of a row has.
template <u32 M>
__device__ __forceinline__ float scale_of_sum(const float (&scales)[Deal<M>::SCALES][2], u32 t,
                                              u32 set, u32 half, u32 i) {
    using D = Deal<M>;
    if (D::ROWS == 1) return scales[set * 2 + i][half];
    if (D::SLOTS == 4) return scales[set][half];
    static_assert(D::ROWS == 1 || D::SLOTS == 4 || D::SLOTS == 2);
    const u32 owner = group_of_sum<M>(t, set, i) % 4;
    return __shfl_sync(ALL_LANES, scales[set / 2][half], int(threadIdx.x % WARP - t + owner));
}

template <u32 M> __device__ __forceinline__ void matvec_tensor(Problem problem) {
    using D = Deal<M>;
    u8* const table = dynamic_shared();
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const u32 g = computed(lane / 4), t = computed(lane % 4);
    const u32 windows = u32((problem.k + WINDOW - 1) / WINDOW);
    const u32 row_lines = windows * (WINDOW / LINE_COLUMNS);
    float* const nested =
        reinterpret_cast<float*>(table + max(2 * ENTRIES, ENTRIES + M * row_lines) * LINE);
    // Twice [windows of a round, M, TILE].
    float* const partial = nested + NESTED_BYTES / 4;

    const Walk walk{u32((problem.n + TILE - 1) / TILE), windows};
    const Position round_steps = walk.after(0, WARPS);
    Position at = walk.after(blockIdx.x, warp);
    Wide codes[STRETCHES][2] = {};
    Scales::Fetched fetched[D::SCALES][2] = {};
    if (walk.there(at)) {
        const Source<M> source(problem, at, g, t);
#pragma unroll
        for (u32 stretch = 0; stretch < STRETCHES; ++stretch) {
            source.read(codes[stretch], stretch, true);
        }
        source.read(fetched, problem.scales);
    }
    // All else while those are on their way.
    const float value = CODEBOOK[threadIdx.x % 16], nested_value = NESTED_TABLE[threadIdx.x % 256];
    const i64 first_x = i64(blockIdx.y) * M;
    const u32 rows = u32(min(i64(M), problem.m - first_x));
    problem.x += first_x * problem.k;
    problem.y += first_x * problem.n;
    const u32 row_pieces = u32(problem.k / 8);
    for (u32 row = 0; row < rows; ++row) {
        for (u32 i = threadIdx.x; i < row_pieces; i += THREADS) {
            const u32 line = i / LINE_PIECES;
            u8* to = table + place_of_line(row * row_lines + line) +
                     place_of_piece(i % LINE_PIECES, row, line);
            copy_async_16(to, problem.x + row * problem.k + i * 8, 16);
        }
    }
    copy_async_commit();
    const float offset = problem.scales.offset();
    fill_table(table, value);
    if (DOUBLE_QUANT && threadIdx.x < 256) nested[threadIdx.x] = nested_value;
    copy_async_wait<0>();
    __syncthreads();

    // Lane 4 g + t has column g of the right operand: of row `x_row` and of group `slot`, if t is
    // one of that group's lanes, else zeros.
    const u32 x_row = g % D::ROWS, slot = g / D::ROWS;
    const bool in_group = t / GROUP_LANES == slot % GROUPS;
    // Its first line, and of its first piece in that line the place: a stretch is two lines, a row
    // an even number of them, and four lanes have half a line each.
    const u32 x_line = computed(x_row * row_lines + slot / GROUPS * 2 + t / 2);
    const u32 x_place = computed(place_of_piece(t % 2 * 4, x_row, t / 2));
    Wide right[D::PRODUCTS][4] = {};
    // Of a right operand's stretches, that whose sums stand in this lane's columns. There those of
    // the others stand for nothing.
    const u32 owned = t * 2 / D::ROWS / GROUPS;
    const u32 mine = computed(lane * 4);

    Position round = walk.after(blockIdx.x, 0);
    float total = 0.0f;
    for (u32 buffer = 0; walk.there(round); buffer ^= 1) {
        if (walk.there(at)) {
            float scales[D::SCALES][2];
#pragma unroll
            for (u32 i = 0; i < D::SCALES; ++i) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const auto& [code, absmax] = fetched[i][half];
                    scales[i][half] =
                        DOUBLE_QUANT ? decode_scale(nested[code], absmax, offset) : absmax;
                }
            }
            const Position next = walk.further(at, round_steps);
            const bool more = walk.there(next);
            const Source<M> source(problem, more ? next : at, g, t);
            source.read(fetched, problem.scales);
            const u32 chunks_left = u32(problem.k / CHUNK) - at.window * (WINDOW / CHUNK);

            // Of what lies behind the last column, there is nothing to use before the next is read.
            if (chunks_left < WINDOW / CHUNK) {
#pragma unroll
                for (u32 stretch = 1; stretch < STRETCHES; ++stretch) {
                    source.read(codes[stretch], stretch, more && chunks_left <= stretch * 4);
                }
            }
            float sums[D::PRODUCTS][4] = {};
#pragma unroll
            for (u32 set = 0; set < D::SETS; ++set) {
                const auto read_x = [&](u32 i) {
#pragma unroll
                    for (u32 product = 0; product < D::PRODUCTS; ++product) {
                        const u32 line = x_line + product * D::ROWS * row_lines +
                                         (at.window * STRETCHES + set * D::SHARING) * 2;
                        const u8* from = table + place_of_line(line) + (x_place ^ i * 16);
                        if (D::SHARING == 1) right[product][i] = Wide{};
                        if (in_group) right[product][i] = *reinterpret_cast<const Wide*>(from);
                    }
                };
                if (D::SHARING > 1) {
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) read_x(i);
                }
                float parts[D::PRODUCTS][4] = {};
#pragma unroll
                for (u32 shared = 0; shared < D::SHARING; ++shared) {
                    const u32 stretch = set * D::SHARING + shared;
                    // Without a branch, the compiler would put off all reads to the window's end.
                    if (chunks_left > stretch * 4) {
                        float products[D::PRODUCTS][4] = {};
#pragma unroll
                        for (u32 step = 0; step < 8; ++step) {
                            const u32 upper = codes[stretch][0].words[step / 2];
                            const u32 lower = codes[stretch][1].words[step / 2];
                            const u32 byte = step % 2 * 2;
                            if (D::SHARING == 1 && byte == 0) read_x(step / 2);
                            const u32 left[4] = {look_up(table, upper, byte, mine),
                                                 look_up(table, lower, byte, mine),
                                                 look_up(table, upper, byte + 1, mine),
                                                 look_up(table, lower, byte + 1, mine)};
#pragma unroll
                            for (u32 product = 0; product < D::PRODUCTS; ++product) {
                                const u32* x = &right[product][step / 2].words[byte];
                                mma_16x8x16<ELEMENT>(products[product], left, {x[0], x[1]});
                            }
                        }
#pragma unroll
                        for (u32 product = 0; product < D::PRODUCTS; ++product) {
#pragma unroll
                            for (u32 i = 0; i < 4; ++i) {
                                const bool owner = shared == 0 || owned == shared;
                                if (owner) parts[product][i] = products[product][i];
                            }
                        }
                        source.read(codes[stretch], stretch, more);
                    }
                }
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    bool there = false;
                    float scale = 0.0f;
#pragma unroll
                    for (u32 i = 0; i < 2; ++i) {
                        if (i == 0 || D::ROWS == 1) {  // else both columns are of one group
                            // Groups that are not there have sums of anything.
                            there = group_of_sum<M>(t, set, i) * GROUP_LANES < chunks_left;
                            scale = scale_of_sum<M>(scales, t, set, half, i);
                        }
#pragma unroll
                        for (u32 product = 0; product < D::PRODUCTS; ++product) {
                            float& sum = sums[product][2 * half + i];
                            sum = there ? sum + scale * parts[product][2 * half + i] : sum;
                        }
                    }
                }
            }
#pragma unroll
            for (u32 product = 0; product < D::PRODUCTS; ++product) {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    float pair[2] = {sums[product][2 * half], sums[product][2 * half + 1]};
                    if (D::ROWS == 1) pair[0] += pair[1];
#pragma unroll
                    for (u32 i = 0; i < (D::ROWS == 1 ? 1 : 2); ++i) {
                        // Columns of the same row of x: D::ROWS apart, two a lane.
#pragma unroll
                        for (int apart = D::ROWS > 2 ? D::ROWS / 2 : 1; apart < 4; apart *= 2) {
                            pair[i] += __shfl_xor_sync(ALL_LANES, pair[i], apart);
                        }
                        const u32 row = product * D::ROWS + t * 2 + i;
                        if (t * 2 < D::ROWS) {
                            partial[((buffer * WARPS + warp) * M + row) * TILE + half * 8 + g] =
                                pair[i];
                        }
                    }
                }
            }
            at = next;
        }
        // After this, all of a round's sums are there, and none of the round before is still read.
        __syncthreads();
        if (threadIdx.x < M * TILE) {
            const float* parts = partial + buffer * WARPS * M * TILE + threadIdx.x;
            Position done = round;
            for (u32 left = WARPS; left && walk.there(done);) {
                const u32 count = min(left, windows - done.window);
#pragma unroll 4
                for (u32 i = 0; i < count; ++i) total += parts[i * M * TILE];
                parts += count * M * TILE;
                left -= count;
                done.window += count;
                if (done.window < windows) break;
                const i64 column = i64(done.tile) * TILE + threadIdx.x % TILE;
                const u32 row = threadIdx.x / TILE;
                if (column < problem.n && row < rows) {
                    if (problem.bias) total += to_float(problem.bias[column]);
                    problem.y[row * problem.n + column] = from_float<ELEMENT>(total);
                }
                total = 0.0f;
                done = {done.tile + gridDim.x, 0};
            }
        }
        round = walk.further(round, round_steps);
    }
}

#define MATVEC_TENSOR(rows)                                                                    \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) fourbit_matvec_tensor_##rows(     \
        const ELEMENT* x, const u8* packed, const void* absmax, const f32* nested_absmax,      \
        const f32* nested_offset, const ELEMENT* bias, ELEMENT* y, i64 m, i64 n, i64 k) {      \
        matvec_tensor<rows>(                                                                   \
            {x, packed, {absmax, nested_absmax, nested_offset}, bias, y, m, n, k});            \
    }

MATVEC_TENSOR(1)
MATVEC_TENSOR(2)
MATVEC_TENSOR(4)

#ifdef FOURBIT_EMULATED
FOURBIT_EMULATE(fourbit_matvec_tensor_1)
FOURBIT_EMULATE(fourbit_matvec_tensor_2)
FOURBIT_EMULATE(fourbit_matvec_tensor_4)
#endif
