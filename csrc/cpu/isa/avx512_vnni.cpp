// Kernels for AVX-512 with VNNI.
#include "library_headers.h"

#ifndef FJ_EMULATED
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#endif
#define FJ_ISA avx512_vnni
#define FJ_NAME "avx512_vnni"
#define FJ_TABLE kernels_avx512_vnni
#include "simd_avx512.h"
#include "dots_bytes.h"
#include "table.h"
