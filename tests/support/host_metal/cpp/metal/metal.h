// Stands for the Metal standard library when g++ compiles kernel text. Includes no C++ library
// header: a name that Metal lacks must not compile.
#pragma once
#include "abi.h"

#pragma GCC diagnostic ignored "-Wattributes"

#define __METAL__ 1
#define __METAL_VERSION__ 310
#define METAL_FUNC inline

// Address spaces are types only in the strict pass; here all memory is one. Variables declared
// `threadgroup` have been rewritten before this (see host_unit.py).
#define device
#define constant
#define thread
#define threadgroup
#define kernel

#include "metal/macros.h"
#include "metal/scalar.h"
#include "metal/traits.h"
#include "metal/vector.h"
#include "metal/math.h"
#include "metal/simd.h"
#include "metal/matrix.h"
