// How many threads the loops of this library take; called by `kernels/cpp/library.py` and `attention/cpp_attention.py`.

#include "numbers.h"

extern "C" void set_num_threads(int64_t n) { num_threads = int(n); }
