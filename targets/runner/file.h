// A regular file of a bundle, opened without following links, and its SHA-256.
#ifndef KBITC_RUNNER_FILE_H_
#define KBITC_RUNNER_FILE_H_

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "failure.h"
#include "sha256.h"

namespace kbitc {

namespace fs = std::filesystem;

// A descriptor that closes itself.
class OpenFile {
 public:
  explicit OpenFile(const fs::path& path) : descriptor_(open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)) {
    if (descriptor_ < 0) {
      throw Failure(kBundle, "a file of the bundle cannot be read (missing, a link, or no permission) [at " +
                                 path.string() + "] (got " + std::strerror(errno) + ")");
    }
    struct stat status;
    if (fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
      close(descriptor_);
      throw Failure(kBundle, "a file of the bundle is not a regular file [at " + path.string() + "]");
    }
    size_ = static_cast<uint64_t>(status.st_size);
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  ~OpenFile() { close(descriptor_); }
  int descriptor() const { return descriptor_; }
  uint64_t size() const { return size_; }

  std::string ReadAll() const {
    std::string text(size_, '\0');
    size_t done = 0;
    while (done < text.size()) {
      ssize_t got = read(descriptor_, text.data() + done, text.size() - done);
      if (got <= 0) throw Failure(kBundle, "a file of the bundle cannot be read to its end");
      done += static_cast<size_t>(got);
    }
    return text;
  }

  std::string Hash() const {
    Sha256 hash;
    std::vector<uint8_t> buffer(1 << 20);
    for (;;) {
      ssize_t got = read(descriptor_, buffer.data(), buffer.size());
      if (got < 0) throw Failure(kBundle, "a file of the bundle cannot be read to its end");
      if (got == 0) return hash.Hex();
      hash.Update(buffer.data(), static_cast<size_t>(got));
    }
  }

 private:
  int descriptor_;
  uint64_t size_ = 0;
};

}  // namespace kbitc
#endif  // KBITC_RUNNER_FILE_H_
