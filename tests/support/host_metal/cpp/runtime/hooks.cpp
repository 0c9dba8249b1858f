// What g++ calls in an instrumented kernel: a hook per memory access (-fsanitize=thread) and one
// per kind of undefined behaviour (-fsanitize=...). The sanitizers' own libraries are not linked;
// these few functions stand in for them and know what a GPU allows.
#include <cstdint>
#include <cstring>

#include "abi.h"
#include "fault.h"
#include "memory.h"

using namespace hm;

#define CALLER ((uintptr_t)__builtin_return_address(0))

// ---------------------------------------------------------------- memory accesses

static void read(void* p, unsigned long n, uintptr_t pc) {
  check_access((uintptr_t)p, (unsigned)n, false, pc);
}
static void write(void* p, unsigned long n, uintptr_t pc) {
  check_access((uintptr_t)p, (unsigned)n, true, pc);
}

#define HOOKS(FORM, N)                                                              \
  void __tsan_##FORM##read##N(void* p) { read(p, N, CALLER); }                      \
  void __tsan_##FORM##write##N(void* p) { write(p, N, CALLER); }
#define ALL_HOOKS(N) HOOKS(, N) HOOKS(unaligned_, N) HOOKS(volatile_, N) \
  HOOKS(unaligned_volatile_, N)

extern "C" {
ALL_HOOKS(1) ALL_HOOKS(2) ALL_HOOKS(4) ALL_HOOKS(8) ALL_HOOKS(16)

void __tsan_read_range(void* p, unsigned long n) { read(p, n, CALLER); }
void __tsan_write_range(void* p, unsigned long n) { write(p, n, CALLER); }
void* __tsan_memcpy(void* to, void* from, unsigned long n) {
  read(from, n, CALLER);
  write(to, n, CALLER);
  return memcpy(to, from, n);
}
void* __tsan_memmove(void* to, void* from, unsigned long n) {
  read(from, n, CALLER);
  write(to, n, CALLER);
  return memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, unsigned long n) {
  write(to, n, CALLER);
  return memset(to, value, n);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}

// ---------------------------------------------------------------- undefined behaviour

// Layouts fixed by g++: each handler gets a pointer to data that starts with the source position.
struct TypeName {
  uint16_t kind, info;
  char text[1];
};
struct BoundsData {
  const char* file;
  uint32_t line, column;
  TypeName* array;
};
struct MismatchData {
  const char* file;
  uint32_t line, column;
  TypeName* type;
  uint8_t log_align;
};

static Site site_of(const void* data) {
  const BoundsData* start = (const BoundsData*)data;
  return Site{start->file, (int)start->line};
}

#define UNDEFINED(NAME, WHAT) \
  void __ubsan_handle_##NAME(void* data) { fault_at(site_of(data), "undefined", WHAT); }

extern "C" {
void __ubsan_handle_out_of_bounds(BoundsData* data, uintptr_t index) {
  fault_at(site_of(data), "out-of-bounds", "index %ld of a private %s", (long)index,
           data->array->text);
}

void __ubsan_handle_type_mismatch_v1(MismatchData* data, uintptr_t address) {
  unsigned long align = 1ul << data->log_align;
  if (!address)
    fault_at(site_of(data), "undefined", "null pointer used as %s", data->type->text);
  if (address % align)
    fault_at(site_of(data), "misaligned", "%s at an address that is not a multiple of %lu",
             data->type->text, align);
  fault_at(site_of(data), "out-of-bounds", "%s beyond the end of a private variable",
           data->type->text);
}

UNDEFINED(add_overflow, "signed integer overflow in +")
UNDEFINED(sub_overflow, "signed integer overflow in -")
UNDEFINED(mul_overflow, "signed integer overflow in *")
UNDEFINED(negate_overflow, "signed integer overflow in a negation")
UNDEFINED(divrem_overflow, "division by zero")
UNDEFINED(shift_out_of_bounds, "shift by more bits than the type has, or fewer than none")
UNDEFINED(float_cast_overflow, "the integer type cannot hold this float")
UNDEFINED(missing_return, "end of a function that should return a value")
UNDEFINED(builtin_unreachable, "unreachable code is reached")
}
