// Rows of a ring whose sinks are plain, and whose other rows are quantised as MLX does: element e
// is scale * q + bias, q has BITS bits of word e * BITS / 32 from bit e * BITS % 32 on, scale and
// bias are those of group e / GS.
template <typename T, int BITS, int GS>
struct SinkRows {
  const device T* sinks;     // rows 0 to split - 1
  const device uint* words;  // these, and what follows, of the rows from `split` on
  const device T* scales;
  const device T* biases;
  int split;
  int sinks_row;  // from one row to the next
  int words_row;
  int scales_row;
  int biases_row;
  bool in_ring;  // where it stands: rows are counted from there, and are all of one kind
  const device T* sinks_here;
  const device uint* words_here;
  const device T* scales_here;
  const device T* biases_here;
};

template <typename T, int BITS, int GS>
METAL_FUNC void stand_at(thread SinkRows<T, BITS, GS>& rows, size_t row) {
  rows.in_ring = row >= size_t(rows.split);
  if (rows.in_ring) {
    const size_t n = row - size_t(rows.split);
    rows.words_here = rows.words + n * rows.words_row;
    rows.scales_here = rows.scales + n * rows.scales_row;
    rows.biases_here = rows.biases + n * rows.biases_row;
  } else {
    rows.sinks_here = rows.sinks + row * rows.sinks_row;
  }
}

// The integer of so many bytes: what a lane loads at once.
template <int BYTES>
struct Unit {
  using type = uint;
};
template <>
struct Unit<2> {
  using type = ushort;
};
template <>
struct Unit<1> {
  using type = uchar;
};

// E divides GS, and `at` is a multiple of E: all elements are in one group.
template <int E, typename T, int BITS, int GS>
METAL_FUNC void load_elements(
    const thread SinkRows<T, BITS, GS>& rows, int row, int at, thread T* to) {
  if (!rows.in_ring) {
    constexpr int W = E % 4 == 0 ? 4 : 2;
    load_run<T, E, W, const device vec<T, W>*>(rows.sinks_here + row * rows.sinks_row + at, 1, to);
    return;
  }
  constexpr int BYTES = E * BITS / 8 < 4 ? E * BITS / 8 : 4;
  constexpr int EACH = BYTES * 8 / BITS;  // elements of a unit
  using U = typename Unit<BYTES>::type;
  const device U* units =
      reinterpret_cast<const device U*>(rows.words_here + row * rows.words_row);
  const float scale = static_cast<float>(rows.scales_here[row * rows.scales_row + at / GS]);
  const float bias = static_cast<float>(rows.biases_here[row * rows.biases_row + at / GS]);
  for (int i = 0; i < E / EACH; ++i) {
    const uint unit = uint(units[at / EACH + i]);
    for (int j = 0; j < EACH; ++j) {
      const uint q = (unit >> (j * BITS)) & ((1u << BITS) - 1u);
      to[i * EACH + j] = static_cast<T>(scale * static_cast<float>(q) + bias);
    }
  }
}
