// Kernels for AVX2, FMA and F16C. Library headers come before the target is set, so that no inline function of theirs is
// compiled for it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "flexjudge/decoder.h"
#include "flexjudge/half.h"

#pragma GCC target("avx2,fma,f16c")
#define FJ_ISA avx2
#define FJ_NAME "avx2"
#define FJ_TABLE kernels_avx2
#include "simd_avx2.h"
#include "table.h"
