// Prefill attention over a sink ring: the queries of a chunk, in tiles, against the rows they see.
//
// q [B, H, L, D], k [B, HKV, N, D], v [B, HKV, N, DV]; HKV divides H.
// ranges [B or 1, tiles, 8, 8] int32: for each tile of BQ queries up to 8 runs of rows, in the order
//   they are met; no other row is loaded. Columns:
//   0 first row, 1 rows, 2 turn (0 none, 1 previous epoch, 2 sinks), 3 token, 4 reach (a Sight's,
//   counted from the tile's first query), 5 and 6 the part [from, to) that the whole tile sees.
// k and v may be strided. q and the tables are contiguous.
// turns [B or 1, (1 + L) * DIMS or more] float32: DIMS / 2 cosines and as many sines for turn 1,
//   then as many for turn 2 of each query.
// learned [H or more] float32: learned sink logits. scalars [8] float32: factor on scores, softcap,
//   both with log2(e) where the score ends.
// out [B, H, L, DV].
//
// grid (32 * SG * tiles, H, B), threadgroup (32 * SG, 1, 1).
// A threadgroup owns BQ = 8 * SG queries of one head, a simdgroup 8 of them. The tile's queries,
// turned as the range asks, lie in threadgroup memory, and with them BK keys (dimensions in rows),
// then the same keys' values. Tiles of keys that every query sees are FULL: nothing is compared.
// The others are EDGE tiles: tokens are compared, and fragments of 8 queries and 8 keys of which no
// query sees a key are left out.
constexpr int BQ = 8 * SG;
constexpr int TD = D / 8;
constexpr int TV = DV / 8;
constexpr int TK = BK / 8;
constexpr int PAD = 16 / int(sizeof(T));
constexpr int LDQ = D + PAD;
constexpr int LDK = BK + PAD;
constexpr int LDV = DV + PAD;
constexpr int HELD = D * LDK > BK * LDV ? D * LDK : BK * LDV;

threadgroup T q_tile[BQ * LDQ];
threadgroup T kv_tile[HELD];

const int lane_row = fragment_row(int(thread_index_in_simdgroup));
const int column = fragment_column(int(thread_index_in_simdgroup));
const int mine = int(thread_index_in_threadgroup);
const int row0 = int(simdgroup_index_in_threadgroup) * 8;
const int tile = int(threadgroup_position_in_grid.x);
const int h = int(threadgroup_position_in_grid.y);
const int b = int(threadgroup_position_in_grid.z);
const int L = q_shape[2];
const int rows = min(BQ, L - tile * BQ);
const int hk = h / (int(threadgroups_per_grid.y) / k_shape[1]);
const size_t first_row = (size_t(b) * threadgroups_per_grid.y + size_t(h)) * L + tile * BQ;

const device T* q_rows = q + first_row * D;
const device T* k_rows = k + b * size_t(k_strides[0]) + hk * size_t(k_strides[1]);
const device T* v_rows = v + b * size_t(v_strides[0]) + hk * size_t(v_strides[1]);
const int k_row = int(k_strides[2]);
const int v_row = int(v_strides[2]);
const int k_step = int(k_strides[3]);
const int v_step = int(v_strides[3]);
const device int* table = ranges + ((ranges_shape[0] == 1 ? 0 : b) * ranges_shape[1] + tile) * 64;
const device float* turn_rows = turns + (turns_shape[0] == 1 ? 0 : b * size_t(turns_shape[1]));

Softmax<TV> sums;
sums.m = -FLT_MAX;
sums.l = 0.0f;
for (int i = 0; i < TV; ++i) {
  sums.o[i] = vec<float, 2>(0.0f, 0.0f);
}

int turn = -1;
for (int i = 0; i < 8; ++i) {
  const device int* range = table + i * 8;
  const int length = range[1];
  if (length == 0) {
    break;
  }
  if (range[2] != turn) {
    // Nobody reads the queries any more: two barriers have passed since the last scores.
    turn = range[2];
    for (int c = mine; c < BQ * D / 4; c += 32 * SG) {
      const int row = c / (D / 4);
      const int dim = c % (D / 4) * 4;
      float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (row < rows) {
        const size_t by = turn == 2 ? 1 + tile * BQ + row : 0;
        load_query<T, 4, DIMS, INTERLEAVED>(
            q_rows + row * D, turn_rows + by * DIMS, turn != 0, dim, 1.0f, part);
      }
      for (int e = 0; e < 4; ++e) {
        q_tile[row * LDQ + dim + e] = static_cast<T>(part[e]);
      }
    }
  }
  Sight sight;
  sight.reach = range[4];
  for (int at = 0; at < length; at += BK) {
    const int n = min(BK, length - at);
    const int held = (n + 7) / 8 * 8;
    const bool full = at >= range[5] && at + BK <= range[6];
    sight.token = range[3] + at;
    T part[4];
    Pair scores[TK];
    uint met = 0;

    threadgroup_barrier(mem_flags::mem_threadgroup);
    const device T* keys = k_rows + (range[0] + at) * size_t(k_row);
    for (int c = mine; c < held * (D / 4); c += 32 * SG) {
      const int key = c / (D / 4);
      const int chunk = c % (D / 4);
      load_chunk<T>(keys, key, n, chunk, k_row, k_step, part);
      for (int e = 0; e < 4; ++e) {
        kv_tile[(chunk * 4 + e) * LDK + key] = part[e];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (row0 < rows) {
      const threadgroup T* q_at = q_tile + (row0 + lane_row) * LDQ + column;
      const threadgroup T* k_at = kv_tile + lane_row * LDK + column;
      const int query = row0 + lane_row;
      if (full) {
        score<T, TD, TK, LDQ, LDK, false>(q_at, k_at, met, scores);
        weigh<TK, false, SOFTCAP>(
            sums, scores, sight, n, query, column, met, scalars[0], scalars[1]);
      } else {
        met = fragments_met<TK>(sight, n, row0, min(row0 + 7, rows - 1));
        score<T, TD, TK, LDQ, LDK, true>(q_at, k_at, met, scores);
        weigh<TK, true, SOFTCAP>(
            sums, scores, sight, n, query, column, met, scalars[0], scalars[1]);
      }
    }

    threadgroup_barrier(mem_flags::mem_threadgroup);
    const device T* values = v_rows + (range[0] + at) * size_t(v_row);
    for (int c = mine; c < held * (DV / 4); c += 32 * SG) {
      const int key = c / (DV / 4);
      const int chunk = c % (DV / 4);
      load_chunk<T>(values, key, n, chunk, v_row, v_step, part);
      for (int e = 0; e < 4; ++e) {
        kv_tile[key * LDV + chunk * 4 + e] = part[e];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const threadgroup T* v_at = kv_tile + lane_row * LDV + column;
    if (full && row0 < rows) {
      add_values<T, TK, LDV, false>(sums, scores, v_at, met);
    } else if (met != 0) {
      add_values<T, TK, LDV, true>(sums, scores, v_at, met);
    }
  }
}

// Four lanes share a row.
float l = sums.l;
l += simd_shuffle_xor(l, ushort(1));
l += simd_shuffle_xor(l, ushort(8));
float factor = 1.0f;
if (LSINK) {
  const vec<float, 2> sunk = with_learned_sink(sums.m, l, learned[h]);
  factor = sunk[0];
  l = sunk[1];
}
factor = l > 0.0f ? factor / l : 0.0f;
const int row = row0 + lane_row;
if (row < rows) {
  for (int i = 0; i < TV; ++i) {
    for (int e = 0; e < 2; ++e) {
      out[(first_row + row) * DV + i * 8 + column + e] =
          static_cast<T>(sums.o[i][e] * factor);
    }
  }
}
