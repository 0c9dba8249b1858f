// The steps of the prefill attention, on 8x8 fragments.
//
// A lane holds two neighbouring elements of every fragment: of row `row`, from column `column` on.
// Metal does not document that map; MLX's own attention relies on the same. Everything is float32
// in the fragments, whatever T is. Scores are in base 2, and -FLT_MAX stands for "no key yet", as
// in decode_common.
using Pair = vec<float, 2>;

METAL_FUNC int fragment_row(int lane) {
  return (lane / 4 & 4) + lane / 2 % 4;
}

METAL_FUNC int fragment_column(int lane) {
  return (lane / 4 & 2) * 2 + lane % 2 * 2;
}

// The softmax of 8 queries over the keys that a simdgroup has met so far. m, the largest score, is
// the same in the four lanes of a row; l, the sum of weights, is still a lane's own share.
template <int TV>
struct Softmax {
  Pair o[TV];
  float m;
  float l;
};

template <typename T>
METAL_FUNC Pair pair_of(const threadgroup T* from) {
  return vec<float, 2>(static_cast<float>(from[0]), static_cast<float>(from[1]));
}

// c += a b. All lanes of a simdgroup take part.
METAL_FUNC void add_product(const thread Pair& a, const thread Pair& b, thread Pair& c) {
  simdgroup_matrix<float, 8, 8> left, right, sum;
  for (int e = 0; e < 2; ++e) {
    left.thread_elements()[e] = a[e];
    right.thread_elements()[e] = b[e];
    sum.thread_elements()[e] = c[e];
  }
  simdgroup_multiply_accumulate(sum, left, right, sum);
  for (int e = 0; e < 2; ++e) {
    c[e] = sum.thread_elements()[e];
  }
}

// Four elements from number 4 * chunk on of a row of a tile, zero beyond the n rows that the tile
// has: a row that is not live may hold anything, and zero times anything is not zero.
template <typename T>
METAL_FUNC void load_chunk(
    const device T* rows, int row, int n, int chunk, int stride, int step, thread T* to) {
  if (row < n) {
    load_run<T, 4, 4, const device vec<T, 4>*>(
        rows + row * size_t(stride) + chunk * 4 * step, step, to);
  } else {
    for (int e = 0; e < 4; ++e) {
      to[e] = static_cast<T>(0.0f);
    }
  }
}

// Which of the TK fragments of a tile of n keys any of the queries first .. last sees: bit j stands
// for keys 8 j to 8 j + 7. Tokens and queries count from the first query of the threadgroup.
template <int TK>
METAL_FUNC uint fragments_met(const thread Sight& sight, int n, int first, int last) {
  uint met = 0;
  for (int j = 0; j < TK; ++j) {
    const int from = sight.token + 8 * j;
    const int to = min(from + 7, sight.token + n - 1);
    if (8 * j < n && from <= last && to > first - sight.reach) {
      met |= 1u << j;
    }
  }
  return met;
}

// Scores of 8 queries and the fragments of keys that are met: q has its queries in rows, k its keys
// in columns, both from the lane's own place on.
template <typename T, int TD, int TK, int LDQ, int LDK, bool EDGE>
METAL_FUNC void score(
    const threadgroup T* q, const threadgroup T* k, uint met, thread Pair* scores) {
  for (int j = 0; j < TK; ++j) {
    scores[j] = vec<float, 2>(0.0f, 0.0f);
  }
  for (int d = 0; d < TD; ++d) {
    const Pair left = pair_of<T>(q + d * 8);
    for (int j = 0; j < TK; ++j) {
      if (!EDGE || (met >> j & 1) != 0) {
        const Pair right = pair_of<T>(k + d * 8 * LDK + j * 8);
        add_product(left, right, scores[j]);
      }
    }
  }
}

// Turns scores into weights under the largest score so far, and fades what was summed before.
// Keys that a query does not see, and fragments that are not met, weigh nothing.
template <int TK, bool EDGE, bool SOFTCAP, int TV>
METAL_FUNC void weigh(
    thread Softmax<TV>& sums,
    thread Pair* scores,
    const thread Sight& sight,
    int n,
    int query,
    int column,
    uint met,
    float factor,
    float cap) {
  bool seen[TK * 2];
  float top = -FLT_MAX;
  for (int j = 0; j < TK; ++j) {
    for (int e = 0; e < 2; ++e) {
      float x = scores[j][e] * factor;
      if (SOFTCAP) {
        x = cap * precise::tanh(x);
      }
      scores[j][e] = x;
      const int key = j * 8 + column + e;
      const int token = sight.token + key;
      seen[j * 2 + e] = !EDGE || ((met >> j & 1) != 0 && key < n && token <= query &&
                                  token > query - sight.reach);
      top = max(top, seen[j * 2 + e] ? x : -FLT_MAX);
    }
  }
  top = max(top, simd_shuffle_xor(top, ushort(1)));
  top = max(top, simd_shuffle_xor(top, ushort(8)));
  top = max(top, sums.m);
  const float fade = fast::exp2(sums.m - top);
  sums.m = top;
  sums.l *= fade;
  for (int i = 0; i < TV; ++i) {
    sums.o[i] *= fade;
  }
  for (int j = 0; j < TK; ++j) {
    for (int e = 0; e < 2; ++e) {
      scores[j][e] = seen[j * 2 + e] ? fast::exp2(scores[j][e] - top) : 0.0f;
      sums.l += scores[j][e];
    }
  }
}

// Adds the values of the fragments that are met, as much as they weigh: v has its keys in rows, from
// the lane's own place on.
template <typename T, int TK, int LDV, bool EDGE, int TV>
METAL_FUNC void add_values(
    thread Softmax<TV>& sums, const thread Pair* weights, const threadgroup T* v, uint met) {
  for (int j = 0; j < TK; ++j) {
    if (!EDGE || (met >> j & 1) != 0) {
      for (int i = 0; i < TV; ++i) {
        const Pair right = pair_of<T>(v + j * 8 * LDV + i * 8);
        add_product(weights[j], right, sums.o[i]);
      }
    }
  }
}
