"""Checksums of parts give the checksum of the whole."""

from __future__ import annotations

import random

import pytest

from core.crc import joined
from core.storage import crc32c


@pytest.mark.parametrize("cut", [0, 1, 7, 4096, 99_999, 100_000])
def test_two_parts_give_the_sum_of_the_whole(cut: int) -> None:
    data = random.Random(5).randbytes(100_000)
    assert joined(crc32c(data[:cut]), crc32c(data[cut:]), len(data) - cut) == crc32c(data)


def test_parts_of_any_sizes_can_be_joined_one_by_one() -> None:
    data, draw, total, at = random.Random(6).randbytes(50_000), random.Random(7), 0, 0
    while at < len(data):
        piece = data[at : at + draw.randrange(1, 9000)]
        total, at = joined(total, crc32c(piece), len(piece)), at + len(piece)
    assert total == crc32c(data)
