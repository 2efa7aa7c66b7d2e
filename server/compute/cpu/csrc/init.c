// Whether this process may run the kernels.

#include <stdint.h>

#ifdef EMULATED_AMX
int64_t tile_faults;  // emulated_amx.h
#endif

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

// Asks Linux for the tile registers; 0 if this process may use them.
int kernels_init(void) {
    return (int)syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
}
#else
int kernels_init(void) { return 0; }
#endif
