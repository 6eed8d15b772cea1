// SPDX-License-Identifier: Apache-2.0
// The PTX of kernels/relaxed_words.cuh.j2 for host_shim.hpp: other blocks can run before each access.
#pragma once
#include "../host_shim.hpp"

inline unsigned long long load_relaxed(const unsigned long long* address) {
    cuda_host::pause();
    return *address;
}
inline void store_relaxed(unsigned long long* address, unsigned long long word) {
    cuda_host::pause();
    *address = word;
}
