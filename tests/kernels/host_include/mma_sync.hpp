// SPDX-License-Identifier: Apache-2.0
// The PTX of kernels/mma_sync.cuh.j2 for host_shim.hpp: ldmatrix and mma.m16n8k16 with the fragment layouts that the PTX ISA gives.
#pragma once
#include "../host_shim.hpp"

namespace cuda_host {

inline void load_matrices(unsigned (&fragment)[4], const void* row, bool transposed) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16) fail("ldmatrix: row %p is not aligned to 16 bytes", row);
    collective(0xffffffffu, row, "ldmatrix");
    const int lane = current->linear % 32;
    for (int i = 0; i < 4; ++i) {
        unsigned elements[2];
        for (int e = 0; e < 2; ++e) {
            const int group = lane / 4, pair = lane % 4 * 2 + e;
            const void* from = received<const void*>(8 * i + (transposed ? pair : group));
            elements[e] = static_cast<const unsigned short*>(from)[transposed ? group : pair];
        }
        fragment[i] = elements[0] | elements[1] << 16;
    }
    __syncwarp();
}

template <class T> float element(unsigned bits, int upper) { return float(cuda_host_bits<T>(static_cast<unsigned short>(upper ? bits >> 16 : bits))); }

template <class T> void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Operands { const unsigned* a; unsigned b[2]; };
    collective(0xffffffffu, Operands{a, {b0, b1}}, "mma.sync");
    const int lane = current->linear % 32;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const Operands of_row = received<Operands>(row % 8 * 4 + k % 8 / 2), of_column = received<Operands>(column * 4 + k % 8 / 2);
            c[i] += element<T>(of_row.a[row / 8 + k / 8 * 2], k % 2) * element<T>(of_column.b[k / 8], k % 2);
        }
    }
    __syncwarp();
}

} // namespace cuda_host
