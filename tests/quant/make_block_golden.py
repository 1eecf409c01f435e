"""Prints the golden bytes of BlockCodecs.MatchGgml: two blocks of each ggml format, from the `gguf`
package (pip install gguf numpy) and, for iq4_nl, which that cannot write, from the rule in
ggml-quants.c (quantize_row_iq4_nl_impl without a search) written out here."""

import gguf
import numpy as np

LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
                  np.float32)


def iq4_nl(block):
    largest = block[np.argmax(np.abs(block))]
    scaled = block / (largest / LEVELS[0])
    codes = np.argmin(np.abs(scaled[:, None] - LEVELS[None, :]), axis=1)
    levels, weights = LEVELS[codes], block * block
    scale = np.float32(np.sum(weights * levels * block) / np.sum(weights * levels * levels))
    nibbles = (codes[:16] | codes[16:] << 4).astype(np.uint8)
    return np.float16(scale).tobytes() + nibbles.tobytes()


x = np.array([(i * 37 % 101 - 50) / 16 for i in range(64)], np.float32)
for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
    quantised = gguf.quants.quantize(x.reshape(1, -1), gguf.GGMLQuantizationType[name])
    print(name.lower(), quantised.tobytes().hex())
print("iq4_nl", b"".join(iq4_nl(block) for block in x.reshape(2, 32)).hex())
