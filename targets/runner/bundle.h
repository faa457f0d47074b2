// Opens a bundle: reads the manifest and refuses, before anything is mapped or loaded, what is not exactly as written.
#ifndef KBITC_RUNNER_BUNDLE_H_
#define KBITC_RUNNER_BUNDLE_H_

#include <sys/mman.h>

#include <map>
#include <set>

#include "file.h"
#include "machine.h"
#include "table.h"

namespace kbitc {

constexpr int64_t kSchemaVersion = 2;

struct Dim {
  int64_t size = -1;   // -1: symbolic
  std::string symbol;
};

struct ValueInfo {
  std::string name;
  const DataType* type;
  std::vector<Dim> shape;

  std::string Text() const {
    std::string text = std::string(type->name) + "[";
    for (size_t i = 0; i < shape.size(); ++i) {
      text += (i ? ", " : "") + (shape[i].size < 0 ? shape[i].symbol : std::to_string(shape[i].size));
    }
    return text + "]";
  }
};

struct Parameter {
  std::string tensor;
  const DataType* type;
  std::vector<int64_t> shape;
};

// The model compiled for one kind of processor.
struct Variant {
  std::string target, library;
  std::vector<std::string> features;
  std::vector<size_t> arguments;  // places in the manifest's parameters

  // What a person calls it: the target behind the colon.
  std::string Name() const {
    size_t colon = target.find(':');
    return colon == std::string::npos ? target : target.substr(colon + 1);
  }
};

struct FileEntry {
  std::string sha256;
  uint64_t size;
};

class Bundle {
 public:
  // wanted: the only variant that will do; empty: the best that this machine runs.
  Bundle(const std::string& folder, bool verify, const std::string& wanted) : folder_(folder) {
    std::error_code ignored;
    if (!fs::is_directory(folder_, ignored)) {
      throw Failure(kBundle, "the bundle " + std::string(fs::exists(folder_, ignored) ? "is not a folder" : "does not exist") +
                                 " [at " + folder + "]; give the folder NAME.kbit");
    }
    ReadManifest();
    CheckList();
    for (const auto& [name, entry] : files_) CheckFile(folder_ / name, entry, verify);
    ChooseVariant(wanted);
    CheckRuntime();
    MapWeights();
  }
  ~Bundle() {
    if (mapped_ != nullptr) munmap(mapped_, mapped_size_);
  }
  Bundle(const Bundle&) = delete;
  Bundle& operator=(const Bundle&) = delete;

  std::string Library() const { return fs::absolute(folder_ / variant_.library).string(); }
  const std::string& device() const { return device_; }
  const std::string& target() const { return variant_.target; }
  const std::string& arch() const { return arch_; }
  const std::vector<ValueInfo>& inputs() const { return inputs_; }
  const std::vector<ValueInfo>& outputs() const { return outputs_; }

  // The weights in the order of `main`; they lie in the mapped file.
  std::vector<Array> Weights() const {
    std::vector<Array> weights;
    for (size_t place : variant_.arguments) {
      const Parameter& parameter = parameters_[place];
      Array array{parameter.type, parameter.shape, nullptr};
      array.data = std::shared_ptr<uint8_t>(places_.at(parameter.tensor), [](uint8_t*) {});
      weights.push_back(array);
    }
    return weights;
  }

 private:
  [[noreturn]] void Refuse(const std::string& what, const fs::path& where) const {
    throw Failure(kBundle, what + " [at " + where.string() + "]; copy the bundle again or compile the model again");
  }

  // The JSON parser recurses, so nesting is bounded before it sees the text.
  static bool TooDeep(const std::string& text) {
    int depth = 0;
    bool quoted = false;
    for (size_t i = 0; i < text.size(); ++i) {
      if (quoted && text[i] == '\\') ++i;
      else if (text[i] == '"') quoted = !quoted;
      else if (!quoted && (text[i] == '{' || text[i] == '[') && ++depth > 64) return true;
      else if (!quoted && (text[i] == '}' || text[i] == ']')) --depth;
    }
    return false;
  }

  tvm::ffi::Any ParseJson(const std::string& text, const fs::path& where) const {
    tvm::ffi::String problem;
    if (TooDeep(text)) Refuse("a JSON file is nested too deep", where);
    tvm::ffi::Any value = json::Parse(text, &problem);
    if (!problem.empty()) Refuse("a JSON file is damaged: " + std::string(problem.data(), problem.size()).substr(0, 120), where);
    return value;
  }

  void ReadManifest() {
    fs::path path = folder_ / "manifest.json";
    struct stat status;
    if (lstat(path.c_str(), &status) != 0) {
      throw Failure(kBundle, "not a bundle: manifest.json is missing [at " + folder_.string() + "]; give the folder NAME.kbit");
    }
    OpenFile file(path);
    if (file.size() > (64u << 20)) Refuse("manifest.json is too large", path);
    std::string text = file.ReadAll();
    Table top(ParseJson(text, path), path.string());
    int64_t version = top.Number("schema_version");
    if (version != kSchemaVersion) {
      throw Failure(kBundle, "this kbitc-run reads bundles of schema version " + std::to_string(kSchemaVersion) + " [at " +
                                 path.string() + "] (got version " + std::to_string(version) + "); compile the model again");
    }
    CheckSelfHash(text, path);
    tvm_version_ = top.Text("tvm_version");
    Table target = top.Sub("target");
    machine_ = target.Text("machine");
    device_ = target.Text("device");
    arch_ = target.Text("arch");
    if (device_ != "cpu" && device_ != "cuda") target.Wrong("unknown device");
    for (const tvm::ffi::Any& value : top.Items("inputs")) inputs_.push_back(ReadValue(Table(value, path.string())));
    for (const tvm::ffi::Any& value : top.Items("outputs")) outputs_.push_back(ReadValue(Table(value, path.string())));
    for (const tvm::ffi::Any& value : top.Items("parameters")) {
      Table table(value, path.string());
      parameters_.push_back({table.Text("tensor"), table.Type(), ReadDims(table)});
    }
    ReadFiles(top.Sub("files"));
    for (const tvm::ffi::Any& value : top.Items("variants")) variants_.push_back(ReadVariant(Table(value, path.string())));
    if (variants_.empty()) top.Wrong("variants is empty");
  }

  Variant ReadVariant(const Table& table) const {
    Variant variant{table.Text("target"), table.Text("library"), {}, {}};
    if (files_.count(variant.library) == 0) table.Wrong("a needed file is not listed (got " + variant.library + ")");
    for (const tvm::ffi::Any& feature : table.Items("cpu_features")) {
      auto text = feature.as<tvm::ffi::String>();
      if (!text.has_value()) table.Wrong("cpu_features is not a list of texts");
      variant.features.emplace_back(text->data(), text->size());
    }
    for (const tvm::ffi::Any& value : table.Items("arguments")) {
      uint64_t place = table.Integer(value, "an argument");
      if (place >= parameters_.size()) table.Wrong("not a place in parameters (got " + std::to_string(place) + ")");
      variant.arguments.push_back(place);
    }
    return variant;
  }

  void CheckSelfHash(std::string text, const fs::path& path) const {
    const std::string key = "\"manifest_sha256\": \"";
    size_t at = text.rfind(key);
    if (at == std::string::npos || at + key.size() + 64 > text.size()) Refuse("manifest.json is damaged", path);
    std::string given = text.substr(at + key.size(), 64);
    text.replace(at + key.size(), 64, std::string(64, '0'));
    Sha256 hash;
    hash.Update(text.data(), text.size());
    if (hash.Hex() != given) Refuse("manifest.json was changed or is damaged: its own SHA-256 differs", path);
  }

  static ValueInfo ReadValue(const Table& table) {
    ValueInfo info{table.Text("name"), table.Type(), {}};
    for (const tvm::ffi::Any& value : table.Items("shape")) {
      auto symbol = value.as<tvm::ffi::String>();
      Dim dim;
      if (symbol.has_value()) {
        dim.symbol = std::string(symbol->data(), symbol->size());
      } else {
        dim.size = table.Integer(value, "a dimension");
      }
      info.shape.push_back(dim);
    }
    return info;
  }

  static std::vector<int64_t> ReadDims(const Table& table) {
    std::vector<int64_t> dims;
    for (const tvm::ffi::Any& value : table.Items("shape")) dims.push_back(table.Integer(value, "a dimension"));
    return dims;
  }

  // As kbitc.bundle.manifest: no "..", no hidden file, no absolute path.
  static bool IsBundlePath(const std::string& path) {
    bool start = true;
    for (char c : path) {
      bool word = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
      bool inner = c == '.' || c == '+' || c == '-';
      if (!word && (start || (!inner && c != '/'))) return false;
      start = c == '/';
    }
    return !start && path != "manifest.json";
  }

  void ReadFiles(const Table& table) {
    for (const auto& [key, value] : table.items()) {
      auto text = key.as<tvm::ffi::String>();
      std::string name(text->data(), text->size());
      if (!IsBundlePath(name)) table.Wrong("not a path inside the bundle (got " + name.substr(0, 80) + ")");
      Table entry(value, folder_.string());
      files_[name] = {entry.Text("sha256"), static_cast<uint64_t>(entry.Number("size"))};
    }
    if (files_.count("weights.safetensors") == 0) table.Wrong("a needed file is not listed (got weights.safetensors)");
  }

  // The files on disk and the files in the manifest must be the same.
  void CheckList() const {
    std::set<std::string> folders;
    for (const auto& [name, entry] : files_) {
      for (fs::path parent = fs::path(name).parent_path(); !parent.empty(); parent = parent.parent_path()) {
        folders.insert(parent.string());
      }
    }
    std::error_code problem;
    for (auto it = fs::recursive_directory_iterator(folder_, problem); it != fs::recursive_directory_iterator();
         it.increment(problem)) {
      std::string name = it->path().lexically_relative(folder_).string();
      if (it->is_symlink()) Refuse("a file of the bundle is a link", it->path());
      bool known = it->is_directory() ? folders.count(name) > 0 : name == "manifest.json" || files_.count(name) > 0;
      if (!known) {
        throw Failure(kBundle, "the bundle holds a file that its manifest does not list [at " + it->path().string() + "]; remove it");
      }
    }
    if (problem) Refuse("the folder of the bundle cannot be read", folder_);
  }

  void CheckFile(const fs::path& path, const FileEntry& entry, bool verify) const {
    OpenFile file(path);
    if (file.size() != entry.size) {
      Refuse("a file of the bundle has the wrong size (got " + std::to_string(file.size()) + " bytes instead of " +
                 std::to_string(entry.size) + ")",
             path);
    }
    if (verify && file.Hash() != entry.sha256) {
      Refuse("a file of the bundle was changed or is damaged: its SHA-256 differs", path);
    }
  }

  // Why this machine cannot run a variant; empty when it can.
  std::string Lacks(const Variant& variant) const {
    if (machine_ != Machine::Architecture()) {
      return variant.target + " is for " + machine_ + ", this machine is " + Machine::Architecture();
    }
    for (const std::string& feature : variant.features) {
      if (Machine::Has(feature)) continue;
      return variant.target + " needs the processor feature " + feature + ", which this " + Machine::Architecture() +
             " processor lacks or the operating system does not permit";
    }
    return "";
  }

  // The first variant that this machine runs: the manifest lists the most demanding first.
  void ChooseVariant(const std::string& wanted) {
    std::string where = " [at " + folder_.string() + "] (got ", reason, there;
    for (const Variant& variant : variants_) {
      there += (there.empty() ? "" : ", ") + variant.Name();
      if (!wanted.empty() && wanted != variant.Name() && wanted != variant.target) continue;
      reason = Lacks(variant);
      if (!reason.empty()) continue;
      variant_ = variant;
      return;
    }
    if (reason.empty()) throw Failure(kBundle, "the bundle has no such variant" + where + wanted + "); it has " + there);
    std::string what = wanted.empty() ? "this bundle is for another machine" : "this machine cannot run the variant";
    throw Failure(kBundle, what + where + reason + ")");
  }

  void CheckRuntime() const {
    std::string where = " [at " + folder_.string() + "] (got ";
    if (tvm_version_ != KBITC_TVM_VERSION) {
      throw Failure(kBundle, "this bundle needs the runtime of apache-tvm " + tvm_version_ + where + "apache-tvm " +
                                 KBITC_TVM_VERSION + "); compile the model again, or use the kbitc-run beside it");
    }
  }

  uint64_t PaddedBytes(const Parameter& parameter, const fs::path& path) const {
    try {
      return (Array{parameter.type, parameter.shape, nullptr}.Bytes() + kAlignment - 1) / kAlignment * kAlignment;
    } catch (const Failure& failure) {
      Refuse(failure.what() + (": " + parameter.tensor), path);
    }
  }

  void MapWeights() {
    fs::path path = folder_ / "weights.safetensors";
    OpenFile file(path);
    mapped_size_ = file.size();
    if (mapped_size_ < 8) Refuse("the weights file is too short", path);
    void* place = mmap(nullptr, mapped_size_, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.descriptor(), 0);
    if (place == MAP_FAILED) throw Failure(kResource, "the weights cannot be mapped [at " + path.string() + "]");
    mapped_ = static_cast<uint8_t*>(place);
    uint64_t length = 0;
    for (int i = 8; i-- > 0;) length = length << 8 | mapped_[i];
    if (length > 100000000 || length + 8 > mapped_size_ || (length + 8) % kAlignment != 0) {
      Refuse("the weights file has a broken header", path);
    }
    std::string header(reinterpret_cast<const char*>(mapped_) + 8, length);
    Table table(ParseJson(header, path), path.string());
    uint64_t start = 8 + length;
    for (const Parameter& parameter : parameters_) {
      Table entry = table.Sub(parameter.tensor.c_str());
      json::Array offsets = entry.Items("data_offsets");
      if (offsets.size() != 2) entry.Wrong("data_offsets is not a pair");
      uint64_t begin = entry.Integer(offsets[0], "an offset"), end = entry.Integer(offsets[1], "an offset");
      uint64_t padded = PaddedBytes(parameter, path);
      if (begin > end || end > mapped_size_ - start || begin % kAlignment != 0 || end - begin != padded) {
        Refuse("a stored tensor is not what the manifest says: " + parameter.tensor, path);
      }
      places_[parameter.tensor] = mapped_ + start + begin;
    }
  }

  fs::path folder_;
  std::string tvm_version_, machine_, device_, arch_;
  std::vector<Variant> variants_;
  Variant variant_;
  std::vector<ValueInfo> inputs_, outputs_;
  std::vector<Parameter> parameters_;
  std::map<std::string, FileEntry> files_;
  std::map<std::string, uint8_t*> places_;
  uint8_t* mapped_ = nullptr;
  size_t mapped_size_ = 0;
};

}  // namespace kbitc
#endif  // KBITC_RUNNER_BUNDLE_H_
