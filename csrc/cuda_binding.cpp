// CUDA's side of the operators of ops.cpp, which the CPU's library defines: load that one first.
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ops.cpp
#include "cuda/launched.h"
#include "cuda/place.h"

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CUDA, m) {
  using Operators = thresholdnet::Operators<thresholdnet::Launched<thresholdnet::CudaPlace>>;
  Operators::implement(m);
  Operators::implement_averages(m);
}
