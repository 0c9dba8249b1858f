// Barriers and simdgroup operations: each meets at the runtime, which sees who is missing.
#pragma once

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = hm::FLAG_DEVICE,
  mem_threadgroup = hm::FLAG_THREADGROUP,
};
inline constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(uint(a) | uint(b));
}

inline void threadgroup_barrier(mem_flags flags, HM_SITE) {
  hm_threadgroup_barrier(uint(flags), HM_HERE);
}
inline void simdgroup_barrier(mem_flags flags, HM_SITE) {
  hm_simdgroup_barrier(uint(flags), HM_HERE);
}

namespace detail {

template <class T>
HM_UNCHECKED T get(const hm::Exchange& exchange, unsigned lane) {
  T value;
  __builtin_memcpy((void*)&value, exchange.lane[lane], sizeof value);
  return value;
}
template <class T>
HM_UNCHECKED void put(hm::Exchange& exchange, unsigned lane, T value) {
  __builtin_memcpy(exchange.lane[lane], (const void*)&value, sizeof value);
}

template <class T>
HM_UNCHECKED hm::Exchange& meet(const char* operation, hm::Site site, T operand,
                                hm::Combine combine = nullptr) {
  static_assert(sizeof(T) <= sizeof(hm::Exchange::lane[0]), "operand too large");
  return hm_simd(operation, site, &operand, sizeof operand, combine);
}

struct sum { template <class T> static T of(T a, T b) { return T(a + b); } };
struct product { template <class T> static T of(T a, T b) { return T(a * b); } };
struct largest { template <class T> static T of(T a, T b) { return max(a, b); } };
struct smallest { template <class T> static T of(T a, T b) { return min(a, b); } };
struct conjunction { template <class T> static T of(T a, T b) { return T(a & b); } };
struct disjunction { template <class T> static T of(T a, T b) { return T(a | b); } };

// As a butterfly: neighbours first, then pairs of pairs. The GPU's own order is not documented.
template <class Op, class T>
HM_UNCHECKED void reduce(hm::Exchange& exchange) {
  unsigned n = exchange.size;
  for (unsigned d = 1; d < n; d *= 2)
    for (unsigned i = 0; i + d < n; i += 2 * d)
      put(exchange, i, Op::of(get<T>(exchange, i), get<T>(exchange, i + d)));
  for (unsigned i = 1; i < n; i++) put(exchange, i, get<T>(exchange, 0));
}

template <class T>
HM_UNCHECKED void scan_inclusive(hm::Exchange& exchange) {
  for (unsigned i = 1; i < exchange.size; i++)
    put(exchange, i, T(get<T>(exchange, i - 1) + get<T>(exchange, i)));
}
template <class T>
HM_UNCHECKED void scan_exclusive(hm::Exchange& exchange) {
  scan_inclusive<T>(exchange);
  for (unsigned i = exchange.size - 1; i > 0; i--) put(exchange, i, get<T>(exchange, i - 1));
  put(exchange, 0, T(0));
}

template <class T>
inline T from_lane(const char* operation, hm::Site site, T value, unsigned source) {
  hm::Exchange& exchange = meet(operation, site, value);
  if (source >= exchange.size) hm_absent_lane(operation, site, source);
  return get<T>(exchange, source);
}

}  // namespace detail

#define HM_COMBINED(NAME, COMBINE)                                                      \
  template <class T>                                                                    \
  inline T NAME(T value, HM_SITE) {                                                     \
    return detail::get<T>(detail::meet(#NAME, HM_HERE, value, COMBINE), hm_lane());     \
  }
#define HM_REDUCED(NAME, OP) HM_COMBINED(NAME, (detail::reduce<detail::OP, T>))
HM_REDUCED(simd_sum, sum)
HM_REDUCED(simd_product, product)
HM_REDUCED(simd_max, largest)
HM_REDUCED(simd_min, smallest)
HM_REDUCED(simd_and, conjunction)
HM_REDUCED(simd_or, disjunction)
HM_COMBINED(simd_prefix_inclusive_sum, detail::scan_inclusive<T>)
HM_COMBINED(simd_prefix_exclusive_sum, detail::scan_exclusive<T>)
#undef HM_REDUCED
#undef HM_COMBINED

inline bool simd_any(bool value, HM_SITE) {
  return detail::get<uint>(
      detail::meet("simd_any", HM_HERE, uint(value), detail::reduce<detail::disjunction, uint>),
      hm_lane());
}
inline bool simd_all(bool value, HM_SITE) {
  return detail::get<uint>(
      detail::meet("simd_all", HM_HERE, uint(value), detail::reduce<detail::conjunction, uint>),
      hm_lane());
}

// `lane` is the calling lane, `k` the argument.
#define HM_SHUFFLE(NAME, SOURCE)                                              \
  template <class T>                                                          \
  inline T NAME(T value, ushort k, HM_SITE) {                                 \
    unsigned lane = hm_lane();                                                \
    (void)lane;                                                               \
    return detail::from_lane(#NAME, HM_HERE, value, SOURCE);                  \
  }
HM_SHUFFLE(simd_shuffle, k)
HM_SHUFFLE(simd_broadcast, k)
HM_SHUFFLE(simd_shuffle_xor, lane ^ k)
HM_SHUFFLE(simd_shuffle_rotate_up, (lane - k) % hm::SIMD_WIDTH)
HM_SHUFFLE(simd_shuffle_rotate_down, (lane + k) % hm::SIMD_WIDTH)
// Lanes whose source lies beyond the end keep their own value.
HM_SHUFFLE(simd_shuffle_up, lane < k ? lane : lane - k)
HM_SHUFFLE(simd_shuffle_down, lane + k >= hm::SIMD_WIDTH ? lane : lane + k)
#undef HM_SHUFFLE

template <class T>
inline T simd_broadcast_first(T value, HM_SITE) {
  return detail::from_lane("simd_broadcast_first", HM_HERE, value, 0);
}

}  // namespace metal

// A `threadgroup` declaration becomes a reference to memory that the threadgroup shares.
namespace hm {
template <class T>
struct element {
  using type = T;
};
template <class T, unsigned long N>
struct element<T[N]> : element<T> {};

template <class T>
inline T& threadgroup_variable(unsigned id, const char* name, HM_SITE) {
  using Element = typename element<T>::type;
  constexpr unsigned granule = alignof(Element) >= 4 ? 4 : alignof(Element);
  return *(T*)hm_threadgroup_variable(id, name, sizeof(T), alignof(T), granule, HM_HERE);
}
}  // namespace hm
