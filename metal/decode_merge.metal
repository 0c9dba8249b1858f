// Decode attention over a sink ring, pass 2: the splits of pass 1 become one softmax.
//
// partials [B * HKV, splits, R, DV + 2] float32, as pass 1 leaves them; R = G * L.
// learned [H or more] float32: learned sink logits. out [B, H, L, DV].
//
// grid (32 * R, HKV, B), threadgroup (32, 1, 1). A threadgroup is one simdgroup and owns one query
// row; a lane owns every 32nd dimension of it.
constexpr int R = G * L;
constexpr int E = (DV + 31) / 32;
const int lane = int(thread_index_in_simdgroup);
const int row = int(threadgroup_position_in_grid.x);
const int hk = int(threadgroup_position_in_grid.y);
const size_t head = size_t(threadgroup_position_in_grid.z) * threadgroups_per_grid.y + size_t(hk);
const int splits = partials_shape[1];
const size_t stride = size_t(R) * (DV + 2);
const device float* part = partials + head * splits * stride + size_t(row) * (DV + 2);

float m = -FLT_MAX;
for (int s = 0; s < splits; ++s) {
  m = max(m, part[s * stride + DV]);
}
float l = 0.0f;
float o[E];
for (int i = 0; i < E; ++i) {
  o[i] = 0.0f;
}
for (int s = 0; s < splits; ++s) {
  const device float* from = part + s * stride;
  const float fade = fast::exp2(from[DV] - m);
  l += from[DV + 1] * fade;
  for (int i = 0; i < E; ++i) {
    if (lane + 32 * i < DV) {
      o[i] += from[lane + 32 * i] * fade;
    }
  }
}
float factor = 1.0f;
if (LSINK) {
  const vec<float, 2> sunk = with_learned_sink(m, l, learned[hk * G + row / L]);
  factor = sunk[0];
  l = sunk[1];
}
factor = l > 0.0f ? factor / l : 0.0f;
for (int i = 0; i < E; ++i) {
  if (lane + 32 * i < DV) {
    out[(head * R + row) * DV + lane + 32 * i] = static_cast<OUT>(o[i] * factor);
  }
}
