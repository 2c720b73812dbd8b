// Products of tiles in shared memory, each warp its own, in half precision on tensor cores and in float32 by plain arithmetic.
//
// A warp's result of TILES_M x TILES_N tiles of 16 x 8 lies in registers, `float c[TILES_M][TILES_N][4]` per lane, in the places
// PTX fixes for mma.m16n8k16, whatever the type. With g = lane / 4 and t = lane % 4:
//   result   entry 2h + j of a tile is row g + 8h, column 2t + j
//   left     word h + 2p is row g + 8h, depths 8p + 2t and 8p + 2t + 1 (the first in the low half)
//   right    word p is column g, depths 8p + 2t and 8p + 2t + 1
#pragma once

#include "common.cuh"

// Instructions: as in common.cuh, whoever compiles without CUDA brings functions of the same meaning --------------------------

#ifdef __CUDACC__

// Four 8 x 8 matrices of halves; lanes 8i .. 8i + 7 point at the rows of matrix i, 16 aligned bytes of shared memory each.
// Word i of a lane is then matrix i at (g, 2t) and (g, 2t + 1).
__device__ __forceinline__ void load_matrices(unsigned (&words)[4], const void* row) {
    const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
}

// The same of the transposed matrices: word i is matrix i at (2t, g) and (2t + 1, g).
__device__ __forceinline__ void load_matrices_transposed(unsigned (&words)[4], const void* row) {
    const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
}

// Two floats to a word, rounded to nearest even, `low` the first in memory.
__device__ __forceinline__ unsigned word_of(float low, float high, bfloat16) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ unsigned word_of(float low, float high, float16) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// 2^x within 2 units in the last place, 0 below the normal numbers.
__device__ __forceinline__ float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}

#endif

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// Over the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float row_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Tiles ------------------------------------------------------------------------------------------------------------------------

__host__ __device__ constexpr int round_up(int size, int multiple) { return (size + multiple - 1) / multiple * multiple; }

// From row to row of a tile: 16 bytes more than it holds, so that eight rows lie in different banks.
template <class T>
__host__ __device__ constexpr int pitch_of(int columns) {
    return columns + 16 / static_cast<int>(sizeof(T));
}

// Whether rows of `width` scalars from `first` on are whole numbers of 16 aligned bytes.
template <class T>
__device__ __forceinline__ bool whole_vectors(const T* first, long long width) {
    return width * sizeof(T) % 16 == 0 && reinterpret_cast<unsigned long long>(first) % 16 == 0;
}

// Starts to fill tile[TILE_ROWS][TILE_COLUMNS] with columns `column` .. of rows in global memory, `row_of(i)` pointing at their beginnings;
// zeros where that is null and from `width` on. Vectors belong to the open group of asynchronous copies.
template <int TILE_ROWS, int TILE_COLUMNS, class T, class RowOf>
__device__ __forceinline__ void load_tile(T* tile, RowOf row_of, int column, int width, bool vectors) {
    constexpr int PITCH = pitch_of<T>(TILE_COLUMNS), VECTOR = 16 / sizeof(T), VECTORS = TILE_COLUMNS / VECTOR;
    static_assert(TILE_COLUMNS % VECTOR == 0, "rows of tiles are whole vectors");
    if (vectors) {
        for (int i = threadIdx.x; i < TILE_ROWS * VECTORS; i += blockDim.x) {
            const int row = i / VECTORS, at = i % VECTORS * VECTOR;
            const T* from = row_of(row);
            T* to = tile + row * PITCH + at;
            if (from != nullptr && column + at < width) {
                async_copy_16(to, from + column + at);
            } else {
                store(to, Pack<T, VECTOR>{});
            }
        }
    } else {
        for (int i = threadIdx.x; i < TILE_ROWS * TILE_COLUMNS; i += blockDim.x) {
            const int row = i / TILE_COLUMNS, at = i % TILE_COLUMNS;
            const T* from = row_of(row);
            tile[row * PITCH + at] = from != nullptr && column + at < width ? from[column + at] : T{};
        }
    }
}

// Two neighbours in a row of `width`, zero beyond it; `vectors` as in load_tile.
template <class T>
__device__ __forceinline__ Pack<T, 2> load_two(const T* row, int column, int width, bool vectors) {
    if (vectors && column < width) return load<2>(row + column);
    return {{column < width ? row[column] : T{}, column + 1 < width ? row[column + 1] : T{}}};
}

template <class T>
__device__ __forceinline__ void store_two(T* row, int column, int width, const Pack<T, 2>& two, bool vectors) {
    if (vectors && column < width) {
        store(row + column, two);
    } else {
        if (column < width) row[column] = two.values[0];
        if (column + 1 < width) row[column + 1] = two.values[1];
    }
}

// Products ---------------------------------------------------------------------------------------------------------------------

// c += left right^T, for tiles of TILE_DEPTH columns (their pitch is pitch_of<T>(TILE_DEPTH)).
template <int TILE_DEPTH, int TILES_M, int TILES_N, class T>
__device__ __forceinline__ void multiply_rows(float (&c)[TILES_M][TILES_N][4], const T* left, const T* right) {
    static_assert(TILE_DEPTH % 16 == 0 && TILES_N % 2 == 0, "one load brings 16 depths of two tiles");
    constexpr int PITCH = pitch_of<T>(TILE_DEPTH);
    const int lane = lane_index();
    left += lane % 16 * PITCH + lane / 16 * 8;
    right += (lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (int depth = 0; depth < TILE_DEPTH; depth += 16) {
        unsigned rows[TILES_M][4];
#pragma unroll
        for (int m = 0; m < TILES_M; ++m) load_matrices(rows[m], left + m * 16 * PITCH + depth);
#pragma unroll
        for (int n = 0; n < TILES_N; n += 2) {
            unsigned words[4];
            load_matrices(words, right + n * 8 * PITCH + depth);
            const unsigned columns[2][2] = {{words[0], words[1]}, {words[2], words[3]}};
#pragma unroll
            for (int m = 0; m < TILES_M; ++m) {
                mma_16x8x16(c[m][n], rows[m], columns[0], T{});
                mma_16x8x16(c[m][n + 1], rows[m], columns[1], T{});
            }
        }
    }
}

template <int TILE_DEPTH, int TILES_M, int TILES_N>
__device__ __forceinline__ void multiply_rows(float (&c)[TILES_M][TILES_N][4], const float* left, const float* right) {
    constexpr int PITCH = pitch_of<float>(TILE_DEPTH);
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 2
    for (int depth = 0; depth < TILE_DEPTH; depth += 4) {
        Pack<float, 4> rows[TILES_M][2];
#pragma unroll
        for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
            for (int h = 0; h < 2; ++h) rows[m][h] = load<4>(left + (m * 16 + h * 8 + g) * PITCH + depth);
        }
#pragma unroll
        for (int n = 0; n < TILES_N; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const Pack<float, 4> column = load<4>(right + (n * 8 + 2 * t + j) * PITCH + depth);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
#pragma unroll
                    for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
                        for (int h = 0; h < 2; ++h) c[m][n][2 * h + j] += rows[m][h].values[i] * column.values[i];
                    }
                }
            }
        }
    }
}

// A result, element by element, as the left operand of the next product: what a lane has of it is what the lane needs.
template <class T, int TILES_M, int TILES_K>
struct LeftOperand {
    unsigned words[TILES_M][TILES_K][2];

    // Sets row g + 8h of a tile at columns 2t and 2t + 1; returns the sum of what they were rounded to.
    __device__ __forceinline__ float set(int m, int k, int h, float left, float right) {
        const unsigned word = words[m][k][h] = word_of(left, right, T{});
        return to_float(T{static_cast<unsigned short>(word)}) + to_float(T{static_cast<unsigned short>(word >> 16)});
    }
};

template <int TILES_M, int TILES_K>
struct LeftOperand<float, TILES_M, TILES_K> {
    float values[TILES_M][TILES_K][4];

    __device__ __forceinline__ float set(int m, int k, int h, float left, float right) {
        values[m][k][2 * h] = left;
        values[m][k][2 * h + 1] = right;
        return left + right;
    }
};

// c += left right, for a tile of 8 TILES_K rows and as many columns as c has (its pitch is pitch_of<T> of these).
template <int TILES_M, int TILES_K, int TILES_N, class T>
__device__ __forceinline__ void multiply(
    float (&c)[TILES_M][TILES_N][4], const LeftOperand<T, TILES_M, TILES_K>& left, const T* right) {
    static_assert(TILES_K % 2 == 0 && TILES_N % 2 == 0, "one load brings 16 depths of two tiles");
    constexpr int PITCH = pitch_of<T>(TILES_N * 8);
    const int lane = lane_index();
    right += lane % 16 * PITCH + lane / 16 * 8;
#pragma unroll
    for (int k = 0; k < TILES_K; k += 2) {
#pragma unroll
        for (int n = 0; n < TILES_N; n += 2) {
            unsigned words[4];
            load_matrices_transposed(words, right + k * 8 * PITCH + n * 8);
            const unsigned columns[2][2] = {{words[0], words[1]}, {words[2], words[3]}};
#pragma unroll
            for (int m = 0; m < TILES_M; ++m) {
                const auto &low = left.words[m][k], &high = left.words[m][k + 1];
                const unsigned rows[4] = {low[0], low[1], high[0], high[1]};
                mma_16x8x16(c[m][n], rows, columns[0], T{});
                mma_16x8x16(c[m][n + 1], rows, columns[1], T{});
            }
        }
    }
}

template <int TILES_M, int TILES_K, int TILES_N>
__device__ __forceinline__ void multiply(
    float (&c)[TILES_M][TILES_N][4], const LeftOperand<float, TILES_M, TILES_K>& left, const float* right) {
    constexpr int PITCH = pitch_of<float>(TILES_N * 8);
    const int t = lane_index() % 4;
#pragma unroll
    for (int k = 0; k < TILES_K; ++k) {
#pragma unroll
        for (int depth = 0; depth < 8; ++depth) {
            float row[TILES_M][2];  // one of the four lanes of a row holds this depth
#pragma unroll
            for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    row[m][h] = __shfl_sync(0xffffffffu, left.values[m][k][2 * h + depth % 2], depth / 2, 4);
                }
            }
#pragma unroll
            for (int n = 0; n < TILES_N; ++n) {
                const Pack<float, 2> columns = load<2>(right + (k * 8 + depth) * PITCH + n * 8 + 2 * t);
#pragma unroll
                for (int m = 0; m < TILES_M; ++m) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
#pragma unroll
                        for (int j = 0; j < 2; ++j) c[m][n][2 * h + j] += row[m][h] * columns.values[j];
                    }
                }
            }
        }
    }
}
