// Reads .npz and .npy files (ZIP with stored or deflated members, ZIP64) and writes .npz files (stored members).
// Layout: PKWARE APPNOTE 6.3, sections 4.3 and 4.5.
#ifndef KBITC_RUNNER_NPZ_H_
#define KBITC_RUNNER_NPZ_H_

#include <cstdio>
#include <fstream>
#include <map>
#include <utility>

#include "array.h"
#include "inflate.h"

namespace kbitc {

using NamedArrays = std::vector<std::pair<std::string, Array>>;

inline uint32_t Crc32(const void* data, size_t size, uint32_t crc = 0) {
  static const std::vector<uint32_t> table = [] {
    std::vector<uint32_t> made(256);
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) ? 0xedb88320u : 0);
      made[i] = value;
    }
    return made;
  }();
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
  crc = ~crc;
  for (size_t i = 0; i < size; ++i) crc = table[(crc ^ bytes[i]) & 255] ^ (crc >> 8);
  return ~crc;
}

class NpzReader {
 public:
  // The arrays of a file; a .npy file gives one array with an empty name.
  static NamedArrays Read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<uint8_t> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (!file) throw Failure(kResource, "cannot read the input file [at " + path + "]");
    if (bytes.size() >= 6 && std::memcmp(bytes.data(), "\x93NUMPY", 6) == 0) {
      return {{"", npy::Parse(bytes.data(), bytes.size(), path)}};
    }
    NpzReader reader(std::move(bytes), path);
    return reader.Members();
  }

 private:
  NpzReader(std::vector<uint8_t> bytes, const std::string& path) : bytes_(std::move(bytes)), path_(path) {}

  [[noreturn]] void Broken(const std::string& why) const {
    throw Failure(kInputs, "the input file is not a whole .npz file: " + why + " [at " + path_ + "]");
  }

  // A little-endian number of `size` bytes.
  uint64_t Number(uint64_t at, int size) const {
    if (at > bytes_.size() || bytes_.size() - at < static_cast<uint64_t>(size)) Broken("it is truncated");
    uint64_t value = 0;
    for (int i = size; i-- > 0;) value = value << 8 | bytes_[at + i];
    return value;
  }

  uint64_t EndRecord() const {
    for (uint64_t at = bytes_.size() < 22 ? 0 : bytes_.size() - 22;; --at) {
      if (bytes_.size() >= 22 && Number(at, 4) == 0x06054b50) return at;
      if (at == 0 || bytes_.size() - at > 22 + 65535) Broken("no directory");
    }
  }

  NamedArrays Members() const {
    uint64_t end = EndRecord(), count = Number(end + 10, 2), at = Number(end + 16, 4);
    if (end >= 20 && Number(end - 20, 4) == 0x07064b50) {
      uint64_t wide = Number(end - 12, 8);
      if (Number(wide, 4) != 0x06064b50) Broken("bad ZIP64 record");
      count = Number(wide + 32, 8);
      at = Number(wide + 48, 8);
    }
    NamedArrays arrays;
    for (uint64_t i = 0; i < count; ++i) {
      if (Number(at, 4) != 0x02014b50) Broken("bad directory");
      uint64_t name_size = Number(at + 28, 2), extra_size = Number(at + 30, 2), comment_size = Number(at + 32, 2);
      Number(at + 46 + name_size + extra_size, 0);
      std::string name(reinterpret_cast<const char*>(bytes_.data()) + at + 46, name_size);
      arrays.emplace_back(Stem(name), Member(at, name, at + 46 + name_size, extra_size));
      at += 46 + name_size + extra_size + comment_size;
    }
    return arrays;
  }

  static std::string Stem(const std::string& name) {
    bool suffix = name.size() > 4 && name.compare(name.size() - 4, 4, ".npy") == 0;
    return suffix ? name.substr(0, name.size() - 4) : name;
  }

  Array Member(uint64_t at, const std::string& name, uint64_t extra, uint64_t extra_size) const {
    uint64_t flags = Number(at + 8, 2), method = Number(at + 10, 2), crc = Number(at + 16, 4);
    uint64_t packed = Number(at + 20, 4), size = Number(at + 24, 4), local = Number(at + 42, 4);
    for (uint64_t i = 0; i + 4 <= extra_size;) {
      uint64_t field = extra + i + 4;
      if (Number(extra + i, 2) == 1) {  // ZIP64: the 32-bit fields that are all ones, in this order
        for (uint64_t* value : {&size, &packed, &local}) {
          if (*value != 0xffffffff) continue;
          *value = Number(field, 8);
          field += 8;
        }
      }
      i += 4 + Number(extra + i + 2, 2);
    }
    if (flags & 1) Broken("it is encrypted");
    if (Number(local, 4) != 0x04034b50) Broken("bad member " + name);
    uint64_t start = local + 30 + Number(local + 26, 2) + Number(local + 28, 2);
    if (start > bytes_.size() || packed > bytes_.size() - start) Broken("it is truncated");
    std::string where = path_ + ": " + name;
    if (method == 0 && packed == size) return Checked(bytes_.data() + start, size, crc, where);
    // DEFLATE gives at most 1032 bytes for one, so a larger claim is a lie.
    if (method != 8 || size / 1033 > packed) Broken("unknown compression of " + name);
    std::vector<uint8_t> plain = Inflate::Run(bytes_.data() + start, packed, size);
    return Checked(plain.data(), size, crc, where);
  }

  Array Checked(const uint8_t* data, size_t size, uint64_t crc, const std::string& where) const {
    if (Crc32(data, size) != crc) Broken("a checksum differs in " + where);
    return npy::Parse(data, size, where);
  }

  std::vector<uint8_t> bytes_;
  std::string path_;
};

class NpzWriter {
 public:
  // Write through a temporary file, so that a failure leaves nothing behind.
  static void Write(const std::string& path, const NamedArrays& arrays) {
    std::string partial = path + ".part";
    {
      std::ofstream file(partial, std::ios::binary | std::ios::trunc);
      NpzWriter writer(&file);
      for (const auto& [name, array] : arrays) writer.Add(name + ".npy", array);
      writer.Finish(arrays.size());
      file.flush();
      if (!file) {
        std::remove(partial.c_str());
        throw Failure(kResource, "cannot write the outputs [at " + path + "]");
      }
    }
    if (std::rename(partial.c_str(), path.c_str()) != 0) {
      std::remove(partial.c_str());
      throw Failure(kResource, "cannot write the outputs [at " + path + "]");
    }
  }

 private:
  explicit NpzWriter(std::ofstream* file) : file_(file) {}

  static std::string Bytes(uint64_t value, int size) {
    std::string text;
    for (int i = 0; i < size; ++i) text += static_cast<char>(value >> (8 * i) & 255);
    return text;
  }

  void Add(const std::string& name, const Array& array) {
    std::string head = npy::Header(array);
    uint64_t size = head.size() + array.Bytes();
    if (size + offset_ > 0xfffffff0u) throw Failure(kResource, "the outputs exceed 4 GiB, the limit of this writer");
    uint32_t crc = Crc32(array.data.get(), array.Bytes(), Crc32(head.data(), head.size()));
    // Version 2.0, flag 0x800: the name is UTF-8; stored; the date 1980-01-01, so that equal outputs give equal files.
    std::string common = Bytes(20, 2) + Bytes(0x800, 2) + Bytes(0, 2) + Bytes(0, 2) + Bytes(0x21, 2) + Bytes(crc, 4) +
                         Bytes(size, 4) + Bytes(size, 4) + Bytes(name.size(), 2) + Bytes(0, 2);
    directory_ += Bytes(0x02014b50, 4) + Bytes(20, 2) + common + std::string(10, '\0') + Bytes(offset_, 4) + name;
    Put(Bytes(0x04034b50, 4) + common + name + head);
    file_->write(reinterpret_cast<const char*>(array.data.get()), static_cast<std::streamsize>(array.Bytes()));
    offset_ += array.Bytes();
  }

  void Finish(size_t count) {
    uint64_t start = offset_;
    Put(directory_ + Bytes(0x06054b50, 4) + Bytes(0, 4) + Bytes(count, 2) + Bytes(count, 2) +
        Bytes(directory_.size(), 4) + Bytes(start, 4) + Bytes(0, 2));
  }

  void Put(const std::string& text) {
    file_->write(text.data(), static_cast<std::streamsize>(text.size()));
    offset_ += text.size();
  }

  std::ofstream* file_;
  std::string directory_;
  uint64_t offset_ = 0;
};

}  // namespace kbitc
#endif  // KBITC_RUNNER_NPZ_H_
