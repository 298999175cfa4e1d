/* Kernels for portable; build.py says with which flags this is compiled. */
#include <string.h>
#include "offmoe.h"
#include "constants.h"
#include "vectors_portable.h"
#define VARIANT_TABLE kernels_portable
#define VARIANT_NAME "portable"
#define ENCODE encode_portable
#define COMPARE compare_portable
#define DECODE decode_portable
#include "variant.h"
