// Every library header of the kernels. Comes before the target of a build is set, so that no inline function of the
// library is compiled for it and then picked by the linker for code that runs anywhere.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <utility>
#include <vector>

#include "flexjudge/decoder.h"
#include "flexjudge/half.h"
