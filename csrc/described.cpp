// What decides how an operator runs on tensors beside their values, as text: two lists that it is equal for are alike in
// dtypes, devices, shapes, strides and the addresses' remainders of 16. The same for every device.
//
// A number takes as many characters as it needs, 5 bits each, the last one below CONTINUED: no text begins another.
#define TORCH_TARGET_VERSION 0x020a000000000000  // as in ops.cpp
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace thresholdnet {
namespace {

using torch::stable::Tensor;

constexpr char FIRST = '0';
constexpr uint64_t CONTINUED = 32;

void write(std::string& text, uint64_t number) {
  for (; number >= CONTINUED; number /= CONTINUED) text += static_cast<char>(FIRST + CONTINUED + number % CONTINUED);
  text += static_cast<char>(FIRST + number);
}

std::tuple<std::string, bool> described(const std::vector<Tensor>& tensors) {
  std::string text;
  std::vector<uintptr_t> memories;
  memories.reserve(tensors.size());
  for (const Tensor& t : tensors) {
    const auto address = reinterpret_cast<uintptr_t>(t.data_ptr());
    memories.push_back(address - t.storage_offset() * t.element_size());
    write(text, static_cast<uint64_t>(t.scalar_type()));
    write(text, static_cast<uint64_t>(t.device().type()));
    write(text, static_cast<uint64_t>(t.device().index() + 1));
    write(text, address % 16);
    write(text, t.dim());
    for (const int64_t size : t.sizes()) write(text, size);
    for (const int64_t stride : t.strides()) write(text, stride);
  }
  std::sort(memories.begin(), memories.end());
  return {text, std::adjacent_find(memories.begin(), memories.end()) != memories.end()};
}

}  // namespace
}  // namespace thresholdnet

// Implicit: autograd has nothing to look at.
STABLE_TORCH_LIBRARY_IMPL(thresholdnet_csrc, CompositeImplicitAutograd, m) {
  m.impl("described", TORCH_BOX(&thresholdnet::described));
}
