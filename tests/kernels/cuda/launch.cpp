// Built once per compiled kernel, with -DSOURCE='"kernel.cu"' -DKERNEL=its_name.
#include SOURCE

extern "C" const char* launch(const shim::Geometry* geometry, void** arguments) {
    return shim::launch(KERNEL, *geometry, arguments);
}
