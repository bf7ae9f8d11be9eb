// The convolution of cuda/conv.h on CUDA tensors.
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ops.cpp
#include <torch/csrc/stable/library.h>

#include "cuda/conv_operator.h"
#include "cuda/place.h"

STABLE_TORCH_LIBRARY_FRAGMENT(thresholdnet_csrc, m) { m.def(thresholdnet::convolution::SCHEMA); }

STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CUDA, m) {
  m.impl("convolution", TORCH_BOX(&thresholdnet::convolution::convolution<thresholdnet::CudaPlace>));
}
