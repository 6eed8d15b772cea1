// SPDX-License-Identifier: Apache-2.0
// cuda_pipeline_primitives.h for host_shim.hpp: asynchronous copies land only when they are waited for, so a missing wait shows.
#pragma once
#include "../host_shim.hpp"

inline void __pipeline_memcpy_async(void* to, const void* from, std::size_t bytes, std::size_t zero_fill = 0) {
    if (bytes != 4 && bytes != 8 && bytes != 16) cuda_host::fail("__pipeline_memcpy_async of %zu bytes", bytes);
    if (reinterpret_cast<std::uintptr_t>(to) % bytes || reinterpret_cast<std::uintptr_t>(from) % bytes)
        cuda_host::fail("__pipeline_memcpy_async: addresses are not aligned to %zu bytes", bytes);
    std::vector<unsigned char> data(bytes);
    std::memcpy(data.data(), from, bytes - zero_fill);
    cuda_host::current->copies.back().emplace_back(to, std::move(data));
}
inline void __pipeline_commit() { cuda_host::current->copies.emplace_back(); }
inline void __pipeline_wait_prior(std::size_t groups) {
    auto& all = cuda_host::current->copies; // the last one is still open
    while (all.size() > groups + 1) {
        for (auto& [to, data] : all.front()) std::memcpy(to, data.data(), data.size());
        all.erase(all.begin());
    }
}
