// Kernels for AVX2, FMA and F16C.
#include "library_headers.h"

#pragma GCC target("avx2,fma,f16c")
#define FJ_ISA avx2
#define FJ_NAME "avx2"
#define FJ_TABLE kernels_avx2
#include "simd_avx2.h"
#include "dots_avx2.h"
#include "table.h"
