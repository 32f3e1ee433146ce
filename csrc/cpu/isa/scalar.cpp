// Kernels for any processor. Library headers come before the target is set, so that no inline function of theirs is
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


#define FJ_ISA scalar
#define FJ_NAME "scalar"
#define FJ_TABLE kernels_scalar
#include "simd_scalar.h"
#include "table.h"
