// SPDX-License-Identifier: Apache-2.0
// cuda_bf16.h for host_shim.hpp: the upper half of a float, rounded to nearest even.
#pragma once
#include "../host_shim.hpp"

struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float v) {
        const unsigned u = __float_as_uint(v);
        bits = v != v ? 0x7fff : static_cast<unsigned short>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
    }
    __nv_bfloat16(double v) : __nv_bfloat16(float(v)) {}
    __nv_bfloat16(int v) : __nv_bfloat16(float(v)) {}
    operator float() const { return __uint_as_float(unsigned(bits) << 16); }
    __nv_bfloat16& operator+=(__nv_bfloat16 b) { return *this = __nv_bfloat16(float(*this) + float(b)); }
    __nv_bfloat16& operator*=(__nv_bfloat16 b) { return *this = __nv_bfloat16(float(*this) * float(b)); }
};
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

#define CUDA_HOST_BFLOAT16(op)                                                                                        \
    inline __nv_bfloat16 operator op(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat16(float(a) op float(b)); }
CUDA_HOST_BFLOAT16(+) CUDA_HOST_BFLOAT16(-) CUDA_HOST_BFLOAT16(*) CUDA_HOST_BFLOAT16(/)
#undef CUDA_HOST_BFLOAT16
#define CUDA_HOST_BFLOAT16(op)                                                                                        \
    inline bool operator op(__nv_bfloat16 a, __nv_bfloat16 b) { return float(a) op float(b); }
CUDA_HOST_BFLOAT16(<) CUDA_HOST_BFLOAT16(>) CUDA_HOST_BFLOAT16(<=) CUDA_HOST_BFLOAT16(>=) CUDA_HOST_BFLOAT16(==) CUDA_HOST_BFLOAT16(!=)
#undef CUDA_HOST_BFLOAT16

inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return float(v); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return cuda_host_bits<__nv_bfloat16>(v); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {float(v.x), float(v.y)}; }
inline float __low2float(__nv_bfloat162 v) { return float(v.x); }
inline float __high2float(__nv_bfloat162 v) { return float(v.y); }
