// What the two passes of the decode attention share.
//
// Scores are in base 2: they carry log2(e), so that exp2 gives the weights. -FLT_MAX stands for
// "no key yet": infinities would meet fast:: functions, which need not know them.

// The softmax of ROWS query rows over the keys that one simdgroup has met so far. A lane owns EK
// consecutive dimensions of every query and EV of every output. m, the largest score, is the same
// in all lanes; l, the sum of weights, is still a lane's own share.
template <int ROWS, int EK, int EV>
struct Rows {
  float q[ROWS][EK];
  float o[ROWS][EV];
  float m[ROWS];
  float l[ROWS];
};

// Which of a run of keys a query may see. Tokens count from the call's first query.
struct Sight {
  bool edge;  // compare at all; otherwise every query sees every key
  int token;  // of the first key
  int reach;  // query j sees tokens j - reach + 1 .. j
};

// E elements of a row, `step` apart. Neighbours (step 1) come W at a time: V points to vectors of
// W, in the address space of P.
template <typename T, int E, int W, typename V, typename P>
METAL_FUNC void load_run(P from, int step, thread T* to) {
  if (step != 1) {
    for (int e = 0; e < E; ++e) {
      to[e] = from[e * step];
    }
    return;
  }
  for (int i = 0; i < E / W; ++i) {
    const vec<T, W> part = reinterpret_cast<V>(from)[i];
    for (int j = 0; j < W; ++j) {
      to[i * W + j] = part[j];
    }
  }
}

// Where rows lie: in device memory, in the dtype of the model. They may be strided: whole vectors
// are loaded where a row's elements are neighbours and rows begin where vectors may.
template <typename T>
struct PlainRows {
  const device T* first;
  const device T* here;  // the row that rows are counted from
  int row;               // from one row to the next
  int step;              // from one element of a row to the next
};

// Rows one after the other in threadgroup memory.
template <typename T>
struct StagedRows {
  const threadgroup T* here;
  int row;
};

template <typename T>
METAL_FUNC void stand_at(thread PlainRows<T>& rows, size_t row) {
  rows.here = rows.first + row * rows.row;
}

// E elements of a row, from element `at` on.
template <int E, typename T>
METAL_FUNC void load_elements(const thread PlainRows<T>& rows, int row, int at, thread T* to) {
  constexpr int W = E % 4 == 0 ? 4 : 2;
  load_run<T, E, W, const device vec<T, W>*>(
      rows.here + row * rows.row + at * rows.step, rows.step, to);
}

template <int E, typename T>
METAL_FUNC void load_elements(const thread StagedRows<T>& rows, int row, int at, thread T* to) {
  constexpr int W = E % 4 == 0 ? 4 : 2;
  load_run<T, E, W, const threadgroup vec<T, W>*>(rows.here + row * rows.row + at, 1, to);
}

// A lane's E dimensions of the first n of TK rows, zero for the rest: a slot that is not live may
// hold anything, and zero times anything is not zero. Idle lanes, beyond the head, get zeros.
template <int TK, int E, typename T, typename From>
METAL_FUNC void load_tile(const thread From& rows, int at, int n, bool idle, thread T* tile) {
  const int held = idle ? 0 : n;
  if (held >= TK) {
    for (int j = 0; j < TK; ++j) {
      load_elements<E>(rows, j, at, tile + j * E);
    }
    return;
  }
  for (int j = 0; j < TK; ++j) {
    if (j < held) {
      load_elements<E>(rows, j, at, tile + j * E);
    } else {
      for (int e = 0; e < E; ++e) {
        tile[j * E + e] = static_cast<T>(0.0f);
      }
    }
  }
}

// A lane's EK dimensions of one query, turned by a row of cos and sin (DIMS / 2 of each) if there
// is one to turn by, and scaled.
template <typename T, int EK, int DIMS, bool INTERLEAVED>
METAL_FUNC void load_query(
    const device T* q,
    const device float* turn,
    bool turned,
    int first,
    float scale,
    thread float* to) {
  for (int e = 0; e < EK; ++e) {
    const int d = first + e;
    float x = static_cast<float>(q[d]);
    if (turned && d < DIMS) {
      const bool second = INTERLEAVED ? d % 2 == 1 : d >= DIMS / 2;
      const int distance = INTERLEAVED ? 1 : DIMS / 2;
      const int pair = INTERLEAVED ? d / 2 : (second ? d - distance : d);
      const float y = static_cast<float>(q[second ? d - distance : d + distance]);
      const float sine = turn[DIMS / 2 + pair];
      x = x * turn[pair] + y * (second ? sine : -sine);
    }
    to[e] = x * scale;
  }
}

// Adds TK values up over the 32 lanes at once: at each step lanes that differ in one bit share
// out what is left, so TK - 1 shuffles and then log2(32 / TK) serve instead of TK sums.
// Returns the sum of value number lane / (32 / TK). All lanes of a simdgroup take part.
template <int TK>
METAL_FUNC float sum_each(thread float* values, uint lane) {
  ushort bit = 16;
  for (int left = TK / 2; left > 0; left /= 2) {
    const bool upper = (lane & bit) != 0;
    for (int j = 0; j < left; ++j) {
      const float mine = upper ? values[left + j] : values[j];
      const float yours = upper ? values[j] : values[left + j];
      values[j] = mine + simd_shuffle_xor(yours, bit);
    }
    bit /= 2;
  }
  float sum = values[0];
  for (; bit > 0; bit /= 2) {
    sum += simd_shuffle_xor(sum, bit);
  }
  return sum;
}

// Takes the first n of a tile of TK keys into the softmax of a simdgroup's rows, of which the
// first is query row `row0` of the kv head. All lanes of a simdgroup take part.
template <typename T, int L, int TK, bool SOFTCAP, int ROWS, int EK, int EV>
METAL_FUNC void attend_tile(
    thread Rows<ROWS, EK, EV>& rows,
    const thread T* k,
    const thread T* v,
    int n,
    const thread Sight& sight,
    int row0,
    float cap,
    uint lane) {
  constexpr int SHARE = 32 / TK;  // lanes that hold the score of the same key
  const int key = int(lane) / SHARE;
  for (int r = 0; r < ROWS; ++r) {
    float scores[TK];
    for (int j = 0; j < TK; ++j) {
      scores[j] = 0.0f;
      for (int e = 0; e < EK; ++e) {
        scores[j] += rows.q[r][e] * static_cast<float>(k[j * EK + e]);
      }
    }
    float score = sum_each<TK>(scores, lane);
    if (SOFTCAP) {
      score = cap * precise::tanh(score);
    }
    bool seen = key < n;
    if (sight.edge) {
      const int query = (row0 + r) % L;
      const int token = sight.token + key;
      seen = seen && token <= query && token > query - sight.reach;
    }
    float top = seen ? score : -FLT_MAX;
    for (ushort bit = 16; bit >= SHARE; bit /= 2) {
      top = max(top, simd_shuffle_xor(top, bit));
    }
    top = max(top, rows.m[r]);
    const float fade = fast::exp2(rows.m[r] - top);
    const float weight = seen ? fast::exp2(score - top) : 0.0f;
    rows.m[r] = top;
    rows.l[r] = rows.l[r] * fade + weight;
    for (int e = 0; e < EV; ++e) {
      rows.o[r][e] *= fade;
    }
    for (int j = 0; j < TK; ++j) {
      const float p = simd_shuffle(weight, ushort(j * SHARE));
      for (int e = 0; e < EV; ++e) {
        rows.o[r][e] += p * static_cast<float>(v[j * EV + e]);
      }
    }
  }
}

// What a learned sink does to a softmax: a key without a value, whose score is the logit.
// Returns the factor on everything so far, and the new sum of weights.
METAL_FUNC vec<float, 2> with_learned_sink(float m, float l, float logit) {
  const float score = logit * M_LOG2E_F;
  const float top = max(m, score);
  const float fade = fast::exp2(m - top);
  return vec<float, 2>(fade, l * fade + fast::exp2(score - top));
}
