// SPDX-License-Identifier: Apache-2.0
// mma.h for host_shim.hpp: WMMA fragments spread over the lanes (element k of lane l is position l + 32 k of the tile, an order that
// no kernel may rely on), accumulated in float. Alignment and leading-dimension rules of the programming guide are checked.
#pragma once
#include "../host_shim.hpp"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <class Use, int m, int n, int k, class T, class Layout = void> struct fragment {
    static constexpr int rows = std::is_same_v<Use, matrix_b> ? k : m;
    static constexpr int columns = std::is_same_v<Use, matrix_a> ? k : n;
    static constexpr int num_elements = rows * columns / 32;
    static_assert(rows * columns % 32 == 0);
    using element_type = T;
    using storage_element_type = T;
    T x[num_elements];
};

template <class T> void check_tile(const T* p, unsigned ld, const char* what) {
    if (reinterpret_cast<std::uintptr_t>(p) % 32) cuda_host::fail("%s: pointer %p is not aligned to 256 bits", what, static_cast<const void*>(p));
    if (ld * sizeof(T) % 16) cuda_host::fail("%s: leading dimension %u is not a multiple of 16 bytes", what, ld);
}
template <class T> std::size_t tile_index(unsigned position, int columns, unsigned ld, bool row) {
    const unsigned i = position / columns, j = position % columns;
    return row ? std::size_t(i) * ld + j : std::size_t(j) * ld + i;
}
inline unsigned lane() { return cuda_host::current->linear % 32; }

template <class U, int m, int n, int k, class T, class L> void fill_fragment(fragment<U, m, n, k, T, L>& f, const T& value) {
    for (T& element : f.x) element = value;
}
template <class U, int m, int n, int k, class T, class L>
void load_tile(fragment<U, m, n, k, T, L>& f, const T* p, unsigned ld, bool row) {
    cuda_host::collective(0xffffffffu, p, "load_matrix_sync");
    check_tile(p, ld, "load_matrix_sync");
    for (int e = 0; e < f.num_elements; ++e) f.x[e] = p[tile_index<T>(lane() + 32 * e, f.columns, ld, row)];
    __syncwarp();
}
template <class U, int m, int n, int k, class T, class L>
void load_matrix_sync(fragment<U, m, n, k, T, L>& f, const T* p, unsigned ld) {
    load_tile(f, p, ld, std::is_same_v<L, row_major>);
}
template <int m, int n, int k, class T>
void load_matrix_sync(fragment<accumulator, m, n, k, T>& f, const T* p, unsigned ld, layout_t layout) {
    load_tile(f, p, ld, layout == mem_row_major);
}
template <int m, int n, int k, class T>
void store_matrix_sync(T* p, const fragment<accumulator, m, n, k, T>& f, unsigned ld, layout_t layout) {
    cuda_host::collective(0xffffffffu, p, "store_matrix_sync");
    check_tile(p, ld, "store_matrix_sync");
    for (int e = 0; e < f.num_elements; ++e) p[tile_index<T>(lane() + 32 * e, f.columns, ld, layout == mem_row_major)] = f.x[e];
    __syncwarp();
}
template <int m, int n, int k, class TA, class LA, class TB, class LB, class T, class TC>
void mma_sync(fragment<accumulator, m, n, k, T>& d, const fragment<matrix_a, m, n, k, TA, LA>& a,
              const fragment<matrix_b, m, n, k, TB, LB>& b, const fragment<accumulator, m, n, k, TC>& c) {
    using A = fragment<matrix_a, m, n, k, TA, LA>;
    using B = fragment<matrix_b, m, n, k, TB, LB>;
    struct Operands { const A* a; const B* b; };
    cuda_host::collective(0xffffffffu, Operands{&a, &b}, "mma_sync");
    T sums[fragment<accumulator, m, n, k, T>::num_elements];
    for (int e = 0; e < d.num_elements; ++e) {
        const unsigned position = lane() + 32 * e, i = position / n, j = position % n;
        float sum = float(c.x[e]);
        for (unsigned l = 0; l < unsigned(k); ++l) {
            const unsigned at_a = i * k + l, at_b = l * n + j;
            sum += float(cuda_host::received<Operands>(at_a % 32).a->x[at_a / 32]) * float(cuda_host::received<Operands>(at_b % 32).b->x[at_b / 32]);
        }
        sums[e] = T(sum);
    }
    __syncwarp();
    for (int e = 0; e < d.num_elements; ++e) d.x[e] = sums[e];
}

} // namespace nvcuda::wmma
