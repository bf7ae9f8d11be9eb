// The CUDA sources in the emulator, as operators on CPU tensors: torch.ops.thresholdnet_emulated, for tests.
//
// Built from ../ops.cpp (-Dthresholdnet_csrc=thresholdnet_emulated: the same schemas), ../cuda/*.cu and this folder.
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ../ops.cpp
#include "../cuda/launched.h"
#include "fibers.h"

namespace thresholdnet {
namespace {

struct EmulatedPlace {
  EmulatedPlace(const char*, const Tensor&) {}
  void* stream() const { return nullptr; }
};

void reverse_order(bool reverse) { emulator::reverse_order(reverse); }

}  // namespace
}  // namespace thresholdnet

STABLE_TORCH_LIBRARY_FRAGMENT(thresholdnet_emulated, m) {
  m.def("reverse_order(bool reverse) -> ()");  // see fibers.h
}

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_emulated, CPU, m) {
  using Operators = thresholdnet::Operators<thresholdnet::Launched<thresholdnet::EmulatedPlace>>;
  Operators::implement(m);
  Operators::implement_averages(m);
}

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_emulated, CompositeExplicitAutograd, m) {
  m.impl("reverse_order", TORCH_BOX(&thresholdnet::reverse_order));
}
