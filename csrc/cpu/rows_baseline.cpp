// The loops for every machine of the compiler's target.
#define TABLE baseline_table
#define NAME "baseline"
#define VECTOR 16
#include "rows.inl"
#include "products.inl"
#define WINOGRAD baseline_winograd
#include "winograd.inl"
#define WEIGHT_GRADIENTS baseline_weight_gradients
#include "weight_gradient.inl"
#define CONVOLUTIONS baseline_convolutions
#include "few_pixels.inl"
