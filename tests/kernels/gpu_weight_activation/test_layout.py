"""How weights are laid out for a GPU: what kernels then compute is in `cases`."""

import pytest
import torch

from quant_experts.errors import QuantExpertsError
from quant_experts.kernels.gpu_weight_activation.layout import MAX_CHANNELS, pack_linear
from quant_experts.kernels.operands import LinearOperands


def test_more_channels_than_sums_hold_are_refused() -> None:
    assert 16 * 8 * 127 * MAX_CHANNELS < 2**31 <= 16 * 8 * 127 * (MAX_CHANNELS + 1)
    codes = torch.zeros(1, MAX_CHANNELS + 1, dtype=torch.int8)
    with pytest.raises(QuantExpertsError, match=f"up to {MAX_CHANNELS} .*reference"):
        pack_linear([LinearOperands(codes, torch.ones(1, 1), None, None, None, None, None)])
