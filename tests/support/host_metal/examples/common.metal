// Sum of the squares of N values that a thread keeps.
template <int N>
METAL_FUNC float sum_of_squares(const thread float* values) {
  float sum = 0.0f;
  for (int i = 0; i < N; ++i) {
    sum += values[i] * values[i];
  }
  return sum;
}

// N values from device memory, 4 at a time.
template <typename T, int N>
METAL_FUNC void load_run(const device T* from, thread float* to) {
  for (int i = 0; i < N; i += 4) {
    const vec<T, 4> part = *reinterpret_cast<const device vec<T, 4>*>(from + i);
    for (int j = 0; j < 4; ++j) {
      to[i + j] = static_cast<float>(part[j]);
    }
  }
}
