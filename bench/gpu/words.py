"""Compares radius and angle of Philox words with the CPU's, bit for bit: the proof that a device draws the same z.

Both depend on the upper 24 bits of a word, and everything else in a normal is integers and one product. So 2**24 words
are all there are.
"""

import torch

from ...triton_kernels import reference
from ...triton_kernels.normal import polar
from .part import Record, part

ALL = 1 << 24
_AT_ONCE = 1 << 20


def differing_words(device: torch.device, stride: int = 1) -> dict[str, int]:
    """Counts the words for which the kernel and the reference on the CPU give other bits.

    Args:
        device: device of the kernel.
        stride: compares every ``stride``-th of the 2**24 values, and the last one.

    Returns:
        Under "words" the number of words; under "radius", "sine" and "cosine" the numbers that differ.
    """
    values = torch.arange(0, ALL, stride, device="cpu")
    if values[-1] != ALL - 1:
        values = torch.cat((values, torch.tensor([ALL - 1], device="cpu")))
    counts = torch.zeros(3, dtype=torch.int64, device="cpu")
    for value in values.split(_AT_ONCE):
        words = (value << 8) + value % 251  # the lower 8 bits must not matter
        wanted = torch.stack((reference.radius(words), *reference.sin_cos(words)))
        found = polar(words.to(device)).cpu()
        counts += (found.view(torch.int32) != wanted.view(torch.int32)).sum(1)
    return {"words": len(values), **dict(zip(("radius", "sine", "cosine"), counts.tolist(), strict=True))}


def measure(device: torch.device, record: Record) -> None:
    """Compares all 2**24 words on a GPU, every 256th in Triton's interpreter."""
    counts = differing_words(device, 1 if device.type == "cuda" else 256)
    record["words"] = counts
    if sum(counts.values()) != counts["words"]:
        raise SystemExit(f"not the CPU's bits: {counts}")


if __name__ == "__main__":
    part(measure)()
