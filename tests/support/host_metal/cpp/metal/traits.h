// The few type traits that kernels use.
#pragma once

namespace metal {

template <class T, T V>
struct integral_constant {
  static constexpr T value = V;
  constexpr operator T() const { return V; }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;

template <class A, class B>
inline constexpr bool is_same_v = __is_same(A, B);
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
inline constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;

template <class T, class... Types>
inline constexpr bool is_any_of = (is_same_v<T, Types> || ...);
template <class T>
inline constexpr bool is_integral_v =
    is_any_of<T, bool, char, int8_t, uchar, short, ushort, int, uint, long, ulong>;
template <class T>
inline constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;

// Keeps a parameter out of template deduction, so that it may convert.
template <class T>
struct identity {
  using type = T;
};
template <class T>
using identity_t = typename identity<T>::type;

}  // namespace metal
