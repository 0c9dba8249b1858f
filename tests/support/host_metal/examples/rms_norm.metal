// x [rows, D], weight [D] -> out [rows, D], rms [rows]
// A threadgroup owns one row; a simdgroup owns D / NSG consecutive elements of it, a lane E.
constexpr int E = D / (NSG * 32);
const uint sg = simdgroup_index_in_threadgroup;
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.y;
const uint first = (sg * 32 + lane) * E;

threadgroup float partial[NSG];

float values[E];
load_run<T, E>(x + row * D + first, values);

const float sum = simd_sum(sum_of_squares<E>(values));
if (lane == 0) {
  partial[sg] = sum;
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float total = 0.0f;
for (int i = 0; i < NSG; ++i) {
  total += partial[i];
}
const float scale = precise::rsqrt(total / D + eps);
for (int i = 0; i < E; ++i) {
  const uint column = first + i;
  out[row * D + column] = static_cast<T>(values[i] * scale * static_cast<float>(weight[column]));
}
if (sg == 0 && lane == 0) {
  rms[row] = scale;
}
