// How this library was built, as text that can be read from the file without loading it (thresholdnet/backends/libraries.py):
// a library that torch refuses to load can still say which torch it was built against. setup.py writes the lines.
#if defined(_MSC_VER)
#define KEPT __declspec(dllexport)
#else
#define KEPT __attribute__((used))
#endif

extern "C" KEPT const char thresholdnet_build_record[] =
#include "build_record.inc"
    ;
