// Metal declared for clang's C++ for OpenCL front end: declarations only, nothing is ever linked.
//
// There address spaces are part of types, vectors are native, and double, program-scope variables
// that can change, threadgroup variables outside a kernel and the like are errors, as for Metal's
// own front end, which is another branch of the same compiler.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define __METAL__ 1
#define __METAL_VERSION__ 310
#define METAL_FUNC inline __attribute__((always_inline))
#define device __global
#define constant __constant
#define thread __private
#define threadgroup __local
#undef kernel
#define kernel __kernel

#include "metal/macros.h"

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef long ptrdiff_t;
typedef __bf16 bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;

#define HM_CONSTANT static constexpr constant

namespace metal {

// ---------------------------------------------------------------- traits

template <class T, T V>
struct integral_constant {
  HM_CONSTANT T value = V;
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;
template <class A, class B>
HM_CONSTANT bool is_same_v = __is_same(A, B);
template <class A, class B>
struct is_same : integral_constant<bool, __is_same(A, B)> {};
template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class X, class Y>
struct conditional {
  using type = X;
};
template <class X, class Y>
struct conditional<false, X, Y> {
  using type = Y;
};
template <bool B, class X, class Y>
using conditional_t = typename conditional<B, X, Y>::type;
template <class T>
HM_CONSTANT bool is_floating_point_v =
    __is_same(T, float) || __is_same(T, half) || __is_same(T, bfloat);
template <class T>
HM_CONSTANT bool is_integral_v = __is_integral(T);
template <class T>
HM_CONSTANT bool is_arithmetic_v = is_floating_point_v<T> || __is_integral(T);
template <class T>
struct identity {
  using type = T;
};
template <class T>
using identity_t = typename identity<T>::type;

// ---------------------------------------------------------------- vectors

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
template <class V>
struct element {
  using type = V;
};
template <class T, int N>
struct element<T __attribute__((ext_vector_type(N)))> {
  using type = T;
};

// What `vec<T, 4>(...)` and `float4(...)` are rewritten to: clang's vectors lack constructors.
template <class V, class... Parts>
constexpr V make(Parts...);

// Members for each address space that the object may lie in, as Metal's own have them.
#define HM_PACKED_IN(SPACE)                \
  operator vec<T, N>() const SPACE;        \
  T operator[](int) const SPACE;
#define HM_PACKED_TO(SPACE) void operator=(vec<T, N>) SPACE;
template <class T, int N>
struct packed_vec {
  T v[N];
  packed_vec() = default;
  packed_vec(vec<T, N>);
  HM_PACKED_IN(device) HM_PACKED_IN(threadgroup) HM_PACKED_IN(thread) HM_PACKED_IN(constant)
  HM_PACKED_TO(device) HM_PACKED_TO(threadgroup) HM_PACKED_TO(thread)
};

#define HM_NAMES(T)                                       \
  typedef vec<T, 2> T##2;                                 \
  typedef vec<T, 3> T##3;                                 \
  typedef vec<T, 4> T##4;                                 \
  typedef packed_vec<T, 2> packed_##T##2;                 \
  typedef packed_vec<T, 3> packed_##T##3;                 \
  typedef packed_vec<T, 4> packed_##T##4;
HM_NAMES(char) HM_NAMES(uchar) HM_NAMES(short) HM_NAMES(ushort) HM_NAMES(int) HM_NAMES(uint)
HM_NAMES(long) HM_NAMES(ulong) HM_NAMES(half) HM_NAMES(bfloat) HM_NAMES(float)

template <class To, class From>
constexpr To as_type(From) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return To();
}

template <class T>
struct numeric_limits {
  static constexpr T min() { return T(0); }
  static constexpr T max() { return T(0); }
  static constexpr T lowest() { return T(0); }
  static constexpr T epsilon() { return T(0); }
  static constexpr T infinity() { return T(0); }
  static constexpr T quiet_NaN() { return T(0); }
};

// ---------------------------------------------------------------- math

#define HM_FLOAT_1(f)                                    \
  float f(float);                                        \
  half f(half);                                          \
  bfloat f(bfloat);                                      \
  template <class T, int N>                              \
  vec<T, N> f(vec<T, N>);
#define HM_FLOAT_2(f)                                    \
  float f(float, float);                                 \
  half f(half, half);                                    \
  bfloat f(bfloat, bfloat);                              \
  template <class T, int N>                              \
  vec<T, N> f(vec<T, N>, identity_t<vec<T, N>>);
#define HM_FLOAT_3(f)                                    \
  float f(float, float, float);                          \
  half f(half, half, half);                              \
  bfloat f(bfloat, bfloat, bfloat);                      \
  template <class T, int N>                              \
  vec<T, N> f(vec<T, N>, identity_t<vec<T, N>>, identity_t<vec<T, N>>);
#define HM_VARIANTS                                                                          \
  HM_FLOAT_1(exp) HM_FLOAT_1(exp2) HM_FLOAT_1(log) HM_FLOAT_1(log2) HM_FLOAT_1(sqrt)         \
  HM_FLOAT_1(rsqrt) HM_FLOAT_1(sin) HM_FLOAT_1(cos) HM_FLOAT_1(tan) HM_FLOAT_1(tanh)         \
  HM_FLOAT_1(floor) HM_FLOAT_1(fabs) HM_FLOAT_1(abs) HM_FLOAT_1(saturate) HM_FLOAT_2(pow)    \
  HM_FLOAT_2(divide) HM_FLOAT_2(max) HM_FLOAT_2(min) HM_FLOAT_2(fmax) HM_FLOAT_2(fmin)       \
  HM_FLOAT_2(fmod) HM_FLOAT_3(clamp)
HM_VARIANTS
namespace fast { HM_VARIANTS }
namespace precise { HM_VARIANTS }
HM_FLOAT_1(ceil) HM_FLOAT_1(round) HM_FLOAT_1(rint) HM_FLOAT_1(trunc)
HM_FLOAT_2(copysign) HM_FLOAT_3(fma) HM_FLOAT_3(mix)

#define HM_PREDICATE(f)                                  \
  bool f(float);                                         \
  bool f(half);                                          \
  bool f(bfloat);                                        \
  template <class T, int N>                              \
  vec<int, N> f(vec<T, N>);
HM_PREDICATE(isnan) HM_PREDICATE(isinf) HM_PREDICATE(isfinite) HM_PREDICATE(signbit)

#define HM_INTEGER(T)                                    \
  T min(T, T);                                           \
  T max(T, T);                                           \
  T clamp(T, T, T);
HM_INTEGER(int8_t) HM_INTEGER(uchar) HM_INTEGER(short) HM_INTEGER(ushort)
HM_INTEGER(int) HM_INTEGER(uint) HM_INTEGER(long) HM_INTEGER(ulong)
int abs(int);
#define HM_BITS(f) \
  int f(int);      \
  uint f(uint);
HM_BITS(popcount) HM_BITS(clz) HM_BITS(ctz)

template <class T, class = enable_if_t<is_arithmetic_v<T>>>
T select(T, T, bool);
template <class T, int N, class C>
vec<T, N> select(vec<T, N>, vec<T, N>, vec<C, N>);
template <class T, int N>
T dot(vec<T, N>, identity_t<vec<T, N>>);
template <class T, int N>
bool any(vec<T, N>);
template <class T, int N>
bool all(vec<T, N>);

// ---------------------------------------------------------------- simdgroups

// Metal has them for these elements, not for 64-bit integers or bool.
template <class T>
HM_CONSTANT bool is_simd_element =
    is_floating_point_v<T> || (__is_integral(T) && !__is_same(T, bool) && sizeof(T) <= 4);
template <class T>
using simd_t = enable_if_t<is_simd_element<typename element<T>::type>, T>;
template <class T>
using simd_bits_t = enable_if_t<!is_floating_point_v<typename element<T>::type>, simd_t<T>>;

#define HM_REDUCED(f, TYPE) \
  template <class T>        \
  TYPE<T> f(T);
HM_REDUCED(simd_sum, simd_t) HM_REDUCED(simd_product, simd_t) HM_REDUCED(simd_max, simd_t)
HM_REDUCED(simd_min, simd_t) HM_REDUCED(simd_and, simd_bits_t) HM_REDUCED(simd_or, simd_bits_t)
HM_REDUCED(simd_prefix_inclusive_sum, simd_t) HM_REDUCED(simd_prefix_exclusive_sum, simd_t)
HM_REDUCED(simd_broadcast_first, simd_t)
bool simd_any(bool);
bool simd_all(bool);

#define HM_SHUFFLE(f) \
  template <class T>  \
  simd_t<T> f(T, ushort);
HM_SHUFFLE(simd_shuffle) HM_SHUFFLE(simd_broadcast) HM_SHUFFLE(simd_shuffle_xor)
HM_SHUFFLE(simd_shuffle_up) HM_SHUFFLE(simd_shuffle_down)
HM_SHUFFLE(simd_shuffle_rotate_up) HM_SHUFFLE(simd_shuffle_rotate_down)

// Fragments are parameters by reference here: without generic pointers clang copies no struct.
template <class T, int Columns, int Rows = Columns>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8 && is_floating_point_v<T>,
                "simdgroup_matrix: 8x8 of half, bfloat or float");
  simdgroup_matrix() = default;
  thread vec<T, 2>& thread_elements();
  vec<T, 2> elements;
};
template <class T>
using fragment = thread simdgroup_matrix<T, 8, 8>;
template <class T>
using const_fragment = const thread simdgroup_matrix<T, 8, 8>;
template <class T, int Columns, int Rows = Columns>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T);
#define HM_FRAGMENT_IN(SPACE)                                                                   \
  template <class T>                                                                            \
  void simdgroup_load(fragment<T>&, const SPACE T*, ulong = 8, ulong2 = ulong2{0, 0},           \
                      bool = false);                                                            \
  template <class T>                                                                            \
  void simdgroup_store(const_fragment<T>&, SPACE T*, ulong = 8, ulong2 = ulong2{0, 0},          \
                       bool = false);
HM_FRAGMENT_IN(device) HM_FRAGMENT_IN(threadgroup)
template <class D, class A, class B, class C>
void simdgroup_multiply_accumulate(fragment<D>&, const_fragment<A>&, const_fragment<B>&,
                                   const_fragment<C>&);
template <class D, class A, class B>
void simdgroup_multiply(fragment<D>&, const_fragment<A>&, const_fragment<B>&);
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
void threadgroup_barrier(mem_flags) __attribute__((convergent));
void simdgroup_barrier(mem_flags) __attribute__((convergent));

}  // namespace metal

using metal::as_type;

// Constructor calls; the bare names of the types stay what they are.
#define char2(...) metal::make<metal::char2>(__VA_ARGS__)
#define char3(...) metal::make<metal::char3>(__VA_ARGS__)
#define char4(...) metal::make<metal::char4>(__VA_ARGS__)
#define uchar2(...) metal::make<metal::uchar2>(__VA_ARGS__)
#define uchar3(...) metal::make<metal::uchar3>(__VA_ARGS__)
#define uchar4(...) metal::make<metal::uchar4>(__VA_ARGS__)
#define short2(...) metal::make<metal::short2>(__VA_ARGS__)
#define short3(...) metal::make<metal::short3>(__VA_ARGS__)
#define short4(...) metal::make<metal::short4>(__VA_ARGS__)
#define ushort2(...) metal::make<metal::ushort2>(__VA_ARGS__)
#define ushort3(...) metal::make<metal::ushort3>(__VA_ARGS__)
#define ushort4(...) metal::make<metal::ushort4>(__VA_ARGS__)
#define int2(...) metal::make<metal::int2>(__VA_ARGS__)
#define int3(...) metal::make<metal::int3>(__VA_ARGS__)
#define int4(...) metal::make<metal::int4>(__VA_ARGS__)
#define uint2(...) metal::make<metal::uint2>(__VA_ARGS__)
#define uint3(...) metal::make<metal::uint3>(__VA_ARGS__)
#define uint4(...) metal::make<metal::uint4>(__VA_ARGS__)
#define long2(...) metal::make<metal::long2>(__VA_ARGS__)
#define long3(...) metal::make<metal::long3>(__VA_ARGS__)
#define long4(...) metal::make<metal::long4>(__VA_ARGS__)
#define ulong2(...) metal::make<metal::ulong2>(__VA_ARGS__)
#define ulong3(...) metal::make<metal::ulong3>(__VA_ARGS__)
#define ulong4(...) metal::make<metal::ulong4>(__VA_ARGS__)
#define half2(...) metal::make<metal::half2>(__VA_ARGS__)
#define half3(...) metal::make<metal::half3>(__VA_ARGS__)
#define half4(...) metal::make<metal::half4>(__VA_ARGS__)
#define bfloat2(...) metal::make<metal::bfloat2>(__VA_ARGS__)
#define bfloat3(...) metal::make<metal::bfloat3>(__VA_ARGS__)
#define bfloat4(...) metal::make<metal::bfloat4>(__VA_ARGS__)
#define float2(...) metal::make<metal::float2>(__VA_ARGS__)
#define float3(...) metal::make<metal::float3>(__VA_ARGS__)
#define float4(...) metal::make<metal::float4>(__VA_ARGS__)
