// What tch does not bind: oneDNN's matrix product, as libtorch carries it, the fused AdamW, the switch for TF32, and libtorch's part for CUDA.
#include <ATen/Context.h>
#include <ATen/ops/_fused_adamw.h>
#include <dlfcn.h>

// libtorch multiplies bf16 by oneDNN but fp32 by MKL, which on processors other than Intel's leaves the widest vectors unused; the
// function below, which libtorch's own operators call for bf16, takes fp32 too and writes into a given tensor. It is no operator.
// Weak, so that a libtorch without it still links, and the caller multiplies by libtorch's operators.
namespace at::native {
__attribute__((weak)) void mkldnn_matmul(const Tensor& a, const Tensor& b, const Tensor& out, float beta, float alpha);
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

// One step of AdamW in one pass over memory. `step`, `[]` fp32 on the same device, holds the steps with this one; the gradient is
// divided by `divisor`, of the same sort, in place. False, with everything as it was, where there is no such kernel.
extern "C" bool murmur_fused_adamw(const at::Tensor* theta, const at::Tensor* gradient, const at::Tensor* mean, const at::Tensor* square,
                                   const at::Tensor* step, const at::Tensor* divisor, double lr, double beta1, double beta2, double decay,
                                   double eps) noexcept {
  try {
    at::_fused_adamw_({*theta}, {*gradient}, {*mean}, {*square}, {}, {*step}, lr, beta1, beta2, decay, eps, false, false, *divisor, {});
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

// Loads libtorch's part for CUDA, found as the other parts are. Null, or why not. Its own symbols stay its own: another NCCL in this
// process must not be taken for the one that comes with it.
extern "C" const char* murmur_load_cuda() noexcept {
  return dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_LOCAL) != nullptr ? nullptr : dlerror();
}
