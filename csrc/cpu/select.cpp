// Picks the kernels that this processor runs.
#include <cstring>

#include "flexjudge/decoder.h"

namespace flexjudge {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512_vnni;
extern const Kernels kernels_avx512_bf16;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool runs_here;
};

}  // namespace

const Kernels* find_kernels(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool vnni = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
  const Candidate best_first[] = {
      {&kernels_avx512_bf16, bf16}, {&kernels_avx512_vnni, vnni}, {&kernels_avx2, avx2}, {&kernels_scalar, true}};
#else
  const Candidate best_first[] = {{&kernels_scalar, true}};
#endif
  for (const Candidate& candidate : best_first) {
    if (!candidate.runs_here) continue;
    if (name == nullptr || *name == '\0' || std::strcmp(name, candidate.kernels->isa) == 0) return candidate.kernels;
  }
  return nullptr;
}

}  // namespace flexjudge
