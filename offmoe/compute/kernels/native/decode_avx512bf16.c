/* The decoders of GGUF blocks for avx512 with AVX512-BF16; build.py says with which flags this is compiled. */
#include "offmoe.h"
#define DECODE decode_avx512bf16
#include "decode.h"
