"""Estimates of tiles, of both kinds of kernels."""

from importlib import import_module

import pytest

from quant_experts.kernels.gpu.hopper_tiles import TileTimes

pytest.importorskip("triton")
KERNELS = ("gpu_weight_activation", "gpu_weight_only")


def times_of(kernels: str) -> TileTimes:
    found = import_module(f"quant_experts.kernels.{kernels}.hopper_launch").TIMES
    assert isinstance(found, TileTimes)
    return found


@pytest.mark.parametrize("kernels", KERNELS)
def test_an_estimate_grows_with_the_work(kernels: str) -> None:
    """More tokens, rows and channels, or fewer multiprocessors, never take less time in the same tiles."""
    times = times_of(kernels)
    for tile in times.choices(512, 3584, 132):
        time = times.estimated(tile, 512, 3584, 28, 132)
        assert 0 < time <= times.estimated(tile, 512, 3584, 29, 132)
        assert time <= times.estimated(tile, 2048, 3584 * 4, 28, 132)
        assert time <= times.estimated(tile, 512, 3584, 28, 66)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("m", [1, 9, 16, 17, 31, 33, 100, 5000])
def test_tiles_have_less_than_twice_the_tokens(kernels: str, m: int) -> None:
    times = times_of(kernels)
    least = min(tokens for _, tokens in times.steps)
    found = times.choices(m, 3584, 132)
    assert found and all(tile.tokens == least or tile.tokens < 2 * m for tile in found)
    assert times.best(m, 3584, 28, 132) in found


def test_tiles_are_shared_where_they_are_fewer_than_multiprocessors() -> None:
    times = TileTimes({(128, 64): 1.0}, 1.0, 1.1, 3.0, 0.5, 2.0, 1.5)
    assert [tile.shared for tile in times.choices(64, 128 * 131, 132)] == [False, True]
    assert [tile.shared for tile in times.choices(64, 128 * 132, 132)] == [False]
    assert times.best(64, 128, 100, 132).shared and not times.best(64, 128 * 100, 4, 132).shared
