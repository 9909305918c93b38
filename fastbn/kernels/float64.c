/* The kernels for float64, compiled once per instruction set, with ISA set to its name. */
#define DTYPE float64
#define T double
#define ELEMENT_BITS 64
#define ARITHMETIC_BITS 64
#include "dtype.h"
