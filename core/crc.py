"""CRC32C of a whole from those of its parts, so that parts can be summed where and when they arrive."""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed: the highest bit of a word is the coefficient of x^0
_ONE, _X8 = 1 << 31, 1 << 23


def joined(first: int, second: int, size: int) -> int:
    """Checksum of two pieces one after the other; `size` is that of the second, in bytes."""
    return _product(_behind(size), first) ^ second


@lru_cache(maxsize=64)
def _behind(size: int) -> int:
    """x^(8 size): what `size` bytes behind a piece multiply its checksum by."""
    power, square = _ONE, _X8
    while size:
        if size & 1:
            power = _product(square, power)
        square = _product(square, square)
        size >>= 1
    return power


def _product(a: int, b: int) -> int:
    """Of two polynomials over GF(2), modulo the checksum's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
