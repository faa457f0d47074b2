// SHA-256 (FIPS 180-4), with the SHA instructions of x86 where the processor has them.
#ifndef KBITC_RUNNER_SHA256_H_
#define KBITC_RUNNER_SHA256_H_

#include <cstdint>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kbitc {

class Sha256 {
 public:
  void Update(const void* data, size_t size) {
    const uint8_t* bytes = static_cast<const uint8_t*>(data);
    length_ += size;
    if (filled_ != 0) {
      size_t take = size < 64 - filled_ ? size : 64 - filled_;
      std::memcpy(block_ + filled_, bytes, take);
      filled_ += take;
      bytes += take;
      size -= take;
      if (filled_ < 64) return;
      Compress(block_, 1);
      filled_ = 0;
    }
    Compress(bytes, size / 64);
    filled_ = size % 64;
    std::memcpy(block_, bytes + size - filled_, filled_);
  }

  // The digest as 64 lower-case hex digits. The object is used up.
  std::string Hex() {
    uint64_t bits = length_ * 8;
    const uint8_t one = 0x80, zero = 0;
    Update(&one, 1);
    while (filled_ != 56) Update(&zero, 1);
    uint8_t tail[8];
    for (int i = 0; i < 8; ++i) tail[i] = static_cast<uint8_t>(bits >> (56 - 8 * i));
    Update(tail, 8);
    std::string text;
    for (uint32_t word : state_) {
      for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[(word >> shift) & 15];
    }
    return text;
  }

 private:
  static constexpr uint32_t kRound[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
      0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
      0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
      0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
      0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
      0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
      0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

  static uint32_t Rotate(uint32_t x, int n) { return (x >> n) | (x << (32 - n)); }

  void Compress(const uint8_t* data, size_t blocks) {
#if defined(__x86_64__)
    static const bool fast = HasShaInstructions();
    if (fast) return CompressFast(data, blocks);
#endif
    for (; blocks > 0; --blocks, data += 64) CompressOne(data);
  }

  void CompressOne(const uint8_t* data) {
    uint32_t w[64];
    for (int i = 0; i < 16; ++i) {
      w[i] = static_cast<uint32_t>(data[4 * i]) << 24 | static_cast<uint32_t>(data[4 * i + 1]) << 16 |
             static_cast<uint32_t>(data[4 * i + 2]) << 8 | data[4 * i + 3];
    }
    for (int i = 16; i < 64; ++i) {
      uint32_t s0 = Rotate(w[i - 15], 7) ^ Rotate(w[i - 15], 18) ^ (w[i - 15] >> 3);
      uint32_t s1 = Rotate(w[i - 2], 17) ^ Rotate(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    uint32_t a = state_[0], b = state_[1], c = state_[2], d = state_[3];
    uint32_t e = state_[4], f = state_[5], g = state_[6], h = state_[7];
    for (int i = 0; i < 64; ++i) {
      uint32_t t1 = h + (Rotate(e, 6) ^ Rotate(e, 11) ^ Rotate(e, 25)) + ((e & f) ^ (~e & g)) + kRound[i] + w[i];
      uint32_t t2 = (Rotate(a, 2) ^ Rotate(a, 13) ^ Rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const uint32_t add[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state_[i] += add[i];
  }

#if defined(__x86_64__)
  // CPUID leaf 7, EBX bit 29 (Intel SDM volume 2A); SSE4.1 and SSSE3 come with it on every such processor.
  static bool HasShaInstructions() {
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (b >> 29) & 1;
  }

  // sha256rnds2 does two rounds on the state split as ABEF and CDGH; sha256msg1/2 extend the message schedule.
  __attribute__((target("sha,sse4.1,ssse3"))) void CompressFast(const uint8_t* data, size_t blocks) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i abef = _mm_set_epi32(state_[0], state_[1], state_[4], state_[5]);
    __m128i cdgh = _mm_set_epi32(state_[2], state_[3], state_[6], state_[7]);
    for (; blocks > 0; --blocks, data += 64) {
      const __m128i old_abef = abef, old_cdgh = cdgh;
      __m128i w[4];
      for (int i = 0; i < 4; ++i) {
        w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + i), swap);
      }
      for (int i = 0; i < 16; ++i) {
        const __m128i now = w[i & 3];
        const __m128i sum = _mm_add_epi32(now, _mm_loadu_si128(reinterpret_cast<const __m128i*>(kRound) + i));
        cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
        abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
        if (i < 12) {
          const __m128i shifted = _mm_alignr_epi8(w[(i + 3) & 3], w[(i + 2) & 3], 4);
          const __m128i part = _mm_add_epi32(_mm_sha256msg1_epu32(now, w[(i + 1) & 3]), shifted);
          w[i & 3] = _mm_sha256msg2_epu32(part, w[(i + 3) & 3]);
        }
      }
      abef = _mm_add_epi32(abef, old_abef);
      cdgh = _mm_add_epi32(cdgh, old_cdgh);
    }
    uint32_t first[4], second[4];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(first), abef);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(second), cdgh);
    state_[0] = first[3], state_[1] = first[2], state_[4] = first[1], state_[5] = first[0];
    state_[2] = second[3], state_[3] = second[2], state_[6] = second[1], state_[7] = second[0];
  }
#endif

  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint64_t length_ = 0;
  size_t filled_ = 0;
  uint8_t block_[64];
};

}  // namespace kbitc
#endif  // KBITC_RUNNER_SHA256_H_
