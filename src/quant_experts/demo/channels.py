"""Gives the trained model the uneven channels that large language models have, without changing what it computes.

A model trained for minutes has channels of nearly equal size, and plain rounding then costs it next to nothing. In
large models a few channels are many times larger than the rest, which is what makes them hard to quantize. The size of
a channel between a normalisation and the linears that read it, between `up` and `down`, and between `v` and `o` is
free: multiplying on one side and dividing on the other leaves the function as it is. Factors are powers of two, so not
a bit of any logit changes.
"""

from typing import Any

import torch
from torch import Tensor


def spread_channels(model: Any, spread: float, seed: int = 0) -> None:
    """Rescale the channels of every decoder block of one of the demo's models, in place.

    Factors are 2^round(t), t from a Laplace distribution of scale ``spread``: most channels keep their size, a few in a
    hundred become several times larger. The same call with ``-spread`` undoes it, bit by bit.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    for block in model.model.language_model.layers:
        attention, mlp = block.self_attn, block.mlp
        with torch.no_grad():
            readers = [attention.q_proj, attention.k_proj, attention.v_proj]
            _move(block.input_layernorm.weight, readers, _factors(config.hidden_size, spread, generator))
            readers = [mlp.gate_proj, mlp.up_proj]
            _move(block.post_attention_layernorm.weight, readers, _factors(config.hidden_size, spread, generator))
            _move(mlp.up_proj.weight, [mlp.down_proj], _factors(config.intermediate_size, spread, generator))
            values = _factors(len(attention.v_proj.weight), spread, generator)
            _move(attention.v_proj.weight, [], values)
            bias = attention.v_proj.bias
            bias.mul_(values.to(bias.device))
            # Query heads of one group read the same values.
            outputs = values.view(kv_heads, 1, -1).expand(kv_heads, heads // kv_heads, -1).flatten()
            attention.o_proj.weight.div_(outputs.to(bias.device))


def _factors(count: int, spread: float, generator: torch.Generator) -> Tensor:
    """(count,) powers of two."""
    uniform = torch.rand(count, generator=generator, dtype=torch.float64) - 0.5
    laplace = -spread * uniform.sign() * torch.log1p(-2 * uniform.abs())
    return torch.exp2(laplace.round()).float()


def _move(source: Tensor, readers: list[Any], factors: Tensor) -> None:
    """Multiply the rows of ``source`` (N, ...) by factors (N,), and divide the columns of what reads it."""
    factors = factors.to(source.device)
    source.mul_(factors if source.ndim == 1 else factors[:, None])
    for reader in readers:
        reader.weight.div_(factors)
