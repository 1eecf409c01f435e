#pragma once
// The compression function of SHA-256 (FIPS 180-4, section 6.2.2) over whole blocks, portable and
// with the SHA instructions of x86. Internal to schemas and its tests.

#include "schemas/sha256.h"

namespace kvplan {

/// The reference, and what machines without the instructions run.
void sha256_blocks_portable(std::array<std::uint32_t, 8>& state, const std::byte* blocks,
                            std::size_t count);

/// The same by the SHA instructions; null where compiler or processor lacks them.
Sha256::Blocks* sha256_blocks_x86();

}  // namespace kvplan
