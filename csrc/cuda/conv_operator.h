// The operator around the launchers of conv.h: checks, workspaces, result; the same for a GPU and for the emulator.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "conv.h"

namespace thresholdnet::convolution {

// out [N, C, H, W], a slot: channels side by side with zeros up to a multiple of 8, pixels at one stride, a multiple of
// 8; raw is a slot of the same shape. source starts at the slot that entries count from. weight [C, n]; entries, row8,
// weight_index, channel and taps_inside are the int32 tables of kernels/tables.py; scale, shift per input channel and
// vectors per output channel are float32. form, epilogue, activation: the enumerations of cuda/conv.h.
// Returns [2, C] float32: moments or the mask's sums; uninitialised for the other epilogues.
constexpr const char* SCHEMA =
    "convolution(Tensor source, Tensor weight, Tensor entries, Tensor row8, Tensor weight_index, Tensor? taps_inside, "
    "int form, Tensor? scale, Tensor? shift, Tensor channel, Tensor[] vectors, Tensor? raw, int epilogue, "
    "float activation, bool add, Tensor(a!) out) -> Tensor";

namespace {

using torch::headeronly::ScalarType;

constexpr const char* OP = "convolution";

void like_out(const char* name, const Tensor& t, const Tensor& out) {
  if (t.scalar_type() != out.scalar_type()) refuse(OP, ": ", name, " must have the dtype of out");
  same_device(OP, name, t, out);
}

// Elements from one pixel of a slot to the next, divided by 8.
int64_t slot_row8(const char* name, const Tensor& t, const Tensor& out) {
  like_out(name, t, out);
  if (t.dim() != 4 || !std::equal(t.sizes().begin(), t.sizes().end(), out.sizes().begin()))
    refuse(OP, ": ", name, " must have the shape of out, ", listed(out.sizes()), ", got ", listed(t.sizes()));
  const int64_t n = t.size(0), c = t.size(1), h = t.size(2), w = t.size(3), padded = (c + 7) / 8 * 8;
  const int64_t row = w > 1 ? t.stride(3) : h > 1 ? t.stride(2) : n > 1 ? t.stride(0) : padded;
  const bool even = (c == 1 || t.stride(1) == 1) && row % 8 == 0 && row >= padded &&
      (h == 1 || t.stride(2) == w * row) && (n == 1 || t.stride(0) == h * w * row);
  if (!even || reinterpret_cast<uintptr_t>(t.data_ptr()) % 16) {
    refuse(
        OP, ": ", name, " must be a slot, pixels a multiple of 8 elements apart and 16 bytes aligned, got shape ",
        listed(t.sizes()), " with strides ", listed(t.strides()));
  }
  return row / 8;
}

const int32_t* table(const char* name, const Tensor& t, int64_t length, const Tensor& out) {
  same_device(OP, name, t, out);
  if (t.scalar_type() != ScalarType::Int || !t.is_contiguous() || t.numel() != length)
    refuse(OP, ": ", name, " must be ", length, " contiguous int32, got shape ", listed(t.sizes()));
  return static_cast<const int32_t*>(t.data_ptr());
}

const float* vector_at(const char* name, const Tensor& t, const Tensor& out) {
  same_device(OP, name, t, out);
  if (t.scalar_type() != ScalarType::Float || !t.is_contiguous() || t.dim() != 1)
    refuse(OP, ": ", name, " must be a contiguous float32 vector, got shape ", listed(t.sizes()));
  return static_cast<const float*>(t.data_ptr());
}

int in_range(const char* name, int64_t value, int64_t last) {
  if (value < 0 || value > last) refuse(OP, ": ", name, " must be 0 to ", last, ", got ", value);
  return static_cast<int>(value);
}

// Columns of a block: the fewest that hold all channels; nine taps of 64 columns would not fit beside a halo.
int column_tile(Form form, int64_t channels) {
  return channels <= 16 ? 16 : channels <= 32 || form != Form::gemm ? 32 : 64;
}

// The operator. Place: as in launched.h.
template <class Place>
Tensor convolution(
    Tensor source, Tensor weight, Tensor entries, Tensor row8, Tensor weight_index, std::optional<Tensor> taps_inside,
    int64_t form, std::optional<Tensor> scale, std::optional<Tensor> shift, Tensor channel, std::vector<Tensor> vectors,
    std::optional<Tensor> raw, int64_t epilogue, double activation, bool add, Tensor out) {
  const Place place(OP, out);
  Arguments p{};
  if (out.dim() != 4 || out.numel() == 0) refuse(OP, ": out must be [N, C, H, W], not empty, got ", listed(out.sizes()));
  if (out.scalar_type() != ScalarType::BFloat16 && out.scalar_type() != ScalarType::Half)
    refuse(OP, ": out must be bfloat16 or float16");
  p.element = out.scalar_type() == ScalarType::Half ? Element::fp16 : Element::bf16;
  p.form = static_cast<Form>(in_range("form", form, 2));
  p.epilogue = static_cast<Epilogue>(in_range("epilogue", epilogue, 3));
  p.act = range_of<float>(OP, activation);
  p.add = add;
  p.affine = scale.has_value();
  p.batch = out.size(0), p.height = out.size(2), p.width = out.size(3);
  const int64_t channels = out.size(1);
  p.channels = static_cast<int>(channels);
  p.column_tile = column_tile(p.form, channels);
  p.columns = static_cast<int>((channels + p.column_tile - 1) / p.column_tile * p.column_tile);
  p.out_row8 = slot_row8("out", out, out);
  p.out = out.data_ptr();

  like_out("source", source, out);
  if (reinterpret_cast<uintptr_t>(source.data_ptr()) % 16) refuse(OP, ": source must be 16 bytes aligned");
  p.source = source.data_ptr();
  like_out("weight", weight, out);
  if (weight.dim() != 2 || weight.size(0) != channels || !weight.is_contiguous())
    refuse(OP, ": weight must be contiguous, [", channels, ", n], got shape ", listed(weight.sizes()));
  p.weight = weight.data_ptr();
  p.weight_columns = static_cast<int>(weight.size(1));
  p.chunks = static_cast<int>(entries.numel() / (CHUNK / 8)) - 1;
  if (p.chunks < 0) refuse(OP, ": entries must hold a spare chunk of ", CHUNK / 8, ", got ", entries.numel());
  const int64_t all_k = k_rows(p.form, p.chunks), length = (p.chunks + 1) * CHUNK;
  p.entries = table("entries", entries, length / 8, out);
  p.row8 = table("row8", row8, length / 8, out);
  p.weight_index = table("weight_index", weight_index, all_k, out);
  if (taps_inside) p.taps_inside = table("taps_inside", *taps_inside, p.batch * p.height * p.width, out);
  if (p.affine != shift.has_value()) refuse(OP, ": scale and shift must come together");
  if (p.affine) {
    if (p.form != Form::gemm || taps_inside) refuse(OP, ": scale must be none for a 3x3 kernel");
    p.scale = vector_at("scale", *scale, out);
    p.shift = vector_at("shift", *shift, out);
    p.channel = table("channel", channel, length, out);
  }
  const size_t wanted = p.epilogue == Epilogue::bias ? 1 : p.epilogue == Epilogue::mask ? 4 : 0;
  if (vectors.size() != wanted) refuse(OP, ": vectors must be ", wanted, " for this epilogue, got ", vectors.size());
  for (size_t i = 0; i < wanted; ++i) {
    p.vectors[i] = vector_at("vectors", vectors[i], out);
    if (vectors[i].numel() != channels) refuse(OP, ": vectors must hold ", channels, ", got ", vectors[i].numel());
  }
  if (raw.has_value() != (p.epilogue == Epilogue::mask)) refuse(OP, ": raw must come with the mask and with it alone");
  if (raw) {
    p.raw_row8 = slot_row8("raw", *raw, out);
    p.raw = raw->data_ptr();
  }

  const int64_t all_tiles = tiles(p.form, p.batch, p.height, p.width);
  const bool merged = p.epilogue == Epilogue::statistics || p.epilogue == Epilogue::mask;
  const auto workspace = [&](std::vector<int64_t> shape, ScalarType type) {
    return torch::stable::new_empty(out, shape, type);
  };
  const Tensor moments = workspace({2, channels}, ScalarType::Float);
  const Tensor packed = workspace({p.columns, all_k}, out.scalar_type());
  const Tensor affine = workspace({2, p.affine ? length : 0}, ScalarType::Float);
  const Tensor partial = workspace({merged ? all_tiles : 0, 2, p.columns}, ScalarType::Float);
  const Tensor tile_pixels = workspace({p.epilogue == Epilogue::statistics ? all_tiles : 0}, ScalarType::Int);
  p.moments = static_cast<float*>(moments.data_ptr());
  p.packed = packed.data_ptr();
  p.packed_affine = static_cast<float*>(affine.data_ptr());
  p.partial = static_cast<float*>(partial.data_ptr());
  p.tile_pixels = static_cast<int32_t*>(tile_pixels.data_ptr());
  if (const char* problem = run(p, place.stream())) refuse(OP, ": it could not be launched: ", problem);
  return moments;
}

}  // namespace
}  // namespace thresholdnet::convolution
