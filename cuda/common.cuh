// What all kernels share: fixed-width types, conversions, wide memory accesses, warp-wide
// operations and the handful of PTX instructions that have no C++ form.
//
// No toolkit header is included, because NVRTC's package ships none. Everything that is not plain
// C++ is in the last section, once in PTX and once, for the tests that run kernels on a CPU, as
// calls into tests/kernels/emulator.h, which defines FOURBIT_EMULATED.
//
// What the kernels' files set their counts against, from the makers' data sheets (a processor is a
// streaming multiprocessor; nothing of it was measured):
//   card             memory, TB/s   processors   GHz     bytes a cycle and processor
//   H100 SXM         3.35           132          1.755   14.5
//   A100 80 GB SXM   2.04           108          1.41    13.4
//   RTX 4090         1.01           128          2.52     3.1
// In a cycle a processor issues 4 instructions, each of a warp, and its shared memory serves 128
// bytes: accesses of 4, 8 and 16 bytes by all lanes take 1, 2 and 4 cycles. To keep the memory
// of an H100 busy for the 700 ns until an answer comes, a processor must have 18 KiB under way.
// Instructions are counted in the machine code of NVRTC 13.2, on the path of whole tiles.
// Registers stand in RESOURCES.md.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;
static_assert(sizeof(u16) == 2 && sizeof(u32) == 4 && sizeof(u64) == 8, "fixed widths");

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// --- element types ------------------------------------------------------------------------------

// The numbers of a tensor as they lie in memory; arithmetic is in float.
struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};
using f32 = float;

__device__ __forceinline__ float bits_to_float(u32 bits);
__device__ __forceinline__ u32 float_to_bits(float number);
__device__ __forceinline__ float half_to_float(u16 bits);
__device__ __forceinline__ u16 float_to_half(float number);

__device__ __forceinline__ float to_float(f32 number) { return number; }
__device__ __forceinline__ float to_float(bf16 number) {
    return bits_to_float(u32(number.bits) << 16);
}
__device__ __forceinline__ float to_float(f16 number) { return half_to_float(number.bits); }

// Rounds to nearest even; a NaN stays one. Integer arithmetic, so that every card and the CPU give
// the same bits; the instruction of sm_80 and later would give another NaN.
__device__ __forceinline__ u16 float_to_bf16_bits(float number) {
    const u32 bits = float_to_bits(number);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return u16((bits >> 16) | 0x0040u);
    return u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T> __device__ __forceinline__ T from_float(float number);
template <> __device__ __forceinline__ f32 from_float<f32>(float number) { return number; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float number) {
    return bf16{float_to_bf16_bits(number)};
}
template <> __device__ __forceinline__ f16 from_float<f16>(float number) {
    return f16{float_to_half(number)};
}

// The two numbers of a word of bf16 or f16, the lower half first.
template <class T> __device__ __forceinline__ void unpack_pair(u32 word, float& low, float& high) {
    low = to_float(T{u16(word)});
    high = to_float(T{u16(word >> 16)});
}
template <>
__device__ __forceinline__ void unpack_pair<bf16>(u32 word, float& low, float& high) {
    low = bits_to_float(word << 16);
    high = bits_to_float(word & 0xffff0000u);
}

// --- memory -------------------------------------------------------------------------------------

// Sixteen bytes, the widest access of a thread.
struct alignas(16) Wide {
    u32 words[4];
};

// N elements that are moved at once. N * sizeof(T) is 1, 2, 4, 8 or 16 bytes or a multiple of 16.
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T elements[N];
};

// --- blockwise quantization ---------------------------------------------------------------------

// What the elements of a block are first multiplied by, exactly, where the reciprocal of its scale
// would overflow: below 2^-128.
constexpr float SUBNORMAL_LIFT = 0x1p64f;
constexpr float LARGEST_FLOAT = 0x1.fffffep127f;
constexpr u32 INFINITY_BITS = 0x7f800000u;

// The bits of a magnitude: in the order of magnitudes, with infinity and then the NaNs above all.
__device__ __forceinline__ u32 magnitude_bits(float number) {
    return float_to_bits(number) & 0x7fffffffu;
}

// What `normalise` takes for a scale of at least 0: its reciprocal; 0 for 0; with a minus sign, the
// reciprocal of scale * SUBNORMAL_LIFT.
__device__ __forceinline__ float inverse_of_scale(float scale) {
    if (scale == 0.0f) return 0.0f;
    const float inverse = __frcp_rn(scale);
    if (inverse <= LARGEST_FLOAT) return inverse;
    return -__frcp_rn(scale * SUBNORMAL_LIFT);
}

__device__ __forceinline__ float normalise(float element, float inverse) {
    return inverse < 0.0f ? element * SUBNORMAL_LIFT * -inverse : element * inverse;
}

// A block scale from its value in the nested codebook, each operation rounded, whatever the
// compiler may fuse elsewhere.
__device__ __forceinline__ float decode_scale(float value, float nested_absmax, float offset) {
    return __fadd_rn(__fmul_rn(value, nested_absmax), offset);
}

// Midpoints as a search tree in heap order: the root is node 1, the children of n are 2 n and
// 2 n + 1. This is the index of a node's midpoint among the ascending 2^LEVELS - 1; where the
// codebook has fewer, infinity takes its place. Node n lies in bank n % 32, so the first six levels
// are free of bank conflicts whatever the lanes look for.
template <u32 LEVELS> __device__ __forceinline__ u32 index_of_node(u32 node) {
    u32 next = 2 * node + 1;
    while (next < 1u << LEVELS) next *= 2;
    return next - (1u << LEVELS) - 1;
}

// For each number, how many midpoints are below it (BELOW), or not above it. The searches go down
// level by level together, so that their accesses overlap.
template <u32 LEVELS, bool BELOW, u32 COUNT>
__device__ __forceinline__ void search_tree(const float* tree, const float (&numbers)[COUNT],
                                            u32 (&ranks)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) ranks[i] = 1;
#pragma unroll
    for (u32 level = 0; level < LEVELS; ++level) {
        float midpoints[COUNT];
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) midpoints[i] = tree[ranks[i]];
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            const bool right = BELOW ? midpoints[i] < numbers[i] : midpoints[i] <= numbers[i];
            ranks[i] = 2 * ranks[i] + u32(right);
        }
    }
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) ranks[i] -= 1u << LEVELS;
}

// The same number, as one that the compiler knows nothing about: it is kept in a register, not
// computed anew or merged into other computations at every use. All lanes of a warp take part.
__device__ __forceinline__ u32 computed(u32 number) {
    return __shfl_sync(ALL_LANES, number, int(threadIdx.x % WARP));
}

// --- what is not plain C++ ----------------------------------------------------------------------

#ifdef FOURBIT_EMULATED

__device__ __forceinline__ float bits_to_float(u32 bits) { return emulator::bits_to_float(bits); }
__device__ __forceinline__ u32 float_to_bits(float number) {
    return emulator::float_to_bits(number);
}
__device__ __forceinline__ float half_to_float(u16 bits) { return emulator::half_to_float(bits); }
__device__ __forceinline__ u16 float_to_half(float number) {
    return emulator::float_to_half(number);
}
__device__ __forceinline__ Wide load_once(const Wide* source) {
    emulator::check_aligned(source, 16);
    return *source;
}
// Blocks run one after the other.
__device__ __forceinline__ u32 count_released(u32* counter) { return (*counter)++; }
__device__ __forceinline__ Pack<float, 4> load_shared_by_blocks(const Pack<float, 4>* source) {
    emulator::check_aligned(source, 16);
    return *source;
}
__device__ __forceinline__ void load_once_if(Wide& value, const Wide* source, bool there) {
    if (there) value = load_once(source);
}
__device__ __forceinline__ void store_wide(Wide* target, Wide value) {
    emulator::check_aligned(target, 16);
    *target = value;
}
template <class T> __device__ __forceinline__ T load_aligned(const T* source) {
    emulator::check_aligned(source, alignof(T));
    return *source;
}
template <class T> __device__ __forceinline__ void store_aligned(T* target, T value) {
    emulator::check_aligned(target, alignof(T));
    *target = value;
}
template <class T> __device__ __forceinline__ u32 pack_pair(float low, float high) {
    return from_float<T>(low).bits | u32(from_float<T>(high).bits) << 16;
}
template <class T> __device__ __forceinline__ u32 larger_pair(u32 a, u32 b) {
    return max(a & 0xffffu, b & 0xffffu) | max(a & 0xffff0000u, b & 0xffff0000u);
}
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, u32 bytes) {
    emulator::copy_async(shared, global, bytes);
}
__device__ __forceinline__ void copy_async_commit() { emulator::copy_async_commit(); }
template <int PENDING> __device__ __forceinline__ void copy_async_wait() {
    emulator::copy_async_wait(PENDING);
}
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::mma_16x8x16(d, a, b, [](u16 bits) { return to_float(T{bits}); });
}
__device__ __forceinline__ void load_matrix_x4(u32 (&fragment)[4], const void* row) {
    emulator::load_matrix_x4(fragment, row, false);
}
__device__ __forceinline__ void load_matrix_x4_transposed(u32 (&fragment)[4], const void* row) {
    emulator::load_matrix_x4(fragment, row, true);
}

#else

__device__ __forceinline__ float bits_to_float(u32 bits) { return __uint_as_float(bits); }
__device__ __forceinline__ u32 float_to_bits(float number) { return __float_as_uint(number); }
__device__ __forceinline__ float half_to_float(u16 bits) {
    float number;
    asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(bits));
    return number;
}
__device__ __forceinline__ u16 float_to_half(float number) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(number));
    return bits;
}

// Reads what no thread will read again: past the first-level cache.
__device__ __forceinline__ Wide load_once(const Wide* source) {
    Wide value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.words[0]), "=r"(value.words[1]), "=r"(value.words[2]),
                   "=r"(value.words[3])
                 : "l"(source));
    return value;
}

// Adds 1 for all blocks to see, and gives what was there before: a release of what came before, and
// an acquire for what follows.
__device__ __forceinline__ u32 count_released(u32* counter) {
    u32 before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    return before;
}

// Reads what other blocks wrote: from the second-level cache, which all share.
__device__ __forceinline__ Pack<float, 4> load_shared_by_blocks(const Pack<float, 4>* source) {
    Pack<float, 4> value;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.elements[0]), "=f"(value.elements[1]), "=f"(value.elements[2]),
                   "=f"(value.elements[3])
                 : "l"(source)
                 : "memory");
    return value;
}

// The same, where it is there, without a branch; else the value stays. The second-level cache may
// bring the whole line: for rows that are read to their end, a part at a time.
__device__ __forceinline__ void load_once_if(Wide& value, const Wide* source, bool there) {
    asm volatile("{ .reg .pred there; setp.ne.u32 there, %5, 0;\n\t"
                 "@there ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4]; }"
                 : "+r"(value.words[0]), "+r"(value.words[1]), "+r"(value.words[2]),
                   "+r"(value.words[3])
                 : "l"(source), "r"(u32(there)));
}

// One access of all of T, whose alignment the address has.
template <class T> __device__ __forceinline__ T load_aligned(const T* source) { return *source; }
template <class T> __device__ __forceinline__ void store_aligned(T* target, T value) {
    *target = value;
}

// Two numbers rounded to T, bf16 or f16, in one word. A NaN stays one, with bits of the card's
// choice.
template <class T> __device__ __forceinline__ u32 pack_pair(float low, float high);
template <> __device__ __forceinline__ u32 pack_pair<bf16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return float_to_bf16_bits(low) | u32(float_to_bf16_bits(high)) << 16;
#endif
}
template <> __device__ __forceinline__ u32 pack_pair<f16>(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return float_to_half(low) | u32(float_to_half(high)) << 16;
#endif
}

// Of two pairs of magnitudes of T, bf16 or f16 with the sign bit clear, the larger of each; a NaN
// is larger than all. Such magnitudes have the order of their bits.
template <class T> __device__ __forceinline__ u32 larger_pair(u32 a, u32 b) {
    return max(a & 0xffffu, b & 0xffffu) | max(a & 0xffff0000u, b & 0xffff0000u);
}
#if __CUDA_ARCH__ >= 800
template <> __device__ __forceinline__ u32 larger_pair<bf16>(u32 a, u32 b) {
    u32 larger;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}
template <> __device__ __forceinline__ u32 larger_pair<f16>(u32 a, u32 b) {
    u32 larger;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}
#endif

// Writes what another kernel may read soon. In PTX, since the compiler would split some of them.
__device__ __forceinline__ void store_wide(Wide* target, Wide value) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(target), "r"(value.words[0]),
                 "r"(value.words[1]), "r"(value.words[2]), "r"(value.words[3])
                 : "memory");
}

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Copies `bytes` (at most 16) from global to shared memory in the background and fills the rest of
// the 16 with zeros. Both addresses are multiples of 16. Before sm_80, at once.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, u32 bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(bytes)
                 : "memory");
#else
    Wide value{};
    if (bytes == 16) {
        value = *static_cast<const Wide*>(global);
    } else {
        for (u32 byte = 0; byte < bytes; ++byte) {
            reinterpret_cast<u8*>(&value)[byte] = static_cast<const u8*>(global)[byte];
        }
    }
    *static_cast<Wide*>(shared) = value;
#endif
}

// Ends a group of background copies.
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the PENDING newest groups of this thread are under way. Other threads see
// what has arrived after the next barrier.
template <int PENDING> __device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// d += a b for a 16 x 16 (row-major), b 16 x 8 (column-major), d 16 x 8, in the fragments of
// mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"). T is bf16 or f16.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

template <>
__device__ __forceinline__ void mma_16x8x16<f16>(float (&d)[4], const u32 (&a)[4],
                                                 const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    // sm_75 has half of it: two steps over k.
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

#if __CUDA_ARCH__ >= 800
template <>
__device__ __forceinline__ void mma_16x8x16<bf16>(float (&d)[4], const u32 (&a)[4],
                                                  const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Four 8 x 8 matrices of 16-bit numbers from shared memory into fragments: lane l gives the address
// of row l % 8 of matrix l / 8 (16 bytes, aligned), and gets of each matrix i row l / 4, columns
// 2 (l % 4) and 2 (l % 4) + 1; transposed, the same of each matrix's transpose.
__device__ __forceinline__ void load_matrix_x4(u32 (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void load_matrix_x4_transposed(u32 (&fragment)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#endif

// Bytes of shared memory that the launch gave.
__device__ __forceinline__ u32 dynamic_bytes() {
#ifdef FOURBIT_EMULATED
    return emulator::dynamic_bytes;
#else
    u32 bytes;
    asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
    return bytes;
#endif
}

// Shared memory whose size the launch gives.
__device__ __forceinline__ u8* dynamic_shared() {
#ifdef FOURBIT_EMULATED
    return emulator::dynamic_memory;
#else
    extern __shared__ Wide memory[];
    return reinterpret_cast<u8*>(memory);
#endif
}
