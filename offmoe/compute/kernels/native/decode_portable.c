/* The decoders of GGUF blocks for portable; build.py says with which flags this is compiled. */
#include "offmoe.h"
#define DECODE decode_portable
#include "decode.h"
