// The convolution of ../cuda/conv.h on the emulated device, for CPU tensors.
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ../ops.cpp
#include <torch/csrc/stable/library.h>

#include "../cuda/conv_operator.h"

namespace {

struct NoPlace {
  NoPlace(const char*, const thresholdnet::Tensor&) {}
  void* stream() const { return nullptr; }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(thresholdnet_emulated, m) { m.def(thresholdnet::convolution::SCHEMA); }

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_emulated, CPU, m) {
  m.impl("convolution", TORCH_BOX(&thresholdnet::convolution::convolution<NoPlace>));
}
