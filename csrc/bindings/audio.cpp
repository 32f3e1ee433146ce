// An audio tower's layers as a torch op: shapes, types and offsets are checked here.
#include "flexjudge/audio.h"

#include "common.h"

namespace {

using namespace flexjudge::bindings;

flexjudge::LayerNorm layer_norm(PlanReader& read) {
  const float* weight = read.floats();
  return {weight, read.floats()};
}

flexjudge::AudioTower read_audio(const Tensor& plan) {
  PlanReader read(plan);
  flexjudge::AudioTower m{};
  m.hidden = read.next();
  m.num_heads = read.next();
  m.eps = read.real();
  m.layers.resize(static_cast<std::size_t>(read.next()));
  check(!m.layers.empty(), "audio: the tower has no layers");
  for (flexjudge::AudioLayer& layer : m.layers) {
    layer.input_norm = layer_norm(read);
    layer.qkv = read.linear();
    layer.out = read.linear();
    layer.post_norm = layer_norm(read);
    layer.up = read.linear();
    layer.down = read.linear();
  }
  read.finish();
  return m;
}

// Towers are held by address, as decoders are.
int64_t open_audio(const Tensor& plan) { return reinterpret_cast<int64_t>(new flexjudge::AudioTower(read_audio(plan))); }
void close_audio(int64_t handle) { delete reinterpret_cast<flexjudge::AudioTower*>(handle); }

// See `ops/audio.py`. Changes `hidden`, float32 [num_tokens, hidden], in place.
void audio(int64_t handle, Tensor hidden, const Tensor& windows, int64_t threads) {
  const auto& model = *reinterpret_cast<const flexjudge::AudioTower*>(handle);
  check(hidden.scalar_type() == ScalarType::Float && hidden.dim() == 2 && hidden.is_contiguous() && hidden.size(1) == model.hidden && hidden.size(0) > 0,
        "audio: hidden must be contiguous float32 [num_tokens, hidden]");
  const flexjudge::AudioStep step{hidden.size(0), segments(windows, hidden.size(0)), data<float>(hidden)};
  const flexjudge::Kernels& k = kernels();
  const Scratch scratch(hidden, k.audio_scratch_bytes(model, step, static_cast<int>(threads)));
  flexjudge::run_team(static_cast<int>(threads), [&](flexjudge::Team& team, int rank) { k.audio(model, step, scratch.begin, team, rank); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flexjudge, m) {
  m.def("open_audio(Tensor plan) -> int");
  m.def("close_audio(int handle) -> ()");
  m.def("audio(int handle, Tensor(a!) hidden, Tensor windows, int threads) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexjudge, CPU, m) {
  m.impl("open_audio", TORCH_BOX(&open_audio));
  m.impl("audio", TORCH_BOX(&audio));
}

STABLE_TORCH_LIBRARY_IMPL(flexjudge, CompositeExplicitAutograd, m) { m.impl("close_audio", TORCH_BOX(&close_audio)); }
