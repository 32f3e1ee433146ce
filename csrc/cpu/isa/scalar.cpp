// Kernels for any processor.
#include "library_headers.h"
#define FJ_ISA scalar
#define FJ_NAME "scalar"
#define FJ_TABLE kernels_scalar
#include "simd_scalar.h"
#include "dots_bytes.h"
#include "table.h"
