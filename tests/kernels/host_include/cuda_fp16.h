// SPDX-License-Identifier: Apache-2.0
// cuda_fp16.h for host_shim.hpp: __half over the compiler's _Float16 (round to nearest even, as on the device).
#pragma once
#include "../host_shim.hpp"

struct __half {
    _Float16 value;
    __half() = default;
    __half(float v) : value(_Float16(v)) {}
    __half(double v) : value(_Float16(v)) {}
    __half(int v) : value(_Float16(v)) {}
    __half(unsigned v) : value(_Float16(v)) {}
    __half(long long v) : value(_Float16(v)) {}
    operator float() const { return float(value); }
    __half& operator+=(__half b) { return *this = __half(float(*this) + float(b)); }
    __half& operator-=(__half b) { return *this = __half(float(*this) - float(b)); }
    __half& operator*=(__half b) { return *this = __half(float(*this) * float(b)); }
};
struct alignas(2) __half_raw { unsigned short x; };
struct alignas(4) __half2 { __half x, y; };
using half = __half;
using half2 = __half2;

#define CUDA_HOST_HALF(op)                                                                                            \
    inline __half operator op(__half a, __half b) { return __half(float(a) op float(b)); }
CUDA_HOST_HALF(+) CUDA_HOST_HALF(-) CUDA_HOST_HALF(*) CUDA_HOST_HALF(/)
#undef CUDA_HOST_HALF
#define CUDA_HOST_HALF(op)                                                                                            \
    inline bool operator op(__half a, __half b) { return float(a) op float(b); }
CUDA_HOST_HALF(<) CUDA_HOST_HALF(>) CUDA_HOST_HALF(<=) CUDA_HOST_HALF(>=) CUDA_HOST_HALF(==) CUDA_HOST_HALF(!=)
#undef CUDA_HOST_HALF
inline __half operator-(__half a) { return __half(-float(a)); }

inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline __half __double2half(double v) { return __half(v); }
inline __half __int2half_rn(int v) { return __half(v); }
inline float __half2float(__half v) { return float(v); }
inline unsigned short __half_as_ushort(__half v) { return cuda_host_bits<unsigned short>(v); }
inline __half __ushort_as_half(unsigned short v) { return cuda_host_bits<__half>(v); }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __float2half2_rn(float v) { return {__half(v), __half(v)}; }
inline float2 __half22float2(__half2 v) { return {float(v.x), float(v.y)}; }
inline float __low2float(__half2 v) { return float(v.x); }
inline float __high2float(__half2 v) { return float(v.y); }
inline __half2 __half2half2(__half v) { return {v, v}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline __half __hadd(__half a, __half b) { return a + b; }
inline __half __hmul(__half a, __half b) { return a * b; }
inline __half __hmax(__half a, __half b) { return a > b ? a : b; }
inline __half __hmin(__half a, __half b) { return a < b ? a : b; }
inline __half __hfma(__half a, __half b, __half c) { return __half(double(float(a)) * float(b) + float(c)); }
inline __half2 __hadd2(__half2 a, __half2 b) { return {a.x + b.x, a.y + b.y}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {a.x * b.x, a.y * b.y}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
