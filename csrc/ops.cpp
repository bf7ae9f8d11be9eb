// The operators of the library `thresholdnet_csrc`: one schema each, implemented per device (cpu/binding.cpp; CUDA
// registers the same names). Tensors of pixels are [N, C, H, W] in channels_last order: a pixel's channels lie side by
// side, pixels follow each other at one stride, which exceeds C for a channel slice of a larger tensor. Vectors per
// channel are float32, float64 for float64 pixels. A tensor of no elements in a list stands for "none".
//
// Letters: z raw value, x value, y = act(z * scale + shift); g gradient of y; xhat = (z - mean) * rstd; K the summed
// channels of a list. activation: 0 none, 1 ReLU, 2 ReLU6, between 0 and 1 LeakyReLU's slope.
#define TORCH_TARGET_VERSION 0x020a000000000000  // torch 2.10: the oldest stable ABI that has all that is used here
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(thresholdnet_csrc, m) {
  // out [N, K, H, W] = act(the sources side by side * scale + shift), or a copy of them where there is no scale.
  m.def("gather(Tensor[] sources, Tensor? scale, Tensor? shift, float activation, Tensor(a!) out) -> ()");

  // [2, C]: mean and biased variance over all pixels.
  m.def("moments(Tensor z) -> Tensor");

  // out = (g [+ add]) where the activation of z * scale + shift passes a gradient on, else 0; returns sum(out) and
  // sum(out * xhat), [2, C]. out may be g or add.
  m.def(
      "mask_sums(Tensor g, Tensor? add, Tensor z, Tensor scale, Tensor shift, Tensor mean, Tensor rstd, "
      "float activation, Tensor(a!) out) -> Tensor");

  // A pre-activation reader's gradient on its way to its sources: m = g masked by the reader's activation of
  // source * scale + shift (vectors over all K channels), out_j = [before_j +] scale * m_j; returns sum(m) and
  // sum(m * xhat), [2, K]. out_j may be before_j.
  m.def(
      "send(Tensor g, Tensor[] sources, Tensor scale, Tensor shift, Tensor mean, Tensor rstd, Tensor[] before, "
      "float activation, Tensor(a!)[] out) -> Tensor");

  // out = a * g + b * (z - mean) + c per channel (a = 1, mean = 0 where none). out may be g. The mean is no part of c:
  // where it is many deviations, b z and b mean would cancel.
  m.def("linear(Tensor g, Tensor z, Tensor? a, Tensor b, Tensor c, Tensor? mean, Tensor(a!) out) -> ()");

  // What a BatchNorm is to its backward, [7, C] in mean's dtype: gamma, beta, scale = gamma rstd, shift = beta - mean
  // scale, rstd = 1 / sqrt(variance + eps), -scale / pixels and -scale rstd / pixels.
  m.def(
      "batch_norm_vectors(Tensor gamma, Tensor beta, Tensor mean, Tensor variance, float eps, float pixels) "
      "-> Tensor");

  // Max-pooling as torch.nn.functional.max_pool2d, NaN and ties included; backward finds the maxima again in x.
  m.def("max_pool2d(Tensor x, int kernel_size, int stride, int padding) -> Tensor");
  m.def("max_pool2d_backward(Tensor grad, Tensor x, int kernel_size, int stride, int padding) -> Tensor");

  // Averages of windows side by side (stride is kernel_size, no padding) of x, or of act(x * scale + shift), which is
  // rounded with the average alone. On GPUs.
  m.def("avg_pool2d(Tensor x, Tensor? scale, Tensor? shift, float activation, int kernel_size) -> Tensor");

  // mask_sums of what the gradient of such averages sends to z, which is not stored. On GPUs.
  m.def(
      "spread_mask_sums(Tensor grad, Tensor z, Tensor scale, Tensor shift, Tensor mean, Tensor rstd, float activation, "
      "int kernel_size, Tensor(a!) out) -> Tensor");

  // What decides how an operator runs on these tensors beside their values (described.cpp), and whether two of them begin
  // in one memory.
  m.def("described(Tensor[] tensors) -> (str, bool)");

  // The CPU's instructions in use: avx512, avx2 or baseline.
  m.def("instructions() -> str");
}
