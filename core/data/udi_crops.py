"""UDI's linked crops: two large ones that overlap, small ones near them, and which tokens of them match."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from core.data.draws import uniform
from core.data.udi_geometry import (
    Floats,
    Ints,
    Matches,
    between,
    corners,
    fitting_boxes,
    log_range,
    match,
    placed,
    pull,
    reference,
    stratified,
    upright,
    windows,
)
from core.data.views import ATTEMPTS, Cropped

GLOBALS = ("global0", "global1")
SAMPLING_DRAW = -1001  # stream of the sampled tokens, apart from those of the views
RATIO = (3 / 4, 4 / 3)  # width / height of every crop


def local_names(count: int) -> list[str]:
    return [f"local{k}" for k in range(count)]


@dataclass(frozen=True)
class Linking:
    """Matches between the views of B samples, from their corners and sampled tokens: section 6 of the method's notes.

    Token lists of both directions come from one draw per image, and one more serves all small crops.
    """

    grid: int  # tokens along a side of a large crop
    local_grid: int

    def large(self, a: Floats, b: Floats, tokens: Ints) -> list[Matches]:
        """Crop A found in B, then B in A."""
        return [match(x, y, tokens, self.grid, self.grid) for x, y in ((a, b), (b, a))]

    def small(self, local: Floats, a: Floats, b: Floats, tokens: Ints) -> list[Matches]:
        """A small crop found in B (what the teacher sees where the student sees A), then in A."""
        return [match(local, x, tokens, self.local_grid, self.grid) for x in (b, a)]


@dataclass(frozen=True)
class LinkedCrops:
    """Crops A and B with B pulled towards A, `local` small crops pulled towards the region of both.

    `extra` of the result has, s and s' being the tokens sampled in a large and a small crop:
    source (B, 2, s) tokens of A, then of B; valid (B, 2, s); target, weight (B, 2, s, 4) their places in B, then in A;
    local_target, local_weight (B, local, 2, s', 4) places of a small crop's tokens in B, then in A.
    """

    link: Linking
    local: int
    scale: tuple[float, float]
    local_scale: tuple[float, float]
    window: int
    local_window: int
    flip: float = 0.5
    released_slips: bool = False  # the horizontal pull and the region for small crops as the released code has them

    def __call__(self, seed: int, epoch: int, samples: Ints, sizes: Ints) -> Cropped:
        samples, sizes = np.asarray(samples, np.int64), np.asarray(sizes, np.int64)
        names = [*GLOBALS, *local_names(self.local)]
        boxes: dict[str, Ints] = {}
        flips: dict[str, NDArray[np.bool_]] = {}
        edges: dict[str, Floats] = {}
        for number, name in enumerate(names):
            draws = uniform(seed, epoch, samples, 2 * number, 2 * ATTEMPTS + 3)
            box = self._draw(draws, sizes, self.local_scale if number >= len(GLOBALS) else self.scale)
            if number:
                box = pull(box, self._region(edges), sizes, self.released_slips)
            boxes[name], flips[name] = box, draws[:, -1] < self.flip
            mirrored = np.stack([np.zeros_like(flips[name]), flips[name]], axis=1)
            edges[name] = corners(box, sizes, mirrored)
        return Cropped(boxes, flips, self._matches(edges, *self._sampled(seed, epoch, samples)))

    def _draw(self, draws: NDArray[np.float64], sizes: Ints, scale: tuple[float, float]) -> Ints:
        """Boxes (B, 4) from 10 areas, 10 ratios and a place."""
        area = between(draws[:, :ATTEMPTS], *scale)
        ratio = between(draws[:, ATTEMPTS : 2 * ATTEMPTS], *log_range(RATIO))
        return placed(*fitting_boxes(area, ratio, sizes, RATIO), sizes, draws[:, 2 * ATTEMPTS : 2 * ATTEMPTS + 2])

    def _region(self, edges: dict[str, Floats]) -> Floats:
        """What the next crop is pulled towards: crop A, then both large ones."""
        if GLOBALS[1] not in edges:
            return edges[GLOBALS[0]]
        a, b = (edges[name] for name in GLOBALS)
        return reference(a, b) if self.released_slips else reference(upright(a), upright(b))

    def _matches(self, edges: dict[str, Floats], tokens: Ints, local_tokens: Ints) -> dict[str, NDArray[np.generic]]:
        a, b = (edges[name] for name in GLOBALS)
        large = self.link.large(a, b, tokens)
        extra: dict[str, NDArray[np.generic]] = {
            name: np.stack([getattr(found, name) for found in large], axis=1)
            for name in ("source", "valid", "target", "weight")
        }
        small = [self.link.small(edge, a, b, local_tokens) for name, edge in edges.items() if name not in GLOBALS]
        for name in ("target", "weight") if small else ():
            pairs = [np.stack([getattr(found, name) for found in pair], axis=1) for pair in small]
            extra[f"local_{name}"] = np.stack(pairs, axis=1)
        return extra

    def _sampled(self, seed: int, epoch: int, samples: Ints) -> tuple[Ints, Ints]:
        """Tokens (B, s) of both large crops and (B, s') of all small ones."""
        counts = [windows(self.link.grid, self.window) ** 2, windows(self.link.local_grid, self.local_window) ** 2]
        draws = uniform(seed, epoch, samples, SAMPLING_DRAW, sum(counts) + 2)
        inside = np.split(draws[:, :-2], [counts[0]], axis=1)
        sides = ((self.link.grid, self.window), (self.link.local_grid, self.local_window))
        large, small = (
            stratified(np.floor(u * window**2).astype(np.int64), draws[:, i - 2], grid, window)
            for i, (u, (grid, window)) in enumerate(zip(inside, sides, strict=True))
        )
        return large, small

    def whole(self, samples: int, local: int) -> dict[str, NDArray[np.generic]]:
        """`extra` of crops that are all the whole image, tokens in the middle of their windows: for evaluation."""
        draws = [
            stratified(np.full((samples, windows(grid, window) ** 2), window**2 // 2), np.zeros(samples), grid, window)
            for grid, window in ((self.link.grid, self.window), (self.link.local_grid, self.local_window))
        ]
        image = np.tile(np.array([0, 0, 1, 1], np.float32), (samples, 1))
        edges = dict.fromkeys([*GLOBALS, *local_names(local)], image)
        return self._matches(edges, *draws)
