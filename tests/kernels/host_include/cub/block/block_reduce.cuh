// SPDX-License-Identifier: Apache-2.0
// The part of cub/block/block_reduce.cuh that kernels use, for host_shim.hpp: the same result in thread 0, combined in thread order.
#pragma once
#include "../../../host_shim.hpp"

namespace cub {

enum BlockReduceAlgorithm { BLOCK_REDUCE_RAKING_COMMUTATIVE_ONLY, BLOCK_REDUCE_RAKING, BLOCK_REDUCE_WARP_REDUCTIONS };

template <class T, int threads, BlockReduceAlgorithm = BLOCK_REDUCE_WARP_REDUCTIONS> class BlockReduce {
public:
    struct TempStorage { T values[threads]; };
    explicit BlockReduce(TempStorage& storage) : storage_(storage) {}

    template <class Operation> T Reduce(T value, Operation operation) {
        if (blockDim.x * blockDim.y * blockDim.z != threads) cuda_host::fail("cub::BlockReduce<T, %d> in another block size", threads);
        storage_.values[threadIdx.x] = value;
        __syncthreads();
        T result = storage_.values[0];
        if (threadIdx.x == 0)
            for (int i = 1; i < threads; ++i) result = operation(result, storage_.values[i]);
        return result; // valid in thread 0; as with CUB, a barrier is needed before the storage is used again
    }
    T Sum(T value) {
        return Reduce(value, [](T a, T b) { return T(a + b); });
    }

private:
    TempStorage& storage_;
};

} // namespace cub
