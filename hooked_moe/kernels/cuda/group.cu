// Rows sorted by expert: a stable counting sort in three kernels, without a word to the host between them.
//
// group_count: how many entries of each expert a block's part has -> counts[expert, block]
// group_scan: per expert, how many the blocks before have; and how many there are in all
// group_scatter: per block, where each of its entries goes
//
// Of one expert, entries keep their order. Atomics only count; where an entry goes is decided by how many come before it, so a
// run's result depends on nothing but its input. Parts are the same in the first and the last kernel: a function of the number
// of entries and of blocks.
//
// block = threads, a multiple of 32.
#include "common.cuh"

// A block's entries: from `first` until before `end`.
struct Part {
    long long first, end;
};

__device__ __forceinline__ Part part_of_block(long long entries) {
    long long size = (entries + gridDim.x - 1) / gridDim.x;
    size = (size + 255) / 256 * 256;
    const long long first = size * blockIdx.x < entries ? size * blockIdx.x : entries;
    return {first, entries - first < size ? entries : first + size};
}

__device__ __forceinline__ int checked(long long expert, long long experts) {
    if (expert < 0 || expert >= experts) trap();  // as torch's own indexing does on a GPU
    return static_cast<int>(expert);
}

// grid = parts; shared: int [experts]
extern "C" __global__ void group_count(
    int* __restrict__ counts,               // [experts, parts]
    const long long* __restrict__ indices,  // [entries]
    long long entries,
    long long experts) {
    DYNAMIC_SHARED(int, count);
    for (int e = threadIdx.x; e < experts; e += blockDim.x) count[e] = 0;
    __syncthreads();
    const Part part = part_of_block(entries);
    for (long long i = part.first + threadIdx.x; i < part.end; i += blockDim.x) atomicAdd(&count[checked(indices[i], experts)], 1);
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) counts[static_cast<long long>(e) * gridDim.x + blockIdx.x] = count[e];
}

// The sum over this lane and those before it.
__device__ __forceinline__ int sum_to_lane(int x) {
    for (int distance = 1; distance < 32; distance *= 2) {
        const int before = __shfl_up_sync(~0u, x, distance);
        if (threadIdx.x % 32 >= distance) x += before;
    }
    return x;
}

// grid = experts, block = 32
extern "C" __global__ void group_scan(
    int* __restrict__ counts,  // [experts, parts]: each becomes the sum over the parts before
    int* __restrict__ totals,  // [experts]
    long long parts) {
    int* const mine = counts + blockIdx.x * parts;
    int before = 0;
    for (long long first = 0; first < parts; first += 32) {
        const long long part = first + threadIdx.x;
        const int count = part < parts ? mine[part] : 0;
        const int until = before + sum_to_lane(count);
        if (part < parts) mine[part] = until - count;
        before = __shfl_sync(~0u, until, 31);
    }
    if (threadIdx.x == 0) totals[blockIdx.x] = before;
}

// grid = parts; shared: int [experts], int [warps][experts]
extern "C" __global__ void group_scatter(
    long long* __restrict__ order,  // [entries]: the entry in each row
    long long* __restrict__ place,  // [entries]: the row of each entry
    int* __restrict__ ends,         // [experts]: the row after an expert's last
    const long long* __restrict__ indices,  // [entries]
    const int* __restrict__ counts,         // of group_scan
    const int* __restrict__ totals,
    long long entries,
    long long experts) {
    DYNAMIC_SHARED(int, starts);
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
    int* const next = starts + experts;  // [warps][experts]: the next row of an expert, for the entries of a warp
    int* const my_next = next + warp * experts;

    // Each warp has neighbouring entries of the part.
    const Part part = part_of_block(entries);
    const long long size = (part.end - part.first + blockDim.x - 1) / blockDim.x * 32;
    const long long first = part.first + warp * size;
    const long long end = first + size < part.end ? first + size : part.end;

    for (int e = threadIdx.x; e < warps * experts; e += blockDim.x) next[e] = 0;
    __syncthreads();
    for (long long i = first + lane; i < end; i += 32) atomicAdd(&my_next[checked(indices[i], experts)], 1);
    if (warp == 0) {
        int before = 0;
        for (int e = lane; e - lane < experts; e += 32) {
            const int count = e < experts ? totals[e] : 0;
            const int until = before + sum_to_lane(count);
            if (e < experts) starts[e] = until - count;
            if (e < experts && blockIdx.x == 0) ends[e] = until;
            before = __shfl_sync(~0u, until, 31);
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        int row = starts[e] + counts[static_cast<long long>(e) * gridDim.x + blockIdx.x];
        for (int w = 0; w < warps; ++w) {
            const int count = next[w * experts + e];
            next[w * experts + e] = row;
            row += count;
        }
    }
    __syncthreads();

    for (long long i = first + lane; i - lane < end; i += 32) {
        const bool real = i < end;
        const int expert = real ? static_cast<int>(indices[i]) : -1;
        const unsigned same = __match_any_sync(~0u, expert);
        const int rank = __popc(same & ((1u << lane) - 1));
        const int row = real ? my_next[expert] + rank : 0;
        __syncwarp();  // all have read
        if (real && rank == 0) my_next[expert] += __popc(same);
        __syncwarp();  // it is written: __match_any_sync alone orders no memory
        if (!real) continue;
        order[row] = i;
        place[i] = row;
    }
}
