"""Which tile a persistent Hopper kernel takes for a shape: an estimate of microseconds, fitted to measured ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Tile(NamedTuple):
    """How a product is cut."""

    rows: int
    tokens: int
    shared: bool
    """Whether tiles that are fewer than multiprocessors are cut into shares, so that each has some; the last of more
    tiles are always."""


@dataclass(frozen=True)
class TileTimes:
    """Of a kernel's tiles on an H200 (`benchmarks/kernels/gpu_tiles.py`), in microseconds."""

    steps: dict[tuple[int, int], float]
    """Of a step of 128 channels, by rows and tokens of a tile"""
    finishing: float
    """Of finishing a tile"""
    longer: float
    """Where fewer tiles than multiprocessors are shared: how many times as long steps take,"""
    sharing: float
    """what that costs once,"""
    adding: float
    """and for adding up 8,192 sums of a share."""
    last: float
    """Where tiles are more, what sharing the last ones costs once,"""
    last_adding: float
    """and for each 8,192 sums of a tile."""

    def choices(self, m: int, n: int, count: int) -> list[Tile]:
        """Tiles for m tokens, n rows and so many multiprocessors: none with twice the tokens that are needed."""
        least = min(tokens for _, tokens in self.steps)
        return [
            Tile(rows, tokens, shared)
            for rows, tokens in self.steps
            if tokens < 2 * max(m, least)
            for shared in (False, True)
            if not shared or -(-n // rows) * -(-m // tokens) < count
        ]

    def estimated(self, tile: Tile, m: int, n: int, steps: int, count: int) -> float:
        """Of a product of so many steps, but for what is the same for all tiles."""
        rows, tokens, shared = tile
        tiles, time, sums = -(-n // rows) * -(-m // tokens), steps * self.steps[rows, tokens], rows * tokens / 8192
        if tiles >= count:
            return tiles / count * (time + self.finishing) + self.last + self.last_adding * sums
        if not shared:
            return time + self.finishing
        return self.longer * tiles / count * time + self.adding * count / tiles * sums + self.sharing

    def best(self, m: int, n: int, steps: int, count: int) -> Tile:
        """The tile that is estimated to be fastest."""
        return min(self.choices(m, n, count), key=lambda tile: self.estimated(tile, m, n, steps, count))
