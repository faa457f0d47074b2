// A numpy array in memory and its .npy form (numpy.lib.format, versions 1 to 3; little-endian).
#ifndef KBITC_RUNNER_ARRAY_H_
#define KBITC_RUNNER_ARRAY_H_

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "failure.h"

namespace kbitc {

constexpr size_t kAlignment = 64;  // what TVM's generated code assumes of every buffer

struct DataType {
  const char* name;   // numpy's name, also in the manifest
  const char* descr;  // numpy's code in .npy files
  size_t size;
};

constexpr DataType kDataTypes[] = {
    {"bool", "|b1", 1},    {"int8", "|i1", 1},    {"uint8", "|u1", 1},   {"int16", "<i2", 2},
    {"uint16", "<u2", 2},  {"int32", "<i4", 4},   {"uint32", "<u4", 4},  {"int64", "<i8", 8},
    {"uint64", "<u8", 8},  {"float16", "<f2", 2}, {"float32", "<f4", 4}, {"float64", "<f8", 8}};

inline const DataType* FindDataType(const std::string& name) {
  for (const DataType& type : kDataTypes) {
    if (name == type.name) return &type;
  }
  return nullptr;
}

struct Array {
  const DataType* type = nullptr;
  std::vector<int64_t> shape;
  std::shared_ptr<uint8_t> data;  // starts on kAlignment

  size_t Bytes() const {
    size_t count = type->size;
    for (int64_t dim : shape) {
      if (dim != 0 && count > SIZE_MAX / 2 / static_cast<size_t>(dim)) throw Failure(kInputs, "an array is too large");
      count *= static_cast<size_t>(dim);
    }
    return count;
  }

  void Allocate() {
    size_t size = (Bytes() + kAlignment) / kAlignment * kAlignment;
    void* place = std::aligned_alloc(kAlignment, size);
    if (place == nullptr) throw Failure(kResource, "out of memory");
    data = std::shared_ptr<uint8_t>(static_cast<uint8_t*>(place), std::free);
  }
};

inline std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

namespace npy {

// The text behind 'key': in the header's dict, without leading spaces.
inline std::string After(const std::string& header, const std::string& key, const std::string& where) {
  size_t at = header.find("'" + key + "':");
  if (at == std::string::npos) throw Failure(kInputs, "not a .npy array: no " + key + " [at " + where + "]");
  at = header.find_first_not_of(' ', at + key.size() + 3);
  return at == std::string::npos ? "" : header.substr(at);
}

inline std::vector<int64_t> ParseShape(const std::string& text, const std::string& where) {
  std::vector<int64_t> shape;
  size_t at = 1;
  if (text.empty() || text[0] != '(') throw Failure(kInputs, "not a .npy array: no shape [at " + where + "]");
  while (at < text.size() && text[at] != ')') {
    if (text[at] == ',' || text[at] == ' ') {
      ++at;
      continue;
    }
    size_t used = 0;
    int64_t dim = -1;
    try {
      dim = std::stoll(text.substr(at, 20), &used);
    } catch (const std::exception&) {
      used = 0;
    }
    if (used == 0 || dim < 0) throw Failure(kInputs, "not a .npy array: bad shape [at " + where + "]");
    shape.push_back(dim);
    at += used;
  }
  return shape;
}

// Column-major to row-major order.
inline void CopyFortran(const uint8_t* source, const Array& array) {
  size_t rank = array.shape.size(), size = array.type->size, total = array.Bytes() / size;
  std::vector<int64_t> index(rank, 0);
  for (size_t i = 0; i < total; ++i) {
    size_t offset = 0;
    for (size_t d = rank; d-- > 0;) offset = offset * array.shape[d] + index[d];
    std::memcpy(array.data.get() + i * size, source + offset * size, size);
    for (size_t d = rank; d-- > 0;) {
      if (++index[d] < array.shape[d]) break;
      index[d] = 0;
    }
  }
}

inline Array Parse(const uint8_t* bytes, size_t size, const std::string& where) {
  if (size < 12 || std::memcmp(bytes, "\x93NUMPY", 6) != 0) {
    throw Failure(kInputs, "not a .npy array [at " + where + "]");
  }
  bool wide = bytes[6] > 1;
  size_t length = bytes[8] | static_cast<size_t>(bytes[9]) << 8;
  if (wide) length |= static_cast<size_t>(bytes[10]) << 16 | static_cast<size_t>(bytes[11]) << 24;
  size_t start = (wide ? 12 : 10) + length;
  if (start > size) throw Failure(kInputs, "a .npy array is truncated [at " + where + "]");
  std::string header(reinterpret_cast<const char*>(bytes) + (wide ? 12 : 10), length);
  Array array;
  std::string descr = After(header, "descr", where);
  for (const DataType& type : kDataTypes) {
    if (descr.compare(0, std::strlen(type.descr) + 2, "'" + std::string(type.descr) + "'") == 0) array.type = &type;
  }
  if (array.type == nullptr) {
    throw Failure(kInputs, "an array has a dtype that is not supported [at " + where + "] (got " + descr.substr(0, 8) + ")");
  }
  array.shape = ParseShape(After(header, "shape", where), where);
  if (array.Bytes() > size - start) throw Failure(kInputs, "a .npy array is truncated [at " + where + "]");
  array.Allocate();
  if (After(header, "fortran_order", where).compare(0, 4, "True") == 0) {
    CopyFortran(bytes + start, array);
  } else {
    std::memcpy(array.data.get(), bytes + start, array.Bytes());
  }
  return array;
}

// The magic and header in front of the data; 64-byte aligned as numpy writes it.
inline std::string Header(const Array& array) {
  std::string shape = "(";
  for (int64_t dim : array.shape) shape += std::to_string(dim) + ", ";
  if (array.shape.size() > 1) shape.resize(shape.size() - 2);
  if (array.shape.size() == 1) shape.resize(shape.size() - 1);
  std::string text = std::string("{'descr': '") + array.type->descr + "', 'fortran_order': False, 'shape': " + shape + "), }";
  text += std::string((kAlignment - (10 + text.size() + 1) % kAlignment) % kAlignment, ' ') + "\n";
  std::string head("\x93NUMPY\x01\x00", 8);
  head += static_cast<char>(text.size() & 255);
  head += static_cast<char>(text.size() >> 8);
  return head + text;
}

}  // namespace npy
}  // namespace kbitc
#endif  // KBITC_RUNNER_ARRAY_H_
