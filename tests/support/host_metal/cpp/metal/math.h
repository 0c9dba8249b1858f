// Metal's mathematical functions: in float, rounded once to the type of the arguments.
#pragma once

namespace metal {

// Element by element over vectors.
#define HM_VECTOR_1(f)                                       \
  template <class T, int N>                                  \
  inline vec<T, N> f(const vec<T, N>& a) {                   \
    vec<T, N> out;                                           \
    for (int i = 0; i < N; i++) out.v[i] = f(a.v[i]);        \
    return out;                                              \
  }
#define HM_VECTOR_2(f)                                                      \
  template <class T, int N>                                                 \
  inline vec<T, N> f(const vec<T, N>& a, const identity_t<vec<T, N>>& b) {  \
    vec<T, N> out;                                                          \
    for (int i = 0; i < N; i++) out.v[i] = f(a.v[i], b.v[i]);               \
    return out;                                                             \
  }
#define HM_VECTOR_3(f)                                                      \
  template <class T, int N>                                                 \
  inline vec<T, N> f(const vec<T, N>& a, const identity_t<vec<T, N>>& b,    \
                     const identity_t<vec<T, N>>& c) {                      \
    vec<T, N> out;                                                          \
    for (int i = 0; i < N; i++) out.v[i] = f(a.v[i], b.v[i], c.v[i]);       \
    return out;                                                             \
  }

// The three float types. No template: Metal calls max(half, float) ambiguous, and so must we.
#define HM_FLOAT_1(f, value)                                                \
  inline float f(float x) { return value; }                                 \
  inline half f(half h) { float x = h; return half(value); }                \
  inline bfloat f(bfloat h) { float x = h; return bfloat(value); }          \
  HM_VECTOR_1(f)
#define HM_FLOAT_2(f, value)                                                           \
  inline float f(float x, float y) { return value; }                                   \
  inline half f(half a, half b) { float x = a, y = b; return half(value); }            \
  inline bfloat f(bfloat a, bfloat b) { float x = a, y = b; return bfloat(value); }    \
  HM_VECTOR_2(f)
#define HM_FLOAT_3(f, value)                                                                     \
  inline float f(float x, float y, float z) { return value; }                                    \
  inline half f(half a, half b, half c) { float x = a, y = b, z = c; return half(value); }       \
  inline bfloat f(bfloat a, bfloat b, bfloat c) { float x = a, y = b, z = c; return bfloat(value); } \
  HM_VECTOR_3(f)

HM_FLOAT_1(exp, __builtin_expf(x))
HM_FLOAT_1(exp2, __builtin_exp2f(x))
HM_FLOAT_1(log, __builtin_logf(x))
HM_FLOAT_1(log2, __builtin_log2f(x))
HM_FLOAT_1(sqrt, __builtin_sqrtf(x))
HM_FLOAT_1(rsqrt, 1.0f / __builtin_sqrtf(x))
HM_FLOAT_1(sin, __builtin_sinf(x))
HM_FLOAT_1(cos, __builtin_cosf(x))
HM_FLOAT_1(tan, __builtin_tanf(x))
HM_FLOAT_1(tanh, __builtin_tanhf(x))
HM_FLOAT_1(floor, __builtin_floorf(x))
HM_FLOAT_1(ceil, __builtin_ceilf(x))
HM_FLOAT_1(round, __builtin_roundf(x))
HM_FLOAT_1(rint, __builtin_rintf(x))
HM_FLOAT_1(trunc, __builtin_truncf(x))
HM_FLOAT_1(fabs, __builtin_fabsf(x))
HM_FLOAT_1(abs, __builtin_fabsf(x))
HM_FLOAT_1(saturate, x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f)
HM_FLOAT_2(pow, __builtin_powf(x, y))
HM_FLOAT_2(fmod, __builtin_fmodf(x, y))
HM_FLOAT_2(copysign, __builtin_copysignf(x, y))
HM_FLOAT_2(divide, x / y)
// A NaN loses against a number.
HM_FLOAT_2(fmax, x != x ? y : (y > x ? y : x))
HM_FLOAT_2(fmin, x != x ? y : (y < x ? y : x))
HM_FLOAT_2(max, x != x ? y : (y > x ? y : x))
HM_FLOAT_2(min, x != x ? y : (y < x ? y : x))
HM_FLOAT_3(fma, __builtin_fmaf(x, y, z))
HM_FLOAT_3(mix, x + (y - x) * z)
HM_FLOAT_3(clamp, min(max(x, y), z))

#define HM_PREDICATE(f)                                       \
  inline bool f(float x) { return __builtin_##f(x); }         \
  inline bool f(half x) { return f(float(x)); }               \
  inline bool f(bfloat x) { return f(float(x)); }             \
  template <class T, int N>                                   \
  inline vec<bool, N> f(const vec<T, N>& a) {                 \
    vec<bool, N> out;                                         \
    for (int i = 0; i < N; i++) out.v[i] = f(a.v[i]);         \
    return out;                                               \
  }
HM_PREDICATE(isnan)
HM_PREDICATE(isinf)
HM_PREDICATE(isfinite)
HM_PREDICATE(signbit)

#define HM_INTEGER(T)                                                          \
  inline T min(T x, T y) { return y < x ? y : x; }                             \
  inline T max(T x, T y) { return x < y ? y : x; }                             \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
HM_INTEGER(int8_t) HM_INTEGER(uchar) HM_INTEGER(short) HM_INTEGER(ushort)
HM_INTEGER(int) HM_INTEGER(uint) HM_INTEGER(long) HM_INTEGER(ulong)

inline int abs(int x) { return x < 0 ? -x : x; }
inline int popcount(int x) { return __builtin_popcount((uint)x); }
inline uint popcount(uint x) { return (uint)__builtin_popcount(x); }
inline int clz(int x) { return x ? __builtin_clz((uint)x) : 32; }
inline uint clz(uint x) { return x ? (uint)__builtin_clz(x) : 32; }
inline int ctz(int x) { return x ? __builtin_ctz((uint)x) : 32; }
inline uint ctz(uint x) { return x ? (uint)__builtin_ctz(x) : 32; }

// Metal's order: the second value where the condition holds.
template <class T, class = enable_if_t<is_arithmetic_v<T>>>
inline T select(T a, T b, bool condition) { return condition ? b : a; }
template <class T, int N>
inline vec<T, N> select(const vec<T, N>& a, const vec<T, N>& b, const vec<bool, N>& condition) {
  vec<T, N> out;
  for (int i = 0; i < N; i++) out.v[i] = condition.v[i] ? b.v[i] : a.v[i];
  return out;
}
template <class T, int N>
inline T dot(const vec<T, N>& a, const identity_t<vec<T, N>>& b) {
  T sum = a.v[0] * b.v[0];
  for (int i = 1; i < N; i++) sum = T(sum + a.v[i] * b.v[i]);
  return sum;
}
template <int N>
inline bool any(const vec<bool, N>& a) {
  for (int i = 0; i < N; i++)
    if (a.v[i]) return true;
  return false;
}
template <int N>
inline bool all(const vec<bool, N>& a) {
  for (int i = 0; i < N; i++)
    if (!a.v[i]) return false;
  return true;
}

#undef HM_VECTOR_1
#undef HM_VECTOR_2
#undef HM_VECTOR_3
#undef HM_FLOAT_1
#undef HM_FLOAT_2
#undef HM_FLOAT_3
#undef HM_PREDICATE
#undef HM_INTEGER

// One accuracy serves both: how far fast:: is off on a GPU is not known here.
#define HM_VARIANTS                                                                           \
  using metal::exp; using metal::exp2; using metal::log; using metal::log2; using metal::sqrt; \
  using metal::rsqrt; using metal::sin; using metal::cos; using metal::tan; using metal::tanh; \
  using metal::pow; using metal::divide; using metal::floor; using metal::fabs;               \
  using metal::abs; using metal::max; using metal::min; using metal::fmax; using metal::fmin; \
  using metal::fmod; using metal::clamp; using metal::saturate;
namespace fast { HM_VARIANTS }
namespace precise { HM_VARIANTS }
#undef HM_VARIANTS

}  // namespace metal
