// CUDA's side of the operators of ops.cpp, which the CPU's library defines: load that one first.
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ops.cpp
#include "cuda/launched.h"
#include "cuda/place.h"

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CUDA, m) {
  thresholdnet::Operators<thresholdnet::Launched<thresholdnet::CudaPlace>>::implement(m);
}
