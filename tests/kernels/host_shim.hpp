// SPDX-License-Identifier: Apache-2.0
// Runs CUDA C++ kernels on the host, thread by thread, so that their logic can be checked without a GPU.
//
// Each CUDA thread of a block is a fiber. A fiber runs until it waits (block barrier, warp collective) or ends, a warp until
// all its fibers wait for others. Blocks, warps and lanes run in ascending, descending or shuffled order, so that a missing
// barrier shows as a difference between orders. Behaviour that a GPU leaves undefined is made visible: shared memory starts
// as poison in each block, buffers end at an inaccessible page, reading an absent lane gives poison, and a barrier or warp
// collective that can't complete is an error that names the threads. Several blocks can run side by side, for kernels whose
// blocks communicate. Not modelled: weak memory order, warps that progress in lock step, inline PTX.
//
// Kernels are compiled with this header. host_shim.cpp, compiled once and linked to each kernel, runs the fibers.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#undef __noinline__
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ static
#define __shared__ static thread_local // one OS thread runs all fibers, so the module's TLS block serves as shared memory
#define __builtin_assume(condition) ((condition) ? (void)0 : cuda_host::fail("__builtin_assume(" #condition ") is false"))

// ---- built-in vector types -------------------------------------------------------------------------------------------

#define CUDA_HOST_VECTORS(T, name, a1, a2, a4)                                                                        \
    struct alignas(a1) name##1 { T x; };                                                                              \
    struct alignas(a2) name##2 { T x, y; };                                                                           \
    struct name##3 { T x, y, z; };                                                                                    \
    struct alignas(a4) name##4 { T x, y, z, w; };                                                                     \
    inline name##1 make_##name##1(T x) { return {x}; }                                                                \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                                        \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                                \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_HOST_VECTORS(signed char, char, 1, 2, 4)
CUDA_HOST_VECTORS(unsigned char, uchar, 1, 2, 4)
CUDA_HOST_VECTORS(short, short, 2, 4, 8)
CUDA_HOST_VECTORS(unsigned short, ushort, 2, 4, 8)
CUDA_HOST_VECTORS(int, int, 4, 8, 16)
CUDA_HOST_VECTORS(unsigned int, uint, 4, 8, 16)
CUDA_HOST_VECTORS(long, long, 8, 16, 16)
CUDA_HOST_VECTORS(long long, longlong, 8, 16, 16)
CUDA_HOST_VECTORS(unsigned long long, ulonglong, 8, 16, 16)
CUDA_HOST_VECTORS(float, float, 4, 8, 16)
CUDA_HOST_VECTORS(double, double, 8, 16, 16)
#undef CUDA_HOST_VECTORS
using double4_16a = double4;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- threads, barriers, warp collectives -----------------------------------------------------------------------------

namespace cuda_host {

enum class State : unsigned char { ready, asleep, at_barrier, at_collective, ended };

struct Thread {
    uint3 index{};
    unsigned linear = 0;
    State state = State::ready;
    const char* operation = "";             // the operation it waits in, for messages and to detect mismatches
    unsigned mask = 0;                      // lanes of the collective it waits in
    alignas(16) unsigned char outbox[16];   // its value for the collective
    alignas(16) unsigned char inbox[32][16];// the values of all lanes, once complete
    int predicate = 0, votes = 0, voters = 0; // for __syncthreads_count and the like
    std::vector<std::vector<std::pair<void*, std::vector<unsigned char>>>> copies; // groups of asynchronous copies
    ucontext_t context{};
};

struct Argument { // mirrored by emulate.py
    std::int64_t kind;        // 0: integer, 1: floating, 2: pointer, 3: bytes by value
    std::int64_t integer;
    double floating;
    void* data;
    std::int64_t size, offset, writable;
};

struct Launch { // mirrored by emulate.py
    unsigned grid[3], block[3];
    std::uint64_t shared_bytes;
    std::uint64_t order;      // 0: ascending, 1: descending, otherwise a seed
    std::uint64_t resident;   // blocks that run side by side
    Argument* arguments;
    std::uint64_t argument_count;
    char* message;
    std::uint64_t message_size;
    std::uint64_t fault_offset; // out: the offset in the module at which a signal was raised, 0 if none
};

inline Thread* current = nullptr;
inline uint3 block_index{};
inline dim3 block_size, grid_size;
inline thread_local unsigned char shared_memory_anchor; // gives modules without shared memory a TLS block, too
extern unsigned char* const dynamic_shared_memory;

template <class T> T* dynamic_shared() { return reinterpret_cast<T*>(dynamic_shared_memory); }

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);
void wait(State state, const char* operation);
void pause(); // lets other resident blocks run: called before an access to memory that blocks share
void nap();   // lets other threads run; a thread that polls memory must call it between two reads
bool complete_collective(Thread& one); // that `one` waits in, if all lanes of its mask have arrived or ended
bool present(unsigned lane);           // whether the lane took part in the current thread's last collective

template <class T> void collective(unsigned mask, const T& value, const char* operation) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
    if (!(mask >> (current->linear % 32) & 1)) fail("%s: mask %08x lacks the calling lane", operation, mask);
    std::memset(current->outbox, 0, 16);
    std::memcpy(current->outbox, &value, sizeof value);
    current->mask = mask;
    current->state = State::at_collective;
    current->operation = operation;
    if (!complete_collective(*current)) wait(State::at_collective, operation);
}
template <class T> T received(unsigned lane) {
    T value;
    std::memcpy(&value, current->inbox[lane], sizeof value);
    return value;
}

// A launch on a GPU reads sizeof(T) bytes from the value's address, so a value of another type or size is an error here.
template <class T> T convert(const Argument& a, unsigned char* device) {
    if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(device);
    if (a.size && std::size_t(a.size) != sizeof(T)) fail("an argument of %zu bytes was given where %zu are read", std::size_t(a.size), sizeof(T));
    if constexpr (std::is_integral_v<T>) {
        if (a.kind == 1) fail("a floating argument was given for an integer");
        if (!a.data) return static_cast<T>(a.integer);
    } else if constexpr (std::is_floating_point_v<T>) {
        if (a.kind == 0) fail("an integer argument was given for a floating one");
        if (!a.data && sizeof(T) != sizeof(double)) fail("a Python float is a double; give a NumPy scalar");
        if (!a.data) return static_cast<T>(a.floating);
    }
    if constexpr (!std::is_pointer_v<T>) {
        if (!a.data) fail("a struct argument must be given as a NumPy scalar or as bytes");
        T value;
        std::memcpy(&value, a.data, sizeof value);
        return value;
    }
}

// The launch's arguments, and the address of the device buffer of each pointer among them.
inline Argument* arguments = nullptr;
inline unsigned char** device_pointers = nullptr;

int run(Launch* what, std::size_t count, const bool* is_pointer, void (*body)());

template <class... A, std::size_t... I> int launch_kernel(void (*kernel)(A...), Launch* what, std::index_sequence<I...>) {
    static void (*entry)(A...);
    entry = kernel;
    constexpr bool is_pointer[] = {std::is_pointer_v<A>..., false};
    return run(what, sizeof...(A), is_pointer, [] { entry(convert<std::remove_cv_t<A>>(arguments[I], device_pointers[I])...); });
}
template <class... A> int launch_kernel(void (*kernel)(A...), Launch* what) {
    return launch_kernel(kernel, what, std::index_sequence_for<A...>{});
}

} // namespace cuda_host

#define threadIdx (cuda_host::current->index)
#define blockIdx cuda_host::block_index
#define blockDim cuda_host::block_size
#define gridDim cuda_host::grid_size
inline constexpr int warpSize = 32;

inline void __syncthreads() { cuda_host::wait(cuda_host::State::at_barrier, "__syncthreads"); }
inline int __syncthreads_count(int predicate) {
    cuda_host::current->predicate = predicate;
    cuda_host::wait(cuda_host::State::at_barrier, "__syncthreads_count");
    return cuda_host::current->predicate = 0, cuda_host::current->votes;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) != 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(predicate) == cuda_host::current->voters; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_host::collective(mask, 0, "__syncwarp"); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) { cuda_host::nap(); }
[[noreturn]] inline void __trap() { cuda_host::fail("__trap()"); }

template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int lane = cuda_host::current->linear % 32;
    cuda_host::collective(mask, value, "__shfl_sync");
    return cuda_host::received<T>((lane & ~(width - 1)) + (source & (width - 1)));
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = cuda_host::current->linear % 32, from = lane - int(delta);
    cuda_host::collective(mask, value, "__shfl_up_sync");
    return from < (lane & ~(width - 1)) ? value : cuda_host::received<T>(from);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = cuda_host::current->linear % 32, from = lane + int(delta);
    cuda_host::collective(mask, value, "__shfl_down_sync");
    return from > (lane | (width - 1)) ? value : cuda_host::received<T>(from);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    const int lane = cuda_host::current->linear % 32, from = lane ^ lanes;
    cuda_host::collective(mask, value, "__shfl_xor_sync");
    return from > (lane | (width - 1)) ? value : cuda_host::received<T>(from);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    cuda_host::collective(mask, predicate != 0, "__ballot_sync");
    unsigned votes = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (cuda_host::present(lane) && cuda_host::received<bool>(lane)) votes |= 1u << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class T> unsigned __match_any_sync(unsigned mask, T value) {
    cuda_host::collective(mask, value, "__match_any_sync");
    unsigned same = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
        if (cuda_host::present(lane) && cuda_host::received<T>(lane) == value) same |= 1u << lane;
    return same;
}
#define CUDA_HOST_REDUCE(name, first, step)                                                                           \
    template <class T> T name(unsigned mask, T value) {                                                               \
        cuda_host::collective(mask, value, #name);                                                                    \
        T a = first;                                                                                                  \
        for (unsigned lane = 0; lane < 32; ++lane)                                                                    \
            if (cuda_host::present(lane)) { const T b = cuda_host::received<T>(lane); a = step; }                     \
        return a;                                                                                                     \
    }
CUDA_HOST_REDUCE(__reduce_add_sync, 0, T(a + b))
CUDA_HOST_REDUCE(__reduce_max_sync, value, std::max(a, b))
CUDA_HOST_REDUCE(__reduce_min_sync, value, std::min(a, b))
#undef CUDA_HOST_REDUCE

// ---- atomics: fibers switch only where they wait, so plain read-modify-write is atomic -------------------------------

template <class T> struct cuda_host_same { using type = T; };
#define CUDA_HOST_ATOMIC(name, result)                                                                                \
    template <class T> T name(T* address, typename cuda_host_same<T>::type value) {                                   \
        const T old = *address;                                                                                       \
        *address = result;                                                                                            \
        return old;                                                                                                   \
    }                                                                                                                 \
    template <class T> T name##_block(T* address, typename cuda_host_same<T>::type value) { return name(address, value); }
CUDA_HOST_ATOMIC(atomicAdd, T(old + value))
CUDA_HOST_ATOMIC(atomicSub, T(old - value))
CUDA_HOST_ATOMIC(atomicExch, value)
CUDA_HOST_ATOMIC(atomicMax, std::max(old, value))
CUDA_HOST_ATOMIC(atomicMin, std::min(old, value))
CUDA_HOST_ATOMIC(atomicAnd, T(old & value))
CUDA_HOST_ATOMIC(atomicOr, T(old | value))
CUDA_HOST_ATOMIC(atomicXor, T(old ^ value))
CUDA_HOST_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
#undef CUDA_HOST_ATOMIC
template <class T> T atomicCAS(T* address, typename cuda_host_same<T>::type compare, typename cuda_host_same<T>::type value) {
    const T old = *address;
    if (old == compare) *address = value;
    return old;
}

// ---- memory hints, bits, math ----------------------------------------------------------------------------------------

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldca(const T* p) { return *p; }
template <class T> T __ldlu(const T* p) { return *p; }
template <class T> void __stcs(T* p, T value) { *p = value; }
template <class T> void __stcg(T* p, T value) { *p = value; }
template <class T> void __stwb(T* p, T value) { *p = value; }

template <class To, class From> To cuda_host_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline int __float_as_int(float v) { return cuda_host_bits<int>(v); }
inline unsigned __float_as_uint(float v) { return cuda_host_bits<unsigned>(v); }
inline float __int_as_float(int v) { return cuda_host_bits<float>(v); }
inline float __uint_as_float(unsigned v) { return cuda_host_bits<float>(v); }
inline long long __double_as_longlong(double v) { return cuda_host_bits<long long>(v); }
inline double __longlong_as_double(long long v) { return cuda_host_bits<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((std::uint64_t(a) * b) >> 32); }

using std::isinf;
using std::isnan;
using std::signbit;
template <class A, class B> std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
    else return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B> std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>, std::common_type_t<A, B>> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
    else return T(a) < T(b) ? T(b) : T(a);
}
inline float cuda_host_rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline double cuda_host_rsqrt(double v) { return 1.0 / std::sqrt(v); }
#define rsqrtf cuda_host_rsqrtf // newer C libraries declare these names too
#define rsqrt cuda_host_rsqrt
inline float __expf(float v) { return std::exp(v); }
inline float __exp2f(float v) { return std::exp2(v); }
inline float __logf(float v) { return std::log(v); }
inline float __log2f(float v) { return std::log2(v); }
inline float __powf(float a, float b) { return std::pow(a, b); }
inline float __sinf(float v) { return std::sin(v); }
inline float __cosf(float v) { return std::cos(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fsqrt_rn(float v) { return std::sqrt(v); }
inline float __frsqrt_rn(float v) { return 1.0f / std::sqrt(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float v) { return std::fmin(std::fmax(v, 0.0f), 1.0f); }
inline int __float2int_rn(float v) { return int(std::nearbyint(v)); }
inline int __float2int_rz(float v) { return int(v); }
inline int __float2int_rd(float v) { return int(std::floor(v)); }
inline float __int2float_rn(int v) { return float(v); }
#define CUDART_INF_F __builtin_inff()
#define CUDART_INF __builtin_inf()
