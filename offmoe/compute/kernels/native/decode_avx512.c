/* The decoders of GGUF blocks for avx512; build.py says with which flags this is compiled. */
#include "offmoe.h"
#define DECODE decode_avx512
#include "decode.h"
