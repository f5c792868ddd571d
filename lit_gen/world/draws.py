"""Random numbers as a function of where they are used: (salt, index, name) -> uniforms, the same on CPU and GPU.

A counter-based generator: no state, any order, any subset of indices, any device. Integer hashing (splitmix64) is
exact everywhere, so two machines draw the same scenes.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """The 64-bit pattern of `value` as the signed integer torch stores."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_FIRST, _SECOND, _STEP = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB), _signed(_GOLDEN)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser; torch shifts right arithmetically, hence the masks. In place."""
    z.bitwise_xor_((z >> 30).bitwise_and_((1 << 34) - 1)).mul_(_FIRST)
    z.bitwise_xor_((z >> 27).bitwise_and_((1 << 37) - 1)).mul_(_SECOND)
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def salt(*parts: str | int) -> int:
    """One 64-bit number from names and integers, different for different sequences of parts."""
    value = _GOLDEN
    for part in parts:
        number = zlib.crc32(part.encode()) + (1 << 40) if isinstance(part, str) else part
        value = (value ^ (number & _MASK)) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value = ((value ^ (value >> 31)) + _GOLDEN) & _MASK
    return value


class Draws:
    """Independent uniforms for every (index, name): `Draws(index, salt("base", "train", 0)).uniform("floor")`."""

    def __init__(self, index: Tensor, salted: int) -> None:
        """index: B integers; salted: from `salt`."""
        self.key = _mix(index.long() * _STEP + _signed(salted))  # B

    def bits(self, name: str, columns: int = 1) -> Tensor:
        """B x columns of 64 random bits as signed integers; each column is an independent stream."""
        offsets = [_signed(salt(name, column)) for column in range(columns)]
        return _mix(self.key[:, None] + torch.tensor(offsets, device=self.key.device))

    def uniforms(self, name: str, columns: int) -> Tensor:
        """B x columns floats in [0, 1), multiples of 2**-24."""
        return ((self.bits(name, columns) >> 40) & 0xFFFFFF).float() * 2.0**-24

    def uniform(self, name: str, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
        """B floats in [low, high)."""
        return low + (high - low) * self.uniforms(name, 1)[:, 0]

    def integer(self, name: str, count: int) -> Tensor:
        """B integers in 0..count-1."""
        return (self.uniforms(name, 1)[:, 0] * count).long()

    def choice(self, name: str, weights: Tensor) -> Tensor:
        """B integers drawn with `weights` (n) or, a row per scene, (B n)."""
        cumulated = weights.cumsum(-1)
        point = self.uniforms(name, 1) * cumulated[..., -1:]  # B 1
        return (cumulated <= point).sum(-1).clamp(max=weights.shape[-1] - 1)

    def chance(self, name: str, probability: float | Tensor) -> Tensor:
        """B bools, true with `probability`."""
        return self.uniforms(name, 1)[:, 0] < probability
