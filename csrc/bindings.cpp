// fastgan._C: importing it registers torch.ops.fastgan.*; the module itself tells how it was built.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "instance_norm.h"

#ifdef FASTGAN_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef FASTGAN_WITH_CUDA
  info["cuda"] =
      std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["cuda_architectures"] = FASTGAN_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++/CUDA kernels of fastgan, as torch.ops.fastgan.*";
  m.def("build_info", &build_info,
        "Versions of torch and CUDA, GPU architectures and compiler of this build.");
  const py::call_guard<py::gil_scoped_release> without_gil;
  m.def("instance_stats_fwd", &fastgan::instance_stats_fwd, without_gil);
  m.def("instance_stats_bwd", &fastgan::instance_stats_bwd, without_gil);
  m.def("instance_norm_fwd", &fastgan::instance_norm_fwd, without_gil);
  m.def("instance_norm_bwd", &fastgan::instance_norm_bwd, without_gil);
  m.def("reflection_pad2d_fwd", &fastgan::reflection_pad2d_fwd, without_gil);
  m.def("reflection_pad2d_bwd", &fastgan::reflection_pad2d_bwd, without_gil);
}
