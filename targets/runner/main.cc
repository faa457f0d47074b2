// kbitc-run: runs a bundle on arrays from a file, with TVM's runtime only.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>
#include <sstream>

#include "bundle.h"
#include "engine.h"
#include "npz.h"

namespace kbitc {
namespace {

constexpr const char kUsageText[] =
    "usage: kbitc-run BUNDLE --input FEEDS [--output OUTS.npz] [--threads N] [--repeat N] [--warmup N]\n"
    "                 [--device cpu|cuda] [--variant NAME] [--no-verify] [--json]\n"
    "  BUNDLE      folder NAME.kbit\n"
    "  --input     .npz with one array for each input, or .npy for a model with one input\n"
    "  --output    write the outputs to this .npz\n"
    "  --threads   threads of one run (default: one for each core)\n"
    "  --repeat    run N times and print the least and the median time\n"
    "  --warmup    runs before those that are timed (default: 1 with --repeat)\n"
    "  --device    refuse the bundle unless it is for this device\n"
    "  --variant   the only variant that will do, such as avx2 (default: KBITC_VARIANT, else the best that runs here)\n"
    "  --no-verify skip the SHA-256 of the files (sizes and the manifest are always checked)\n"
    "  --json      print one JSON object on standard output\n"
    "exit codes: 0 done, 1 internal, 2 usage, 5 inputs do not fit, 7 input/output, 8 bundle refused\n";

struct Options {
  std::string bundle, input, output, device, variant;
  int threads = 0, repeat = 0, warmup = -1;
  bool verify = true, json = false;
};

int ParseCount(const std::string& name, const std::string& text, int least) {
  size_t used = 0;
  int value = 0;
  try {
    value = std::stoi(text, &used);
  } catch (const std::exception&) {
    used = 0;
  }
  if (used == 0 || used != text.size() || value < least || value > 1000000) {
    throw Failure(kUsage, name + " takes a number of at least " + std::to_string(least) + " (got '" + text + "')");
  }
  return value;
}

Options ParseOptions(int count, char** words) {
  Options options;
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    auto value = [&]() -> std::string {
      if (i + 1 >= count) throw Failure(kUsage, word + " needs a value; see kbitc-run --help");
      return words[++i];
    };
    if (word == "--input") options.input = value();
    else if (word == "--output") options.output = value();
    else if (word == "--device") options.device = value();
    else if (word == "--variant") options.variant = value();
    else if (word == "--threads") options.threads = ParseCount(word, value(), 1);
    else if (word == "--repeat") options.repeat = ParseCount(word, value(), 1);
    else if (word == "--warmup") options.warmup = ParseCount(word, value(), 0);
    else if (word == "--no-verify") options.verify = false;
    else if (word == "--json") options.json = true;
    else if (word.size() > 1 && word[0] == '-') throw Failure(kUsage, "unknown option " + word + "; see kbitc-run --help");
    else if (options.bundle.empty()) options.bundle = word;
    else throw Failure(kUsage, "one bundle at a time (got '" + word + "' too)");
  }
  if (options.bundle.empty()) throw Failure(kUsage, "no bundle was given; see kbitc-run --help");
  if (options.input.empty()) throw Failure(kUsage, "--input is missing; see kbitc-run --help");
  if (!options.device.empty() && options.device != "cpu" && options.device != "cuda") {
    throw Failure(kUsage, "unknown device (got '" + options.device + "'); cpu or cuda");
  }
  const char* chosen = std::getenv("KBITC_VARIANT");
  if (options.variant.empty() && chosen != nullptr) options.variant = chosen;
  return options;
}

std::string Names(const std::vector<ValueInfo>& inputs) {
  std::string text;
  for (const ValueInfo& info : inputs) text += (text.empty() ? "" : ", ") + info.name;
  return text;
}

void CheckShape(const ValueInfo& info, const Array& array, std::map<std::string, int64_t>* sizes) {
  std::string got = " [at " + info.name + "] (got " + array.type->name + ShapeText(array.shape) + "); give " + info.Text();
  if (array.type != info.type) throw Failure(kInputs, "an input has the wrong dtype" + got);
  if (array.shape.size() != info.shape.size()) throw Failure(kInputs, "an input has the wrong number of dims" + got);
  for (size_t i = 0; i < info.shape.size(); ++i) {
    const Dim& dim = info.shape[i];
    int64_t expected = dim.size < 0 ? sizes->emplace(dim.symbol, array.shape[i]).first->second : dim.size;
    if (expected == array.shape[i]) continue;
    std::string why = dim.size < 0 ? ", with " + dim.symbol + " = " + std::to_string(expected) + " as elsewhere" : "";
    throw Failure(kInputs, "an input has the wrong shape" + got + why);
  }
}

// The feeds in the order of the inputs.
std::vector<Array> MatchFeeds(const std::vector<ValueInfo>& inputs, NamedArrays feeds) {
  if (feeds.size() == 1 && feeds[0].first.empty() && inputs.size() == 1) feeds[0].first = inputs[0].name;
  std::map<std::string, Array> by_name;
  for (auto& [name, array] : feeds) {
    bool known = std::any_of(inputs.begin(), inputs.end(), [&, &key = name](const ValueInfo& i) { return i.name == key; });
    if (!known) throw Failure(kInputs, "the model has no such input (got '" + name + "'); known: " + Names(inputs));
    by_name[name] = array;
  }
  std::map<std::string, int64_t> sizes;
  std::vector<Array> ordered;
  for (const ValueInfo& info : inputs) {
    auto found = by_name.find(info.name);
    if (found == by_name.end()) throw Failure(kInputs, "an input is missing [at " + info.name + "]; give " + info.Text());
    CheckShape(info, found->second, &sizes);
    ordered.push_back(found->second);
  }
  return ordered;
}

double Milliseconds(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

std::string Quoted(const std::string& text) {
  std::string made = "\"";
  for (char c : text) {
    char code[8];
    if (c == '"' || c == '\\') made += '\\', made += c;
    else if (static_cast<unsigned char>(c) < 32) std::snprintf(code, sizeof code, "\\u%04x", c), made += code;
    else made += c;
  }
  return made + "\"";
}

struct Times {
  double load = 0, least = 0, median = 0;
};

void Print(const Options& options, const Bundle& bundle, const NamedArrays& outputs, const Times& times) {
  std::ostringstream text;
  text.precision(6);
  if (options.json) {
    text << "{\"bundle\": " << Quoted(options.bundle) << ", \"target\": " << Quoted(bundle.target()) << ", \"outputs\": [";
    for (size_t i = 0; i < outputs.size(); ++i) {
      const auto& [name, array] = outputs[i];
      text << (i ? ", " : "") << "{\"name\": " << Quoted(name) << ", \"dtype\": \"" << array.type->name
           << "\", \"shape\": " << ShapeText(array.shape) << "}";
    }
    text << "], \"output_file\": " << (options.output.empty() ? "null" : Quoted(options.output));
    text << ", \"load_ms\": " << times.load << ", \"repeat\": " << std::max(1, options.repeat)
         << ", \"min_ms\": " << times.least << ", \"median_ms\": " << times.median << "}\n";
  } else {
    for (const auto& [name, array] : outputs) text << name << " " << array.type->name << ShapeText(array.shape) << "\n";
    text << "ran " << bundle.target() << ": load " << times.load << " ms";
    if (options.repeat > 0) text << ", " << options.repeat << " runs: min " << times.least << " ms, median " << times.median << " ms";
    text << "\n";
  }
  std::cout << text.str() << std::flush;
}

void Run(const Options& options) {
  auto start = std::chrono::steady_clock::now();
  Bundle bundle(options.bundle, options.verify, options.variant);
  if (!options.device.empty() && options.device != bundle.device()) {
    throw Failure(kUsage, "the bundle is for " + bundle.target() + " (got --device " + options.device + ")");
  }
  Engine engine(bundle, options.threads > 0 ? options.threads : Machine::PhysicalCores());
  std::vector<ffi::Tensor> tensors;
  std::vector<Array> feeds = MatchFeeds(bundle.inputs(), NpzReader::Read(options.input));
  for (const Array& feed : feeds) tensors.push_back(engine.Put(feed));
  for (const Array& weight : bundle.Weights()) tensors.push_back(engine.Put(weight));
  Times times;
  times.load = Milliseconds(start);
  std::vector<ffi::AnyView> arguments(tensors.begin(), tensors.end());
  int warmup = options.warmup >= 0 ? options.warmup : options.repeat > 0 ? 1 : 0;
  for (int i = 0; i < warmup; ++i) engine.Run(arguments);
  std::vector<double> runs;
  std::vector<ffi::Tensor> results;
  for (int i = 0; i < std::max(1, options.repeat); ++i) {
    results.clear();  // give the buffers back to the pool before the clock starts
    auto begin = std::chrono::steady_clock::now();
    results = engine.Run(arguments);
    runs.push_back(Milliseconds(begin));
  }
  std::sort(runs.begin(), runs.end());
  times.least = runs.front();
  times.median = (runs[(runs.size() - 1) / 2] + runs[runs.size() / 2]) / 2;
  if (results.size() != bundle.outputs().size()) throw Failure(kInternal, "the module gives another number of outputs");
  NamedArrays outputs;
  for (size_t i = 0; i < results.size(); ++i) outputs.emplace_back(bundle.outputs()[i].name, engine.Take(results[i]));
  if (!options.output.empty()) NpzWriter::Write(options.output, outputs);
  Print(options, bundle, outputs, times);
}

// One line of valid UTF-8: names in damaged files can hold any bytes.
std::string Printable(const std::string& text) {
  std::string made;
  for (size_t i = 0; i < text.size();) {
    unsigned char lead = text[i];
    size_t length = lead < 0x80 ? 1 : lead >= 0xf0 && lead < 0xf5 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc2 ? 2 : 0;
    bool good = length > 0 && lead < 0xf5 && i + length <= text.size() && lead >= 32 && lead != 127;
    for (size_t k = 1; good && k < length; ++k) good = (text[i + k] & 0xc0) == 0x80;
    made += good ? text.substr(i, length) : "?";
    i += good ? length : 1;
  }
  return made;
}

int Fail(ExitCode code, const std::string& message) {
  std::cerr << "kbitc-run: error: " << Printable(message.substr(0, message.find('\n'))) << std::endl;
  return code;
}

}  // namespace
}  // namespace kbitc

// Leaves without destructors: the worker threads of TVM's pool spin for a while before they notice the end.
[[noreturn]] static void Leave(int code) {
  std::cout << std::flush;
  std::_Exit(std::cout ? code : kbitc::kResource);
}

int main(int count, char** words) {
  for (int i = 1; i < count; ++i) {
    std::string word = words[i];
    if (word == "--help" || word == "-h") return std::cout << kbitc::kUsageText, 0;
    if (word == "--version") return std::cout << "kbitc-run for apache-tvm " << KBITC_TVM_VERSION << "\n", 0;
  }
  try {
    kbitc::Run(kbitc::ParseOptions(count, words));
    Leave(0);
  } catch (const kbitc::Failure& failure) {
    Leave(kbitc::Fail(failure.code, failure.what()));
  } catch (const tvm::ffi::Error& error) {
    Leave(kbitc::Fail(kbitc::kInternal, "the compiled module failed: " + std::string(error.message())));
  } catch (const std::bad_alloc&) {
    Leave(kbitc::Fail(kbitc::kResource, "out of memory"));
  } catch (const std::exception& error) {
    Leave(kbitc::Fail(kbitc::kInternal, error.what()));
  }
}
