// The vision tower as a torch op: shapes, types and offsets are checked here.
#include "common.h"

namespace {

using namespace flexjudge::bindings;

flexjudge::VisionTower read_vision(const Tensor& plan) {
  PlanReader read(plan);
  flexjudge::VisionTower m{};
  m.hidden = read.next();
  m.intermediate = read.next();
  m.num_heads = read.next();
  m.merge = read.next();
  m.eps = read.real();
  m.patch_embed = read.linear();
  m.layers.resize(static_cast<std::size_t>(read.next()));
  for (flexjudge::Layer& layer : m.layers) {
    m.is_full.push_back(read.next() != 0);
    layer = read.layer();
  }
  m.merge_norm = read.floats();
  m.merge_in = read.linear();
  m.merge_out = read.linear();
  read.finish();
  return m;
}

// Towers are held by address, as decoders are.
int64_t open_vision(const Tensor& plan) { return reinterpret_cast<int64_t>(new flexjudge::VisionTower(read_vision(plan))); }
void close_vision(int64_t handle) { delete reinterpret_cast<flexjudge::VisionTower*>(handle); }

void check_floats(const Tensor& t, int64_t rows, int64_t columns) {
  check(t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.is_contiguous() && t.size(0) == rows && t.size(1) == columns,
        "vision: patches, cos and sin must be contiguous float32 of matching shapes");
}

// See `ops/vision.py`. Returns float32 [num_patches / merge, hidden of the language model].
Tensor vision(int64_t handle, const Tensor& patches, const Tensor& cos, const Tensor& sin, const Tensor& windows, const Tensor& frames, int64_t threads) {
  const auto& model = *reinterpret_cast<const flexjudge::VisionTower*>(handle);
  const int64_t n = patches.size(0);
  check(n > 0 && n % model.merge == 0, "vision: the patches are no whole number of merged ones");
  check_floats(patches, n, model.patch_embed.columns());
  check_floats(cos, n, model.head_dim() / 2);
  check_floats(sin, n, model.head_dim() / 2);
  Tensor out = new_tensor<2>(patches, {n / model.merge, model.merge_out.rows()}, ScalarType::Float);
  auto floats = [](const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); };
  const flexjudge::VisionStep step{n, floats(patches), floats(cos), floats(sin), segments(windows, n), segments(frames, n), data<float>(out)};
  const flexjudge::Kernels& k = kernels();
  const Scratch scratch(patches, k.vision_scratch_bytes(model, step, static_cast<int>(threads)));
  flexjudge::run_team(static_cast<int>(threads), [&](flexjudge::Team& team, int rank) { k.vision(model, step, scratch.begin, team, rank); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flexjudge, m) {
  m.def("open_vision(Tensor plan) -> int");
  m.def("close_vision(int handle) -> ()");
  m.def("vision(int handle, Tensor patches, Tensor cos, Tensor sin, Tensor windows, Tensor frames, int threads) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(flexjudge, CPU, m) {
  m.impl("open_vision", TORCH_BOX(&open_vision));
  m.impl("vision", TORCH_BOX(&vision));
}

STABLE_TORCH_LIBRARY_IMPL(flexjudge, CompositeExplicitAutograd, m) { m.impl("close_vision", TORCH_BOX(&close_vision)); }
