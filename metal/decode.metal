// Decode attention over a sink ring, pass 1: up to 8 new tokens against the live rows of a ring.
//
// The first part of the body, in another file, says what `keys` and `values` are: the rows of kv
// head `hk` of sequence `b`, D and DV elements each.
// q [B, H, L, D]; H = G * HKV.
// ranges [B or 1, 8, 8] int32: up to 8 runs of live rows, in the order they are met. Columns:
//   0 first row, 1 rows, 2 turn (0 none, 1 previous epoch, 2 sinks), 3 edge, 4 token, 5 reach
//   (the last three are a Sight).
//   q and the tables are contiguous.
// turns [B or 1, 2 * L * DIMS or more] float32: for turns 1 and 2, for each query, DIMS / 2 cosines
//   and as many sines.
// learned [H or more] float32: learned sink logits. scalars [8] float32: factor on q, softcap,
//   both with log2(e) where the score ends.
// out, SINGLE: [B, H, L, DV]. Otherwise partials [B * HKV, splits, G * L, DV + 2] float32:
//   outputs not yet divided, largest score, sum of weights.
//
// grid (32 * KS * RG * splits, HKV, B), threadgroup (32 * KS * RG, 1, 1).
// A threadgroup owns the G * L query rows of one kv head of one sequence, and one split of its
// keys, in range order. With RG == 1 each of KS simdgroups owns all the rows, and a slice of the
// split: every key goes from memory to one simdgroup. With more rows than one simdgroup's
// registers hold, RG simdgroups own ROWS rows each, and share tiles of keys through threadgroup
// memory (KS == 1). A lane owns EK dimensions of q and k, EV of v and out.
constexpr int R = G * L;
constexpr int STEP = RG > 1 ? TILE : TK;
constexpr int GIVEN = KS > 1 ? KS / 2 * ROWS : 1;
constexpr int STAGED = RG > 1 ? TILE * (D + DV) / 4 : 1;

threadgroup float given_o[GIVEN * DV];
threadgroup float given_ml[GIVEN * 2];
threadgroup vec<T, 4> staged[STAGED];

const uint lane = thread_index_in_simdgroup;
const int sg = int(simdgroup_index_in_threadgroup);
const int slice = sg / RG;
const int row0 = (sg % RG) * ROWS;
const int split = int(threadgroup_position_in_grid.x);
const int splits = int(threadgroups_per_grid.x);
const size_t head = size_t(b) * threadgroups_per_grid.y + size_t(hk);

const device T* q_rows = q + head * R * D;
const device int* table = ranges + (ranges_shape[0] == 1 ? 0 : b) * 64;
const device float* turn_rows = turns + (turns_shape[0] == 1 ? 0 : b * turns_shape[1]);

// Lanes beyond the head own nothing; they stand at 0, where nothing of theirs is used.
const bool idle_k = int(lane) * EK >= D;
const bool idle_v = int(lane) * EV >= DV;
const int first_k = idle_k ? 0 : int(lane) * EK;
const int first_v = idle_v ? 0 : int(lane) * EV;

// This slice's keys, [begin, end) of the live ones.
int live = 0;
for (int i = 0; i < 8; ++i) {
  live += table[i * 8 + 1];
}
const int parts = splits * KS;
const int size = ((live + parts - 1) / parts + STEP - 1) / STEP * STEP;
const int begin = min(live, (split * KS + slice) * size);
const int end = min(live, begin + size);

Rows<ROWS, EK, EV> rows;
for (int r = 0; r < ROWS; ++r) {
  rows.m[r] = -FLT_MAX;
  rows.l[r] = 0.0f;
  for (int e = 0; e < EK; ++e) {
    rows.q[r][e] = 0.0f;
  }
  for (int e = 0; e < EV; ++e) {
    rows.o[r][e] = 0.0f;
  }
}

T k_tile[TK * EK];
T v_tile[TK * EV];
int base = 0;
for (int i = 0; i < 8; ++i) {
  const device int* range = table + i * 8;
  const int low = max(begin - base, 0);
  const int high = min(end - base, range[1]);
  base += range[1];
  if (low >= high) {
    continue;
  }
  const int turn = range[2];
  for (int r = 0; r < ROWS; ++r) {
    // Rows beyond the last repeat it; they are not stored.
    const int row = min(row0 + r, R - 1);
    const device float* by = turn_rows + (max(turn - 1, 0) * L + row % L) * DIMS;
    load_query<T, EK, DIMS, INTERLEAVED>(
        q_rows + row * D, by, turn != 0, first_k, idle_k ? 0.0f : scalars[0], rows.q[r]);
  }
  Sight sight;
  sight.edge = range[3] != 0;
  sight.reach = range[5];
  if (RG == 1) {
    for (int at = low; at < high; at += TK) {
      const int n = min(TK, high - at);
      const size_t row = size_t(range[0] + at);
      stand_at(keys, row);
      stand_at(values, row);
      load_tile<TK, EK>(keys, first_k, n, idle_k, k_tile);
      load_tile<TK, EV>(values, first_v, n, idle_v, v_tile);
      sight.token = range[4] + at;
      attend_tile<T, L, TK, SOFTCAP>(
          rows, k_tile, v_tile, n, sight, row0, scalars[1], lane);
    }
  } else {
    // All simdgroups have the same slice, so all of them meet at these barriers.
    StagedRows<T> k_staged;
    k_staged.row = D;
    StagedRows<T> v_staged;
    v_staged.row = DV;
    T part[4];
    for (int at = low; at < high; at += TILE) {
      const int n = min(TILE, high - at);
      const size_t row = size_t(range[0] + at);
      stand_at(keys, row);
      stand_at(values, row);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int c = int(thread_index_in_threadgroup); c < n * D / 4; c += 32 * RG) {
        load_elements<4>(keys, c / (D / 4), c % (D / 4) * 4, part);
        staged[c] = vec<T, 4>(part[0], part[1], part[2], part[3]);
      }
      for (int c = int(thread_index_in_threadgroup); c < n * DV / 4; c += 32 * RG) {
        load_elements<4>(values, c / (DV / 4), c % (DV / 4) * 4, part);
        staged[TILE * D / 4 + c] = vec<T, 4>(part[0], part[1], part[2], part[3]);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int t = 0; t < n; t += TK) {
        k_staged.here = reinterpret_cast<const threadgroup T*>(staged) + t * D;
        v_staged.here = reinterpret_cast<const threadgroup T*>(staged) + TILE * D + t * DV;
        load_tile<TK, EK>(k_staged, first_k, n - t, idle_k, k_tile);
        load_tile<TK, EV>(v_staged, first_v, n - t, idle_v, v_tile);
        sight.token = range[4] + at + t;
        attend_tile<T, L, TK, SOFTCAP>(
            rows, k_tile, v_tile, n - t, sight, row0, scalars[1], lane);
      }
    }
  }
}

// Of the lanes that share a key one counts: bits below 32 / TK are left out.
for (int r = 0; r < ROWS; ++r) {
  for (ushort bit = 16; bit >= 32 / TK; bit /= 2) {
    rows.l[r] += simd_shuffle_xor(rows.l[r], bit);
  }
}

// The slices' rows are merged pairwise: the upper half gives, the lower half takes.
for (int half_of = KS / 2; half_of > 0; half_of /= 2) {
  if (slice >= half_of && slice < 2 * half_of) {
    for (int r = 0; r < ROWS; ++r) {
      const int to = (slice - half_of) * ROWS + r;
      if (lane == 0) {
        given_ml[to * 2] = rows.m[r];
        given_ml[to * 2 + 1] = rows.l[r];
      }
      if (!idle_v) {
        for (int e = 0; e < EV; ++e) {
          given_o[to * DV + first_v + e] = rows.o[r][e];
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (slice < half_of) {
    for (int r = 0; r < ROWS; ++r) {
      const int from = slice * ROWS + r;
      const float m = max(rows.m[r], given_ml[from * 2]);
      const float mine = fast::exp2(rows.m[r] - m);
      const float theirs = fast::exp2(given_ml[from * 2] - m);
      rows.m[r] = m;
      rows.l[r] = rows.l[r] * mine + given_ml[from * 2 + 1] * theirs;
      if (!idle_v) {
        for (int e = 0; e < EV; ++e) {
          rows.o[r][e] = rows.o[r][e] * mine + given_o[from * DV + first_v + e] * theirs;
        }
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// Loops have constant ends and conditions inside, so that what they index stays in registers.
if (slice == 0) {
  for (int r = 0; r < ROWS; ++r) {
    const int row = row0 + r;
    if (row < R) {
      float factor = 1.0f;
      float l = rows.l[r];
      if (SINGLE) {
        if (LSINK) {
          const vec<float, 2> sunk = with_learned_sink(rows.m[r], l, learned[hk * G + row / L]);
          factor = sunk[0];
          l = sunk[1];
        }
        factor = l > 0.0f ? factor / l : 0.0f;
      }
      const size_t at = SINGLE ? (head * R + row) * DV
                               : ((head * splits + split) * R + row) * (DV + 2);
      if (!idle_v) {
        for (int e = 0; e < EV; ++e) {
          out[at + first_v + e] = static_cast<OUT>(rows.o[r][e] * factor);
        }
      }
      if (!SINGLE && lane == 0) {
        out[at + DV] = static_cast<OUT>(rows.m[r]);
        out[at + DV + 1] = static_cast<OUT>(l);
      }
    }
  }
}
