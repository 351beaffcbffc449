// oneDNN's matrix product, as libtorch carries it.
//
// libtorch multiplies bf16 by oneDNN but fp32 by MKL, which on processors other than Intel's leaves the widest vectors unused; the
// function below, which libtorch's own operators call for bf16, takes fp32 too and writes into a given tensor. It is no operator, so
// tch has no binding. Declared here without libtorch's headers: references are all it takes. Weak, so that a
// libtorch without it still links, and the caller multiplies by libtorch's operators.
namespace at {
class Tensor;
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
