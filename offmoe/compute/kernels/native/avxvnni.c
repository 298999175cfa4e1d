/* Kernels for avxvnni; build.py says with which flags this is compiled. */
#include <string.h>
#include "offmoe.h"
#include "constants.h"
#include "vectors_avx2.h"
#define VARIANT_TABLE kernels_avxvnni
#define VARIANT_NAME "avxvnni"
#define ENCODE encode_avx2
#define COMPARE compare_avx2
#define DECODE decode_avx2
#include "variant.h"
