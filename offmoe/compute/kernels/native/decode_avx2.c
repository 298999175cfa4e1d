/* The decoders of GGUF blocks for avx2; build.py says with which flags this is compiled. */
#include "offmoe.h"
#define DECODE decode_avx2
#include "decode.h"
