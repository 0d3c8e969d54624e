// Runs CUDA kernels on one thread of a CPU, so that they can be tested where there is no card.
//
// A kernel source from cuda/ is compiled as C++ with this header before it. Every thread of a block
// is a fiber that runs until it must wait for others: at a barrier, or at an operation of its warp.
// The order in which fibers run is chosen by the test; a kernel that is right gives the same bytes
// in every order, one that lacks a barrier does not. Blocks run one after the other.
//
// What it is stricter about than a card:
// - shared memory is filled with 0xcd bytes (as floats, about -4e8) before every block;
// - a background copy (cp.async) arrives, as the test says, either at once or only when waited for;
// - warp operations need all lanes of the warp that have not ended;
// - a block whose threads wait for each other for ever is an error, and so is a misaligned access
//   through the wrappers of common.cuh.
// What it cannot show: races between blocks, memory ordering, bank conflicts and speed.
#ifndef FOURBIT_EMULATED
#define FOURBIT_EMULATED 1

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#define __global__ [[maybe_unused]]
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __constant__ static const
// All of one section, so that they can be filled before a block begins.
#define __shared__ __attribute__((section("fourbit_shared"))) static

struct Dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline Dim3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" unsigned char __start_fourbit_shared[] __attribute__((weak));
extern "C" unsigned char __stop_fourbit_shared[] __attribute__((weak));

namespace emulator {

constexpr unsigned LANES = 32;
constexpr std::size_t STACK_BYTES = 128 << 10;
constexpr std::size_t MOST_THREADS = 1024;
constexpr std::size_t MOST_DYNAMIC_BYTES = 232448;  // of sm_90
constexpr int POISON = 0xcd;

// How a block is run.
struct Options {
    // At every turn, each thread runs until it must wait: in order (0), in reverse (1), or shuffled
    // with this seed (4 and above). Or each warp runs as far as it can without the others, the
    // first (2) or the last (3) ahead: what shows a missing barrier between warps.
    unsigned order = 0;
    // Whether background copies arrive at once, or only when waited for.
    bool eager_copies = false;
};

struct Copy {
    void* target;
    const void* source;
    unsigned bytes;
};

struct Fiber {
    ucontext_t context;
    std::vector<unsigned char> stack = std::vector<unsigned char>(STACK_BYTES);
    Dim3 thread;
    unsigned index = 0;
    bool done = false;
    // What it waits for: a barrier or a warp operation to come to its next generation.
    const unsigned* awaited = nullptr;
    unsigned generation = 0;
    std::vector<std::vector<Copy>> committed;
    std::vector<Copy> open;
};

// Where threads meet: the last to come does the work and lets the others go.
struct Meeting {
    unsigned generation = 0;
    unsigned arrived = 0;
    const char* what = nullptr;
};

// What the lanes of a warp bring to an operation, and take from it.
struct Warp {
    Meeting meeting;
    std::uint64_t values[LANES];
    std::uint64_t results[LANES];
    const void* addresses[LANES];
    std::uint32_t a[LANES][4];
    std::uint32_t b[LANES][2];
    float d[LANES][4];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Meeting barrier;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline unsigned threads = 0;
inline Options options;
inline std::string failure;
inline bool failing = false;
inline void (*body)(void*) = nullptr;
inline void* body_argument = nullptr;
alignas(128) inline unsigned char dynamic_memory[MOST_DYNAMIC_BYTES];

inline void leave() { swapcontext(&current->context, &scheduler); }

// Ends the launch with a message; does not return.
[[noreturn]] inline void fail(const std::string& message) {
    if (!failing) {
        char where[160];
        std::snprintf(where, sizeof where, "block (%u, %u, %u), thread (%u, %u, %u): ", blockIdx.x,
                      blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
        failure = where + message;
        failing = true;
    }
    while (true) leave();
}

[[noreturn, gnu::noinline]] inline void fail_apart(const char* here, const char* there) {
    fail(std::string(here) + " where other threads of the group are at " + there);
}

inline unsigned alive(unsigned first, unsigned count) {
    unsigned living = 0;
    for (unsigned i = first; i < std::min(first + count, threads); ++i) living += !fibers[i].done;
    return living;
}

// Waits for `expected` threads. The last calls `work`.
template <class Work>
inline void meet(Meeting& meeting, unsigned first, unsigned count, const char* what, Work work) {
    if (meeting.arrived && std::strcmp(meeting.what, what) != 0) {
        fail_apart(what, meeting.what);
    }
    meeting.what = what;
    ++meeting.arrived;
    if (meeting.arrived >= alive(first, count)) {
        meeting.arrived = 0;
        ++meeting.generation;
        work();
        return;
    }
    current->awaited = &meeting.generation;
    current->generation = meeting.generation;
    leave();
    current->awaited = nullptr;
}

inline void synchronize_block() {
    meet(barrier, 0, threads, "__syncthreads", [] {});
}

inline unsigned lane() { return current->index % LANES; }
inline Warp& warp() { return warps[current->index / LANES]; }

template <class Work> inline void meet_warp(const char* what, Work work) {
    const unsigned first = current->index / LANES * LANES;
    meet(warp().meeting, first, LANES, what, work);
}

// Gives every lane the value of lane `source`, or its own where there is none.
template <class T>
inline T shuffle(const char* what, std::uint32_t mask, T value, unsigned source) {
    static_assert(sizeof(T) <= 8, "at most 64 bits");
    if (mask != 0xffffffffu) fail("a shuffle of a part of the warp is not emulated");
    Warp& w = warp();
    std::memcpy(&w.values[lane()], &value, sizeof(T));
    meet_warp(what, [&] { std::memcpy(w.results, w.values, sizeof w.values); });
    T result = value;
    if (source < LANES) std::memcpy(&result, &w.results[source], sizeof(T));
    return result;
}

inline std::uint32_t ballot(std::uint32_t mask, bool predicate) {
    if (mask != 0xffffffffu) fail("a vote of a part of the warp is not emulated");
    Warp& w = warp();
    w.values[lane()] = predicate;
    const unsigned first = current->index / LANES * LANES;
    meet_warp("ballot", [&] {
        std::uint64_t votes = 0;
        for (unsigned l = 0; l < LANES && first + l < threads; ++l) {
            if (!fibers[first + l].done) votes |= w.values[l] << l;
        }
        std::fill(w.results, w.results + LANES, votes);
    });
    return std::uint32_t(w.results[lane()]);
}

inline float bits_to_float(std::uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

inline std::uint32_t float_to_bits(float number) {
    std::uint32_t bits;
    std::memcpy(&bits, &number, 4);
    return bits;
}

inline float half_to_float(std::uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}

inline std::uint16_t float_to_half(float number) {
    const _Float16 half = _Float16(number);
    std::uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

inline void check_aligned(const void* address, std::uintptr_t bytes) {
    if (reinterpret_cast<std::uintptr_t>(address) % bytes) fail("a misaligned access");
}

inline void arrive(const Copy& copy) {
    unsigned char whole[16] = {};
    std::memcpy(whole, copy.source, copy.bytes);
    std::memcpy(copy.target, whole, 16);
}

inline void copy_async(void* target, const void* source, unsigned bytes) {
    check_aligned(target, 16);
    if (bytes) check_aligned(source, 16);
    if (bytes > 16) fail("a background copy of more than 16 bytes");
    const Copy copy{target, source, bytes};
    if (options.eager_copies) {
        arrive(copy);
    } else {
        current->open.push_back(copy);
    }
}

inline void copy_async_commit() {
    current->committed.push_back(std::move(current->open));
    current->open.clear();
}

inline void copy_async_wait(unsigned pending) {
    auto& groups = current->committed;
    while (groups.size() > pending) {
        for (const Copy& copy : groups.front()) arrive(copy);
        groups.erase(groups.begin());
    }
}

// The fragments are those of mma.m16n8k16 (PTX ISA). Sums are in double precision, rounded once:
// a card's order is its own.
template <class Convert>
inline void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                        Convert convert) {
    Warp& w = warp();
    std::memcpy(w.a[lane()], a, sizeof a);
    std::memcpy(w.b[lane()], b, sizeof b);
    std::memcpy(w.d[lane()], d, sizeof d);
    meet_warp("mma", [&] {
        double left[16][16], right[16][8];
        for (unsigned l = 0; l < LANES; ++l) {
            for (unsigned i = 0; i < 8; ++i) {
                const unsigned row = l / 4 + (i / 2 % 2) * 8;
                const unsigned column = l % 4 * 2 + i % 2 + i / 4 * 8;
                left[row][column] = convert(std::uint16_t(w.a[l][i / 2] >> (i % 2 * 16)));
            }
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned row = l % 4 * 2 + i % 2 + i / 2 * 8;
                right[row][l / 4] = convert(std::uint16_t(w.b[l][i / 2] >> (i % 2 * 16)));
            }
        }
        for (unsigned l = 0; l < LANES; ++l) {
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
                double sum = w.d[l][i];
                for (unsigned k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
                w.d[l][i] = float(sum);
            }
        }
    });
    std::memcpy(d, w.d[lane()], sizeof d);
}

inline void load_matrix_x4(std::uint32_t (&fragment)[4], const void* row, bool transposed) {
    check_aligned(row, 16);
    Warp& w = warp();
    w.addresses[lane()] = row;
    // The rows are read when all are there, and before any lane goes on.
    meet_warp(transposed ? "ldmatrix.trans" : "ldmatrix", [&] {
        for (unsigned l = 0; l < LANES; ++l) {
            for (unsigned matrix = 0; matrix < 4; ++matrix) {
                std::uint16_t pair[2];
                for (unsigned i = 0; i < 2; ++i) {
                    const unsigned r = transposed ? l % 4 * 2 + i : l / 4;
                    const unsigned c = transposed ? l / 4 : l % 4 * 2 + i;
                    const auto* from = static_cast<const unsigned char*>(
                        w.addresses[matrix * 8 + r]);
                    std::memcpy(&pair[i], from + 2 * c, 2);
                }
                w.a[l][matrix] = pair[0] | std::uint32_t(pair[1]) << 16;
            }
        }
    });
    std::memcpy(fragment, w.a[lane()], sizeof fragment);
}

inline void fiber_main() {
    body(body_argument);
    current->done = true;
    // Those who wait may have waited for this thread alone.
    while (true) leave();
}

// A barrier does not wait for threads that ended before they came to it.
inline bool release_barrier() {
    const unsigned living = alive(0, threads);
    if (barrier.arrived == 0 || barrier.arrived < living) return false;
    barrier.arrived = 0;
    ++barrier.generation;
    return true;
}

inline bool waiting(const Fiber& fiber) {
    return fiber.awaited && *fiber.awaited == fiber.generation;
}

inline void run_block(unsigned dynamic_bytes) {
    std::memset(__start_fourbit_shared, POISON,
                std::size_t(__stop_fourbit_shared - __start_fourbit_shared));
    std::memset(dynamic_memory, POISON, dynamic_bytes);
    barrier = Meeting{};
    for (Warp& w : warps) w.meeting = Meeting{};
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.index = i;
        fiber.done = false;
        fiber.awaited = nullptr;
        fiber.committed.clear();
        fiber.open.clear();
        fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, fiber_main, 0);
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    if (options.order % 2 == 1 && options.order < 4) std::reverse(order.begin(), order.end());
    const bool warps_run_ahead = options.order == 2 || options.order == 3;
    const unsigned group = warps_run_ahead ? LANES : threads;
    std::mt19937 shuffle(options.order);
    while (alive(0, threads)) {
        if (options.order >= 4) std::shuffle(order.begin(), order.end(), shuffle);
        bool moved = false;
        for (unsigned first = 0; first < threads; first += group) {
            bool group_moved;
            do {
                group_moved = false;
                for (unsigned i = first; i < std::min(first + group, threads); ++i) {
                    Fiber& fiber = fibers[order[i]];
                    if (fiber.done || waiting(fiber)) continue;
                    moved = group_moved = true;
                    current = &fiber;
                    threadIdx = fiber.thread;
                    swapcontext(&scheduler, &fiber.context);
                    if (failing) return;
                }
            } while (group_moved && warps_run_ahead);
        }
        if (!moved && !release_barrier()) {
            failing = true;
            failure = "threads wait for each other for ever, some at " +
                      std::string(barrier.arrived ? "__syncthreads" : "an operation of a warp");
            return;
        }
    }
    for (unsigned i = 0; i < threads && !failing; ++i) {
        if (fibers[i].open.empty() && fibers[i].committed.empty()) continue;
        failing = true;
        failure = "a thread ended before its background copies arrived";
    }
}

// Calls a kernel with the arguments that `arguments` point to, as cuLaunchKernel takes them.
template <class... Parameters, std::size_t... Index>
inline void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<Index...>) {
    kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[Index])...);
}

template <class... Parameters>
inline std::string launch(void (*kernel)(Parameters...), Dim3 grid, Dim3 block,
                          unsigned dynamic_bytes, void** arguments, Options chosen) {
    struct Call {
        void (*kernel)(Parameters...);
        void** arguments;
    } what{kernel, arguments};
    body_argument = &what;
    body = [](void* argument) {
        const Call& c = *static_cast<Call*>(argument);
        call(c.kernel, c.arguments, std::index_sequence_for<Parameters...>{});
    };
    options = chosen;
    failing = false;
    failure.clear();
    gridDim = grid;
    blockDim = block;
    threads = block.x * block.y * block.z;
    if (threads == 0 || threads > MOST_THREADS) return "a block of 1 to 1024 threads is possible";
    if (dynamic_bytes > MOST_DYNAMIC_BYTES) return "so much shared memory is on no card";
    if (fibers.size() < threads) fibers.resize(threads);
    warps.resize((threads + LANES - 1) / LANES);
    for (unsigned z = 0; z < grid.z && !failing; ++z) {
        for (unsigned y = 0; y < grid.y && !failing; ++y) {
            for (unsigned x = 0; x < grid.x && !failing; ++x) {
                blockIdx = {x, y, z};
                run_block(dynamic_bytes);
            }
        }
    }
    return failure;
}

}  // namespace emulator

// Makes a kernel callable from the tests: returns an empty string, or what went wrong.
#define FOURBIT_EMULATE(kernel)                                                                  \
    extern "C" const char* emulate_##kernel(const unsigned* grid, const unsigned* block,         \
                                            unsigned dynamic_bytes, void** arguments,            \
                                            unsigned order, int eager_copies) {                  \
        static std::string failure;                                                              \
        failure = emulator::launch(kernel, {grid[0], grid[1], grid[2]},                          \
                                   {block[0], block[1], block[2]}, dynamic_bytes, arguments,     \
                                   {order, eager_copies != 0});                                  \
        return failure.c_str();                                                                  \
    }

// --- CUDA's own functions -----------------------------------------------------------------------

inline void __syncthreads() { emulator::synchronize_block(); }
template <class T>
inline T __shfl_sync(std::uint32_t mask, T value, int source, unsigned width = 32) {
    const unsigned from = emulator::lane() / width * width + unsigned(source) % width;
    return emulator::shuffle("__shfl_sync", mask, value, from);
}
template <class T> inline T __shfl_xor_sync(std::uint32_t mask, T value, int with) {
    return emulator::shuffle("__shfl_xor_sync", mask, value, emulator::lane() ^ unsigned(with));
}
template <class T> inline T __shfl_down_sync(std::uint32_t mask, T value, unsigned by) {
    return emulator::shuffle("__shfl_down_sync", mask, value, emulator::lane() + by);
}
inline std::uint32_t __ballot_sync(std::uint32_t mask, bool predicate) {
    return emulator::ballot(mask, predicate);
}
inline bool __any_sync(std::uint32_t mask, bool predicate) {
    return emulator::ballot(mask, predicate) != 0;
}

// One fiber runs at a time, so plain operations are atomic.
template <class T> inline T atomicAdd(T* address, T value) {
    return std::exchange(*address, T(*address + value));
}
template <class T> inline T atomicMin(T* address, T value) {
    return std::exchange(*address, std::min(*address, value));
}
template <class T> inline T atomicMax(T* address, T value) {
    return std::exchange(*address, std::max(*address, value));
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline std::uint32_t __byte_perm(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
    const std::uint64_t bytes = low | std::uint64_t(high) << 32;
    std::uint32_t result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned which = selector >> 4 * i & 0xf;
        std::uint32_t byte = bytes >> 8 * (which & 7) & 0xff;
        if (which & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << 8 * i;
    }
    return result;
}
inline int __popc(std::uint32_t bits) { return __builtin_popcount(bits); }
inline void __threadfence() {}
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
using std::max;
using std::min;

#endif
