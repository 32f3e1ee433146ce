// The kernel table of the instruction set that FJ_ISA names; the last include of each build.
#pragma once

#include "audio.h"
#include "decoder.h"
#include "sampler.h"
#include "vision.h"

namespace flexjudge {

extern const Kernels FJ_TABLE;
const Kernels FJ_TABLE = {
    FJ_NAME,
    FJ_ISA::linear,
    FJ_ISA::linear_scratch_bytes,
    FJ_ISA::attention,
    FJ_ISA::attention_scratch_bytes,
    FJ_ISA::decoder,
    FJ_ISA::decoder_scratch_bytes,
    FJ_ISA::draw_token,
    FJ_ISA::vision,
    FJ_ISA::vision_scratch_bytes,
    FJ_ISA::audio,
    FJ_ISA::audio_scratch_bytes,
};

}  // namespace flexjudge
