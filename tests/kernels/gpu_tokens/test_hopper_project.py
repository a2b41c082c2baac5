"""Tiles and slices of Hopper's projection of values."""

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("factor_rows", "router_rows"),
    [
        (288, 32),
        (256, 32),
        (576, 32),
        (544, 64),
        (1152, 32),
        (992, 128),
        (32, 0),
        (64, 0),
        (9 * 256, 32),
        (31 * 256, 128),
    ],
)
def test_tiles_of_a_projection(factor_rows: int, router_rows: int) -> None:
    """Programs side by side own each row once, and no row of the other kind; rings and registers fit the chip."""
    from quant_experts.kernels.gpu_tokens import hopper_project

    tiles = hopper_project.tiles(factor_rows, router_rows)
    assert tiles and len({tile.CHUNKS.value for tile in tiles}) == len(tiles)
    for tile in tiles:
        owned = []
        for chunk in range(tile.CHUNKS.value):
            pieces = zip(tile.PIECES.value, tile.FIRST.value, tile.STRIDE.value, tile.END.value, strict=True)
            for p, (rows, first, stride, end) in enumerate(pieces):
                row = chunk * stride + first
                owned += range(row, min(row + rows, end))
                of_router = router_rows > 0 and p == tile.COUNT.value - 1
                assert end == (factor_rows + router_rows if of_router else factor_rows)
                assert rows & (rows - 1) == 0 and 16 <= rows <= 256 and (row >= factor_rows or not of_router)
        assert sorted(owned) == list(range(factor_rows + router_rows))
        assert tile.COUNT.value <= 3 and tile.STAGES.value >= 3
        assert tile.STAGES.value * (128 + tile.ROWS.value) * 128 <= hopper_project.RING_BYTES
        assert 12 * 32 * tile.LAUNCH_REGISTERS.value <= 65536
    for m in (17, 500, 9000, 100_000):
        chosen, slices = hopper_project.cut(factor_rows, router_rows, m, 56, 132, m > 512)
        assert chosen in tiles and 1 <= slices <= 20
    assert hopper_project.cut(factor_rows, router_rows, 40, 2, 132, False)[1] <= 2


@pytest.mark.parametrize(
    ("tokens", "channels", "sorts", "expected"),
    [  # rows of a program and slices of the channels
        (128, 3584, False, (80, 14)),
        (256, 18944, False, (112, 18)),
        (512, 18944, False, (112, 9)),
        (1024, 18944, True, (160, 8)),
        (2048, 3584, True, (160, 4)),
    ],
)
def test_how_a_projection_is_cut(tokens: int, channels: int, sorts: bool, expected: tuple[int, int]) -> None:
    """Of nine factors of rank 32 and the router of eight experts, as times on an H200 had it."""
    from quant_experts.kernels.gpu_tokens import hopper_project

    tile, slices = hopper_project.cut(288, 32, tokens, channels // 64, 132, sorts)
    assert (tile.ROWS.value, slices) == expected
