// What the caller asks of the library itself.
#include "common.cuh"
#include "include/megavideo.h"

extern "C" int megavideo_abi(void) { return MEGAVIDEO_ABI; }

extern "C" const char* megavideo_error_text(int status) { return megavideo::error_text(status); }
