// The loops for every machine of the compiler's target.
#define TABLE baseline_table
#define NAME "baseline"
#include "rows.inl"
