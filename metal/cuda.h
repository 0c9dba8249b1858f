// What the kernel text takes for granted of the Metal library, for CUDA: `source.py` puts this
// before a text whose words for address spaces it has taken out. Words of Metal's that CUDA's own
// headers use (`device` among them) are never defined here. It comes after MLX's and CUDA's
// headers, and outside of any namespace.

#define METAL_FUNC __device__ __forceinline__

#define thread_index_in_simdgroup (threadIdx.x % 32)
#define simdgroup_index_in_threadgroup (threadIdx.x / 32)
#define thread_index_in_threadgroup (threadIdx.x)
#define threadgroup_position_in_grid blockIdx
#define threadgroups_per_grid gridDim
#define threadgroup_barrier(memory) __syncthreads()

#ifndef FLT_MAX
#define FLT_MAX 3.402823466e+38F
#endif
#define M_LOG2E_F 1.44269504088896340736F

typedef unsigned char uchar;
typedef unsigned int uint;
typedef unsigned short ushort;

// Loaded and stored at once, as Metal's vectors are. Nothing is done where one is declared, as
// shared memory requires.
template <typename T, int N>
struct alignas(sizeof(T) * N) vec {
  T values[N];

  vec() = default;

  template <typename... Values>
  __device__ explicit vec(T first, Values... others) : values{first, others...} {}

  __device__ T operator[](int i) const {
    return values[i];
  }
};

namespace fast {
METAL_FUNC float exp2(float x) {
  return exp2f(x);
}
} // namespace fast

namespace precise {
METAL_FUNC float tanh(float x) {
  return tanhf(x);
}
} // namespace precise

// All lanes of a warp call these together.
METAL_FUNC float simd_shuffle_xor(float x, ushort bits) {
  return __shfl_xor_sync(0xffffffffu, x, bits);
}

METAL_FUNC float simd_shuffle(float x, ushort lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
