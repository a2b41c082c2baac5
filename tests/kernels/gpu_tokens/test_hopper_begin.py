"""How a few tokens of experts that read values are cut over programs of Hopper GPUs."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize("tokens", [1, 8, 16])
@pytest.mark.parametrize("blocks", [1, 12, 28, 32, 64, 65, 148, 231, 256])
def test_slices_hold_each_block_once(tokens: int, blocks: int) -> None:
    """No slice is empty, and weights that a thread asks for leave it half of its registers."""
    from quant_experts.kernels.gpu_tokens import hopper_begin

    tile = hopper_begin.tile(tokens, blocks)
    each = tile.warps * tile.ahead
    assert (tile.slices - 1) * each < blocks <= tile.slices * each
    assert tile.ahead * 32 <= 128


@pytest.mark.parametrize(
    ("tokens", "channels", "dtype", "expected"),
    [
        (16, 3584, torch.bfloat16, True),
        (17, 3584, torch.bfloat16, False),
        (0, 3584, torch.bfloat16, False),
        (16, 32769, torch.bfloat16, False),
        (16, 3584, torch.float16, False),
    ],
)
def test_which_tokens_it_takes(tokens: int, channels: int, dtype: torch.dtype, expected: bool) -> None:
    from quant_experts.kernels.gpu_tokens import hopper_begin
    from quant_experts.kernels.gpu_tokens.layout import GroupLayout

    rows = torch.empty(-(-channels // 128), 64, 128, dtype=torch.bfloat16, device="meta")
    layout = GroupLayout(8, "int", 0, None, None, None, rows, 64, None, 1, 0, 1.0)
    assert hopper_begin.takes(torch.empty(tokens, channels, dtype=dtype, device="meta"), layout) == expected
    codes = GroupLayout(8, "int", 0, None, None, None, rows.to(torch.int8), 64, None, 1, 0, 1.0, rows[0, 0])
    assert not hopper_begin.takes(torch.empty(tokens, channels, dtype=dtype, device="meta"), codes)
