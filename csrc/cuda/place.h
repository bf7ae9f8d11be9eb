// Where an operator of the CUDA library runs: the GPU of a tensor, and torch's current stream there.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../checks.h"

// A library that names this weakly loads in a torch without CUDA as well, where it is null.
#if defined(__GNUC__)
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace thresholdnet {

class CudaPlace {
 public:
  CudaPlace(const char* op, const Tensor& like) : guard_(index_of(op, like)) {
    if (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_))
      refuse(op, ": torch has no current stream for ", place_of(like));
  }

  void* stream() const { return stream_; }

 private:
  // A call with tensors here and there comes to CUDA whatever its first tensor is.
  static int32_t index_of(const char* op, const Tensor& like) {
    if (!like.is_cuda()) refuse(op, ": all tensors must lie on one GPU, got one on ", place_of(like));
    return like.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace thresholdnet
