// One relax virtual machine of TVM on one device.
#ifndef KBITC_RUNNER_ENGINE_H_
#define KBITC_RUNNER_ENGINE_H_

#include <dlfcn.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/dtype.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include "bundle.h"

namespace kbitc {

namespace ffi = tvm::ffi;

class Engine {
 public:
  Engine(const Bundle& bundle, int threads)
      : place_(bundle.device() == "cuda" ? DLDevice{kDLCUDA, 0} : kHost), machine_(Load(bundle)) {
    SetThreads(threads);
    constexpr int kPooled = 2;  // AllocatorType::kPooled
    if (OnDevice()) {
      Call(machine_, "vm_initialization", static_cast<int>(kDLCUDA), 0, kPooled, static_cast<int>(kDLCPU), 0, kPooled);
    } else {
      Call(machine_, "vm_initialization", static_cast<int>(kDLCPU), 0, kPooled);
    }
    main_ = Get(machine_, "main");
  }

  bool OnDevice() const { return place_.device_type != kDLCPU; }

  // A device tensor: the array's own memory on the CPU, a copy elsewhere.
  ffi::Tensor Put(const Array& array) const {
    ffi::Tensor host = ffi::Tensor::FromNDAlloc(Borrow{array.data}, ffi::ShapeView(array.shape.data(), array.shape.size()),
                                                ffi::StringToDLDataType(array.type->name), kHost);
    return OnDevice() ? Copy(host, place_) : host;
  }

  // The values of a device tensor in memory that stays.
  Array Take(const ffi::Tensor& tensor) const {
    ffi::Tensor host = OnDevice() ? Copy(tensor, kHost) : tensor;
    Array array;
    array.type = FindDataType(ffi::DLDataTypeToString(host.dtype()));
    if (array.type == nullptr) throw Failure(kInternal, "an output has a dtype that .npz files lack");
    array.shape.assign(host.shape().begin(), host.shape().end());
    array.Allocate();
    std::memcpy(array.data.get(), static_cast<const char*>(host.data_ptr()) + host.byte_offset(), array.Bytes());
    return array;
  }

  // Run once and wait for the end.
  std::vector<ffi::Tensor> Run(const std::vector<ffi::AnyView>& arguments) const {
    ffi::Any result;
    main_.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
    if (OnDevice()) ffi::Function::GetGlobalRequired("runtime.Device_StreamSync")(place_, 0);
    if (auto one = result.as<ffi::Tensor>()) return {*one};
    std::vector<ffi::Tensor> outputs;
    for (const ffi::Any& item : result.cast<ffi::Array<ffi::Any>>()) outputs.push_back(item.cast<ffi::Tensor>());
    return outputs;
  }

 private:
  static constexpr DLDevice kHost{kDLCPU, 0};

  // Lends memory that someone else frees; the shared pointer keeps it alive.
  struct Borrow {
    std::shared_ptr<uint8_t> data;
    void AllocData(DLTensor* tensor) { tensor->data = data.get(); }
    void FreeData(DLTensor*) {}
  };

  // Load TVM's CUDA runtime and refuse a GPU that does not run the bundle's machine code.
  static void NeedGpu(const Bundle& bundle) {
    std::string wants = "this bundle is for another machine (got " + bundle.target() + " needs an NVIDIA GPU of " + bundle.arch();
    if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      throw Failure(kBundle, wants + ", but the NVIDIA driver (libcuda.so.1) is not installed)");
    }
    // Found by the run path of this program, as the other libraries are.
    if (dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      throw Failure(kResource, std::string("the CUDA runtime of TVM cannot be loaded (got ") + dlerror() + ")");
    }
    constexpr int kExist = 0, kComputeVersion = 4;  // tvm::runtime::DeviceAttrKind
    ffi::Function ask = ffi::Function::GetGlobalRequired("runtime.GetDeviceAttr");
    if (ask(static_cast<int>(kDLCUDA), 0, kExist).cast<int>() == 0) throw Failure(kBundle, wants + ", but there is none)");
    ffi::String version = ask(static_cast<int>(kDLCUDA), 0, kComputeVersion).cast<ffi::String>();
    std::string here;
    for (char c : std::string(version.data(), version.size())) here += c == '.' ? "" : std::string(1, c);
    std::string needed = bundle.arch().substr(std::min<size_t>(3, bundle.arch().size()));  // behind "sm_"
    bool same_major = here.size() == needed.size() && here.compare(0, here.size() - 1, needed, 0, needed.size() - 1) == 0;
    if (needed.empty() || !same_major || here < needed) throw Failure(kBundle, wants + ", this machine has sm_" + here + ")");
  }

  static ffi::Module Load(const Bundle& bundle) {
    std::string library = bundle.Library();
    if (bundle.device() == "cuda") NeedGpu(bundle);
    try {
      return Call(ffi::Module::LoadFromFile(library), "vm_load_executable").cast<ffi::Module>();
    } catch (const ffi::Error& error) {
      throw Failure(kBundle, "the library cannot be loaded [at " + library + "] (got " + std::string(error.message()) + ")");
    }
  }

  static ffi::Function Get(const ffi::Module& module, const char* name) {
    auto function = module->GetFunction(name);
    if (!function.has_value()) throw Failure(kBundle, std::string("the library lacks a function: ") + name);
    return *function;
  }

  template <typename... Args>
  static ffi::Any Call(const ffi::Module& module, const char* name, Args... arguments) {
    return Get(module, name)(arguments...);
  }

  static ffi::Tensor Copy(const ffi::Tensor& source, DLDevice place) {
    ffi::Shape shape(source.shape().begin(), source.shape().end());
    ffi::Tensor made = ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope")(
                           shape, source.dtype(), place, nullptr)
                           .cast<ffi::Tensor>();
    ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromTo")(source, made);
    return made;
  }

  // Share all processors instead of pinning each thread to one, which is TVM's habit.
  static void SetThreads(int threads) {
    constexpr int kShareAllCores = -3;  // ThreadGroup::AffinityMode::kSpecifyThreadShareAllCore
    ffi::Array<ffi::String> names;
    for (int processor : Machine::Processors()) names.push_back(std::to_string(processor));
    int count = std::min(threads, static_cast<int>(names.size()));
    ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kShareAllCores, count, names);
  }

  DLDevice place_;
  ffi::Module machine_;
  ffi::Function main_;
};

}  // namespace kbitc
#endif  // KBITC_RUNNER_ENGINE_H_
