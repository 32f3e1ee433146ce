// Kernels for AVX-512 with VNNI and products of bfloat16 pairs.
#include "library_headers.h"

#ifndef FJ_EMULATED
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")
#endif
#define FJ_BF16_DOTS
#define FJ_ISA avx512_bf16
#define FJ_NAME "avx512_bf16"
#define FJ_TABLE kernels_avx512_bf16
#include "simd_avx512.h"
#include "dots_bytes.h"
#include "table.h"
