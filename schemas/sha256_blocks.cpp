#include "schemas/sha256_blocks.h"

#include <bit>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace kvplan {
namespace {

constexpr std::size_t kBlockBytes = 64;

// FIPS 180-4, section 4.2.2: the first 32 bits of the fractions of the cube roots of the first 64
// primes.
constexpr std::array<std::uint32_t, 64> kRound = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

std::uint32_t load_big_endian(const std::byte* p) {
  return std::to_integer<std::uint32_t>(p[0]) << 24 | std::to_integer<std::uint32_t>(p[1]) << 16 |
         std::to_integer<std::uint32_t>(p[2]) << 8 | std::to_integer<std::uint32_t>(p[3]);
}

}  // namespace

void sha256_blocks_portable(std::array<std::uint32_t, 8>& state, const std::byte* p,
                            std::size_t count) {
  for (; count > 0; --count, p += kBlockBytes) {
    std::array<std::uint32_t, 64> w;
    for (std::size_t i = 0; i < 16; ++i) w[i] = load_big_endian(p + 4 * i);
    for (std::size_t i = 16; i < 64; ++i) {
      const std::uint32_t s0 =
          std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ (w[i - 15] >> 3);
      const std::uint32_t s1 = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t sum1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
      const std::uint32_t choice = (e & f) ^ (~e & g);
      const std::uint32_t t1 = h + sum1 + choice + kRound[i] + w[i];
      const std::uint32_t sum0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
      const std::uint32_t majority = (a & b) ^ (a & c) ^ (b & c);
      h = g, g = f, f = e, e = d + t1;
      d = c, c = b, b = a, a = t1 + sum0 + majority;
    }
    const std::array<std::uint32_t, 8> added = {a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < 8; ++i) state[i] += added[i];
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
namespace {

// Intel, "Intel SHA Extensions" (2013). The instructions keep the state as two registers, written
// here from the highest lane down: (a b e f) and (c d g h). sha256rnds2(cdgh, abef, wk) makes two
// rounds and returns the new (a b e f); the old one is then the new (c d g h).
__attribute__((target("sha,ssse3"))) void blocks_by_sha_instructions(
    std::array<std::uint32_t, 8>& state, const std::byte* p, std::size_t count) {
  constexpr int kReverse = 0x1b;  // lanes 3 2 1 0
  constexpr int kUpper = 0x0e;    // the two upper lanes moved down
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  auto* const stored = reinterpret_cast<__m128i*>(state.data());
  const __m128i dcba = _mm_shuffle_epi32(_mm_loadu_si128(stored), kReverse);
  const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128(stored + 1), kReverse);
  __m128i abef = _mm_unpackhi_epi64(hgfe, dcba);
  __m128i cdgh = _mm_unpacklo_epi64(hgfe, dcba);
  for (; count > 0; --count, p += kBlockBytes) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    const auto* const words = reinterpret_cast<const __m128i*>(p);
    __m128i w0 = _mm_shuffle_epi8(_mm_loadu_si128(words), big_endian);
    __m128i w1 = _mm_shuffle_epi8(_mm_loadu_si128(words + 1), big_endian);
    __m128i w2 = _mm_shuffle_epi8(_mm_loadu_si128(words + 2), big_endian);
    __m128i w3 = _mm_shuffle_epi8(_mm_loadu_si128(words + 3), big_endian);
    for (std::size_t round = 0; round < 64; round += 4) {
      const auto* const k = reinterpret_cast<const __m128i*>(&kRound[round]);
      const __m128i wk = _mm_add_epi32(w0, _mm_loadu_si128(k));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, kUpper));
      // The four words after w3. The last four times they are not needed; the loop stays plain.
      const __m128i seven_before = _mm_alignr_epi8(w3, w2, 4);
      const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(w0, w1), seven_before);
      const __m128i next = _mm_sha256msg2_epu32(sum, w3);
      w0 = w1, w1 = w2, w2 = w3, w3 = next;
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  _mm_storeu_si128(stored, _mm_shuffle_epi32(_mm_unpackhi_epi64(cdgh, abef), kReverse));
  _mm_storeu_si128(stored + 1, _mm_shuffle_epi32(_mm_unpacklo_epi64(cdgh, abef), kReverse));
}

// g++ 12 does not know "sha" in __builtin_cpu_supports.
bool has_sha_instructions() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & bit_SHA) != 0 &&
         __builtin_cpu_supports("ssse3");
}

}  // namespace

Sha256::Blocks* sha256_blocks_x86() {
  return has_sha_instructions() ? blocks_by_sha_instructions : nullptr;
}
#else
Sha256::Blocks* sha256_blocks_x86() { return nullptr; }
#endif

}  // namespace kvplan
