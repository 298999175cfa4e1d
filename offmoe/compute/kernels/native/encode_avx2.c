/* The encoder for avx2; build.py says with which flags this is compiled. */
#include <string.h>
#include "offmoe.h"
#include "constants.h"
#include "vectors_avx2.h"
#define ENCODE encode_avx2
#define COMPARE compare_avx2
#include "encode.h"
