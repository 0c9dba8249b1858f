// vec<T, 2..4> and packed_vec. A three-vector takes the space of four, as in Metal.
#pragma once

namespace metal {

template <class T, int N>
struct vec;

// Lies over the vector that it is a member of; reads and writes that vector's elements I...
template <class V, class T, int... I>
struct swizzle {
  T storage[sizeof...(I)];

  operator V() const {
    const T* from = (const T*)this;
    V out;
    int k = 0;
    ((out.v[k++] = from[I]), ...);
    return out;
  }
  swizzle& operator=(const V& from) {
    T* to = (T*)this;
    int k = 0;
    ((to[I] = from.v[k++]), ...);
    return *this;
  }
  swizzle& operator=(const swizzle& from) { return *this = V(from); }
  swizzle& operator+=(const V& by) { return *this = V(*this) + by; }
  swizzle& operator*=(const V& by) { return *this = V(*this) * by; }
};

namespace detail {

// Elements that a constructor argument brings, and copying them.
template <class A>
struct width {
  static constexpr int value = 1;
};
template <class T, int N>
struct width<vec<T, N>> {
  static constexpr int value = N;
};
template <class V, class T, int... I>
struct width<swizzle<V, T, I...>> {
  static constexpr int value = sizeof...(I);
};

template <class T, class A>
inline int append(T* to, int k, const A& scalar) {
  to[k] = T(scalar);
  return k + 1;
}
template <class T, class U, int N>
inline int append(T* to, int k, const vec<U, N>& from) {
  for (int i = 0; i < N; i++) to[k + i] = T(from.v[i]);
  return k + N;
}
template <class T, class V, class U, int... I>
inline int append(T* to, int k, const swizzle<V, U, I...>& from) {
  return append(to, k, V(from));
}

}  // namespace detail

#define HM_BINARY(op)                                                       \
  friend vec operator op(const vec& a, const vec& b) {                      \
    vec out;                                                                \
    for (int i = 0; i < WIDTH; i++) out.v[i] = T(a.v[i] op b.v[i]);         \
    return out;                                                             \
  }                                                                         \
  vec& operator op##=(const vec& b) { return *this = *this op b; }
#define HM_COMPARE(op)                                                      \
  friend vec<bool, WIDTH> operator op(const vec& a, const vec& b) {         \
    vec<bool, WIDTH> out;                                                   \
    for (int i = 0; i < WIDTH; i++) out.v[i] = a.v[i] op b.v[i];            \
    return out;                                                             \
  }

// Everything but the named members. Operators that an element type lacks fail only where used.
#define HM_VECTOR_BODY(N)                                                                    \
  static constexpr int WIDTH = N;                                                            \
  vec() = default;                                                                           \
  vec(const vec& from) { for (int i = 0; i < N; i++) v[i] = from.v[i]; }                     \
  vec& operator=(const vec& from) {                                                          \
    for (int i = 0; i < N; i++) v[i] = from.v[i];                                            \
    return *this;                                                                            \
  }                                                                                          \
  vec(T splat) { for (int i = 0; i < N; i++) v[i] = splat; }                                 \
  template <class U, class = enable_if_t<is_same_v<T, bfloat> && is_arithmetic_v<U> &&          \
                                         !is_same_v<U, T>>>                                  \
  explicit vec(U splat) : vec(T(splat)) {}                                                   \
  template <class U>                                                                         \
  explicit vec(const vec<U, N>& from) { for (int i = 0; i < N; i++) v[i] = T(from.v[i]); }   \
  template <class A, class B, class... More,                                                 \
            class = enable_if_t<((detail::width<A>::value + detail::width<B>::value) + ... + \
                                 detail::width<More>::value) == N>>                          \
  vec(const A& a, const B& b, const More&... more) {                                         \
    int k = detail::append(v, detail::append(v, 0, a), b);                                   \
    ((k = detail::append(v, k, more)), ...);                                                 \
  }                                                                                          \
  T& operator[](int i) { return v[i]; }                                                      \
  const T& operator[](int i) const { return v[i]; }                                          \
  HM_BINARY(+) HM_BINARY(-) HM_BINARY(*) HM_BINARY(/) HM_BINARY(%)                           \
  HM_BINARY(&) HM_BINARY(|) HM_BINARY(^) HM_BINARY(<<) HM_BINARY(>>)                         \
  HM_COMPARE(<) HM_COMPARE(>) HM_COMPARE(<=) HM_COMPARE(>=) HM_COMPARE(==) HM_COMPARE(!=)    \
  friend vec operator-(const vec& a) {                                                       \
    vec out;                                                                                 \
    for (int i = 0; i < N; i++) out.v[i] = T(-a.v[i]);                                       \
    return out;                                                                              \
  }

#define HM_PAIR(NAME, A, B) swizzle<vec<T, 2>, T, A, B> NAME;

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    T v[2];
    struct { T x, y; };
    HM_PAIR(xy, 0, 1) HM_PAIR(yx, 1, 0) HM_PAIR(xx, 0, 0) HM_PAIR(yy, 1, 1)
  };
  HM_VECTOR_BODY(2)
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    T v[4];
    struct { T x, y, z; };
    HM_PAIR(xy, 0, 1) HM_PAIR(yz, 1, 2) HM_PAIR(xz, 0, 2) HM_PAIR(yx, 1, 0)
    swizzle<vec<T, 3>, T, 0, 1, 2> xyz;
    swizzle<vec<T, 3>, T, 2, 1, 0> zyx;
  };
  HM_VECTOR_BODY(3)
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    T v[4];
    struct { T x, y, z, w; };
    HM_PAIR(xy, 0, 1) HM_PAIR(yz, 1, 2) HM_PAIR(zw, 2, 3) HM_PAIR(xz, 0, 2) HM_PAIR(yw, 1, 3)
    HM_PAIR(yx, 1, 0) HM_PAIR(wz, 3, 2)
    swizzle<vec<T, 3>, T, 0, 1, 2> xyz;
    swizzle<vec<T, 3>, T, 1, 2, 3> yzw;
    swizzle<vec<T, 4>, T, 1, 0, 3, 2> yxwz;
    swizzle<vec<T, 4>, T, 2, 3, 0, 1> zwxy;
    swizzle<vec<T, 4>, T, 3, 2, 1, 0> wzyx;
  };
  HM_VECTOR_BODY(4)
};

#undef HM_PAIR
#undef HM_VECTOR_BODY
#undef HM_COMPARE
#undef HM_BINARY

// As in memory: no padding, and only the alignment of one element.
template <class T, int N>
struct packed_vec {
  T v[N];
  packed_vec() = default;
  packed_vec(const vec<T, N>& from) { for (int i = 0; i < N; i++) v[i] = from.v[i]; }
  operator vec<T, N>() const {
    vec<T, N> out;
    for (int i = 0; i < N; i++) out.v[i] = v[i];
    return out;
  }
  T& operator[](int i) { return v[i]; }
  const T& operator[](int i) const { return v[i]; }
};

#define HM_NAMES(T)                                                           \
  typedef vec<T, 2> T##2;                                                     \
  typedef vec<T, 3> T##3;                                                     \
  typedef vec<T, 4> T##4;                                                     \
  typedef packed_vec<T, 2> packed_##T##2;                                     \
  typedef packed_vec<T, 3> packed_##T##3;                                     \
  typedef packed_vec<T, 4> packed_##T##4;
HM_NAMES(bool) HM_NAMES(char) HM_NAMES(uchar) HM_NAMES(short) HM_NAMES(ushort) HM_NAMES(int)
HM_NAMES(uint) HM_NAMES(long) HM_NAMES(ulong) HM_NAMES(half) HM_NAMES(bfloat) HM_NAMES(float)
#undef HM_NAMES

}  // namespace metal

inline metal::uint3 hm_uint3(const unsigned (&from)[3]) { return {from[0], from[1], from[2]}; }
