/* The encoder for avx512; build.py says with which flags this is compiled. */
#include <string.h>
#include "offmoe.h"
#include "constants.h"
#include "vectors_avx512.h"
#define ENCODE encode_avx512
#define COMPARE compare_avx512
#include "encode.h"
