// What tch does not bind: oneDNN's matrix product, as libtorch carries it, libtorch's switch for TF32, and its part for CUDA.
//
// libtorch multiplies bf16 by oneDNN but fp32 by MKL, which on processors other than Intel's leaves the widest vectors unused; the
// function below, which libtorch's own operators call for bf16, takes fp32 too and writes into a given tensor. It is no operator, so
// tch has no binding. All is declared here without libtorch's headers: references are all it takes. Weak, so that a
// libtorch without it still links, and the caller multiplies by libtorch's operators.
#include <dlfcn.h>

namespace at {
class Tensor;
class Context {
 public:
  __attribute__((weak)) void setAllowTF32CuBLAS(bool);
};
__attribute__((weak)) Context& globalContext();
namespace native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out, float beta, float alpha);
}
}

extern "C" bool murmur_has_onednn() noexcept { return at::native::mkldnn_matmul != nullptr; }

// out = beta * out + a b. False if oneDNN refused, with `out` in an unknown state.
extern "C" bool murmur_onednn_matmul(const at::Tensor* a, const at::Tensor* b, const at::Tensor* out, float beta) noexcept {
  try {
    at::native::mkldnn_matmul(*a, *b, *out, beta, 1.0f);
    return true;
  } catch (...) {
    return false;
  }
}

// Whether products of fp32 on CUDA devices may round their factors to TF32, from now on and in the whole process.
extern "C" void murmur_allow_tf32(bool allowed) noexcept {
  try {
    at::globalContext().setAllowTF32CuBLAS(allowed);
  } catch (...) {
    // Then products stay exact.
  }
}

// Loads libtorch's part for CUDA, found as the other parts are. Null, or why not.
extern "C" const char* murmur_load_cuda() noexcept {
  return dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) != nullptr ? nullptr : dlerror();
}
