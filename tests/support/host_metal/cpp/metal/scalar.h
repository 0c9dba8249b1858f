// Metal's scalar types. Metal's int is 32 bits and its long 64, as on 64-bit Linux.
#pragma once

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

typedef _Float16 half;

// The upper half of a float. It widens by itself and narrows only by a cast, as Metal has it;
// arithmetic is in float and rounds to nearest even after every operation.
struct bfloat {
  unsigned short bits;

  bfloat() = default;
  template <class U, class = decltype(static_cast<float>(U()))>
  explicit constexpr bfloat(U x) : bits(round(static_cast<float>(x))) {}
  constexpr operator float() const { return __builtin_bit_cast(float, (unsigned)bits << 16); }

  static constexpr unsigned short round(float x) {
    unsigned u = __builtin_bit_cast(unsigned, x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (unsigned short)(u >> 16 | 0x40);  // stay a NaN
    return (unsigned short)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
  }
};

#define HM_BFLOAT_OPERATOR(op)                                                                 \
  inline constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  inline constexpr float operator op(bfloat a, float b) { return float(a) op b; }              \
  inline constexpr float operator op(float a, bfloat b) { return a op float(b); }              \
  inline constexpr bfloat operator op(bfloat a, int b) { return bfloat(float(a) op float(b)); } \
  inline constexpr bfloat operator op(int a, bfloat b) { return bfloat(float(a) op float(b)); } \
  template <class U>                                                                           \
  inline bfloat& operator op##=(bfloat& a, U b) { return a = bfloat(float(a) op float(b)); }
HM_BFLOAT_OPERATOR(+)
HM_BFLOAT_OPERATOR(-)
HM_BFLOAT_OPERATOR(*)
HM_BFLOAT_OPERATOR(/)
#undef HM_BFLOAT_OPERATOR
inline constexpr bfloat operator-(bfloat a) { return bfloat(-float(a)); }

typedef half float16_t;
typedef bfloat bfloat16_t;

namespace metal {

using ::bfloat;
using ::half;

template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To to;
  __builtin_memcpy((void*)&to, (const void*)&from, sizeof to);
  return to;
}

template <class T>
struct numeric_limits;

#define HM_INTEGER_LIMITS(T, LOW, HIGH)             \
  template <>                                       \
  struct numeric_limits<T> {                        \
    static constexpr T min() { return LOW; }        \
    static constexpr T lowest() { return LOW; }     \
    static constexpr T max() { return HIGH; }       \
  };
HM_INTEGER_LIMITS(char, -128, 127)
HM_INTEGER_LIMITS(int8_t, -128, 127)
HM_INTEGER_LIMITS(uchar, 0, 255)
HM_INTEGER_LIMITS(short, -32768, 32767)
HM_INTEGER_LIMITS(ushort, 0, 65535)
HM_INTEGER_LIMITS(int, INT_MIN, INT_MAX)
HM_INTEGER_LIMITS(uint, 0, UINT_MAX)
HM_INTEGER_LIMITS(long, -0x7fffffffffffffffl - 1, 0x7fffffffffffffffl)
HM_INTEGER_LIMITS(ulong, 0, ~0ul)
#undef HM_INTEGER_LIMITS

#define HM_FLOAT_LIMITS(T, MIN, MAX, EPSILON)                              \
  template <>                                                              \
  struct numeric_limits<T> {                                               \
    static constexpr T min() { return T(MIN); }                            \
    static constexpr T max() { return T(MAX); }                            \
    static constexpr T lowest() { return T(-MAX); }                        \
    static constexpr T epsilon() { return T(EPSILON); }                    \
    static constexpr T infinity() { return T(__builtin_inff()); }          \
    static constexpr T quiet_NaN() { return T(__builtin_nanf("")); }       \
  };
HM_FLOAT_LIMITS(float, 0x1p-126f, 0x1.fffffep127f, 0x1p-23f)
HM_FLOAT_LIMITS(half, 0x1p-14f, 65504.0f, 0x1p-10f)
HM_FLOAT_LIMITS(bfloat, 0x1p-126f, 0x1.fep127f, 0x1p-7f)
#undef HM_FLOAT_LIMITS

}  // namespace metal

using metal::as_type;  // Metal has it outside the namespace too
