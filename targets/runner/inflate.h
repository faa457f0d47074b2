// Decompression of DEFLATE data (RFC 1951), for .npz files written by numpy.savez_compressed.
#ifndef KBITC_RUNNER_INFLATE_H_
#define KBITC_RUNNER_INFLATE_H_

#include <cstdint>
#include <vector>

#include "failure.h"

namespace kbitc {

class Inflate {
 public:
  // Decompress to exactly `size` bytes; anything else is a Failure.
  static std::vector<uint8_t> Run(const uint8_t* data, size_t length, size_t size) {
    Inflate state(data, length);
    state.limit_ = size;
    state.Blocks();
    if (state.out_.size() != size) Broken();
    return std::move(state.out_);
  }

 private:
  // Canonical Huffman code: how many codes each length has, and the symbols in code order (RFC 1951, 3.2.2).
  struct Code {
    uint16_t count[16] = {0};
    uint16_t symbol[288] = {0};

    void Build(const uint8_t* lengths, int n) {
      for (uint16_t& c : count) c = 0;
      for (int i = 0; i < n; ++i) ++count[lengths[i]];
      count[0] = 0;
      int left = 1;
      for (int length = 1; length < 16; ++length) {
        left = 2 * left - count[length];
        if (left < 0) Broken();
      }
      uint16_t start[16] = {0};
      for (int length = 1; length < 15; ++length) start[length + 1] = start[length] + count[length];
      for (int i = 0; i < n; ++i) {
        if (lengths[i] != 0) symbol[start[lengths[i]]++] = static_cast<uint16_t>(i);
      }
    }
  };

  Inflate(const uint8_t* data, size_t length) : data_(data), end_(data + length) {}

  [[noreturn]] static void Broken() { throw Failure(kInputs, "the input file holds broken compressed data"); }

  uint32_t Bits(int n) {
    while (have_ < n) {
      if (data_ == end_) Broken();
      buffer_ |= static_cast<uint64_t>(*data_++) << have_;
      have_ += 8;
    }
    uint32_t value = static_cast<uint32_t>(buffer_ & ((1ull << n) - 1));
    buffer_ >>= n;
    have_ -= n;
    return value;
  }

  int Symbol(const Code& code) {
    int value = 0, first = 0, index = 0;
    for (int length = 1; length < 16; ++length) {
      value |= static_cast<int>(Bits(1));
      int count = code.count[length];
      if (value - first < count) return code.symbol[index + value - first];
      index += count;
      first = (first + count) << 1;
      value <<= 1;
    }
    Broken();
  }

  void Put(uint8_t byte) {
    if (out_.size() == limit_) Broken();
    out_.push_back(byte);
  }

  void Blocks() {
    for (bool last = false; !last;) {
      last = Bits(1) == 1;
      switch (Bits(2)) {
        case 0: Stored(); break;
        case 1: FixedCodes(); break;
        case 2: DynamicCodes(); break;
        default: Broken();
      }
    }
  }

  void Stored() {
    Bits(have_ % 8);
    uint32_t length = Bits(16), check = Bits(16);
    if ((length ^ check) != 0xffff) Broken();
    for (; length > 0; --length) Put(static_cast<uint8_t>(Bits(8)));
  }

  void FixedCodes() {
    uint8_t lengths[288];
    for (int i = 0; i < 288; ++i) lengths[i] = i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8;
    Code literals, distances;
    literals.Build(lengths, 288);
    for (int i = 0; i < 30; ++i) lengths[i] = 5;
    distances.Build(lengths, 30);
    Codes(literals, distances);
  }

  void DynamicCodes() {
    static const uint8_t order[19] = {16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15};
    int literal_count = static_cast<int>(Bits(5)) + 257;
    int distance_count = static_cast<int>(Bits(5)) + 1;
    int length_count = static_cast<int>(Bits(4)) + 4;
    if (literal_count > 286 || distance_count > 30) Broken();
    uint8_t lengths[320] = {0};
    for (int i = 0; i < length_count; ++i) lengths[order[i]] = static_cast<uint8_t>(Bits(3));
    Code code;
    code.Build(lengths, 19);
    uint8_t all[320] = {0};
    for (int i = 0; i < literal_count + distance_count;) {
      int symbol = Symbol(code);
      if (symbol < 16) {
        all[i++] = static_cast<uint8_t>(symbol);
        continue;
      }
      if (symbol == 16 && i == 0) Broken();
      uint8_t value = symbol == 16 ? all[i - 1] : 0;
      int repeat = symbol == 16 ? 3 + Bits(2) : symbol == 17 ? 3 + Bits(3) : 11 + Bits(7);
      if (i + repeat > literal_count + distance_count) Broken();
      for (; repeat > 0; --repeat) all[i++] = value;
    }
    if (all[256] == 0) Broken();
    Code literals, distances;
    literals.Build(all, literal_count);
    distances.Build(all + literal_count, distance_count);
    Codes(literals, distances);
  }

  void Codes(const Code& literals, const Code& distances) {
    static const uint16_t base[29] = {3,  4,  5,  6,  7,  8,  9,  10, 11,  13,  15,  17,  19,  23, 27,
                                      31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258};
    static const uint8_t extra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};
    static const uint16_t far_base[30] = {1,   2,   3,   4,   5,   7,    9,    13,   17,   25,   33,   49,   65,    97,    129,
                                          193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577};
    for (;;) {
      int symbol = Symbol(literals);
      if (symbol == 256) return;
      if (symbol < 256) {
        Put(static_cast<uint8_t>(symbol));
        continue;
      }
      if (symbol > 285) Broken();
      int length = base[symbol - 257] + static_cast<int>(Bits(extra[symbol - 257]));
      int far = Symbol(distances);
      if (far > 29) Broken();
      size_t distance = far_base[far] + Bits(far < 4 ? 0 : far / 2 - 1);
      if (distance > out_.size()) Broken();
      for (; length > 0; --length) Put(out_[out_.size() - distance]);
    }
  }

  const uint8_t* data_;
  const uint8_t* end_;
  uint64_t buffer_ = 0;
  int have_ = 0;
  size_t limit_ = 0;
  std::vector<uint8_t> out_;
};

}  // namespace kbitc
#endif  // KBITC_RUNNER_INFLATE_H_
