// The processor this runs on: architecture, features with the names of /proc/cpuinfo, and how many cores may be used.
#ifndef KBITC_RUNNER_MACHINE_H_
#define KBITC_RUNNER_MACHINE_H_

#include <sched.h>

#include <fstream>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#if defined(__aarch64__)
#include <sys/auxv.h>
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kbitc {

struct Machine {
  static const char* Architecture() {
#if defined(__aarch64__)
    return "aarch64";
#elif defined(__x86_64__)
    return "x86_64";
#else
#error "kbitc-run is for x86-64 and 64-bit ARM"
#endif
  }

#if defined(__aarch64__)
  // Bits of AT_HWCAP and AT_HWCAP2 (Linux, Documentation/arch/arm64/elf_hwcaps.rst); emulators set them too.
  static bool Has(const std::string& feature) {
    static const struct {
      const char* name;
      int vector, bit;
    } bits[] = {{"fp", 1, 0},       {"asimd", 1, 1},   {"aes", 1, 3},     {"pmull", 1, 4},    {"sha1", 1, 5},
                {"sha2", 1, 6},     {"crc32", 1, 7},   {"atomics", 1, 8}, {"fphp", 1, 9},     {"asimdhp", 1, 10},
                {"asimdrdm", 1, 12}, {"lrcpc", 1, 15}, {"asimddp", 1, 20}, {"sve", 1, 22},    {"sve2", 2, 1},
                {"i8mm", 2, 13},    {"bf16", 2, 14}};
    for (const auto& entry : bits) {
      if (feature == entry.name) return getauxval(entry.vector == 1 ? AT_HWCAP : AT_HWCAP2) >> entry.bit & 1;
    }
    return false;
  }
#else
  static bool Has(const std::string& feature) {
    static const std::set<std::string> known = [] {
      std::set<std::string> found;
      std::ifstream file("/proc/cpuinfo");
      for (std::string line; found.empty() && std::getline(file, line);) {
        if (line.compare(0, 5, "flags") != 0) continue;
        std::istringstream words(line.substr(line.find(':') + 1));
        for (std::string word; words >> word;) found.insert(word);
      }
      return found;
    }();
    return known.count(feature) > 0 && IsSaved(feature) && (feature.rfind("amx", 0) != 0 || MayUseTiles());
  }

  // Whether the operating system saves the registers of a feature: bits of XCR0 (Intel SDM, volume 1, 13.3).
  static bool IsSaved(const std::string& feature) {
    auto starts = [&](const char* head) { return feature.rfind(head, 0) == 0; };
    constexpr uint64_t kVectors = 0x6, kWide = 0xe6, kTiles = 0x60000;
    uint64_t needed = starts("amx") ? kTiles : starts("avx512") ? kWide : 0;
    if (needed == 0 && (starts("avx") || starts("va") || starts("vp") || feature == "fma" || feature == "f16c")) {
      needed = kVectors;
    }
    return (SavedRegisters() & needed) == needed;
  }

  // Whether this process may use AMX tiles; asks for it once (Linux, Documentation/arch/x86/xstate.rst).
  static bool MayUseTiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
  }

  // XCR0; 0 where the operating system has not enabled it.
  static uint64_t SavedRegisters() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kOsxsave = 1u << 27;
    if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsxsave) == 0) return 0;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return static_cast<uint64_t>(d) << 32 | a;
  }
#endif

  // Processors that this process may use.
  static std::vector<int> Processors() {
    std::vector<int> processors;
    cpu_set_t set;
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) {
      for (int i = 0; i < CPU_SETSIZE; ++i) {
        if (CPU_ISSET(i, &set)) processors.push_back(i);
      }
    }
    if (processors.empty()) processors.push_back(0);
    return processors;
  }

  // Cores among them; the hardware threads of one core count once.
  static int PhysicalCores() {
    std::set<std::string> siblings;
    std::vector<int> processors = Processors();
    for (int processor : processors) {
      std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(processor) + "/topology/thread_siblings_list");
      std::string text;
      if (!std::getline(file, text)) return static_cast<int>(processors.size());
      siblings.insert(text);
    }
    return static_cast<int>(siblings.size());
  }
};

}  // namespace kbitc
#endif  // KBITC_RUNNER_MACHINE_H_
