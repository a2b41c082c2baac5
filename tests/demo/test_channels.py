"""Uneven channels change no logit, by a bit."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from quant_experts.demo.architecture import ARCHITECTURES, build_model, build_tokenizer
from quant_experts.demo.channels import spread_channels


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    """Two blocks with four query heads to two key heads, biases drawn: a fresh model's are zero."""
    built: Any = build_model(
        build_tokenizer(request.param),
        0,
        request.param,
        hidden_size=256,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    for name, parameter in built.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return built.eval()


@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0])
def test_the_function_is_the_same(model: Any, spread: float) -> None:
    uneven = deepcopy(model)
    spread_channels(uneven, spread, seed=3)
    ids = torch.randint(0, 200, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(uneven(input_ids=ids).logits, model(input_ids=ids).logits)
    changed = {
        name.rpartition(".layers.")[2].partition(".")[2]
        for name, value in uneven.named_parameters()
        if not torch.equal(value, model.get_parameter(name))
    }
    linears = {f"self_attn.{x}_proj.weight" for x in "qkvo"} | {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert changed == (linears | norms | {"self_attn.v_proj.bias"} if spread else set())


def test_factors_are_powers_of_two_and_repeat(model: Any) -> None:
    first, second, other = (deepcopy(model) for _ in range(3))
    for uneven, seed in ((first, 1), (second, 1), (other, 2)):
        spread_channels(uneven, 1.0, seed)
    name = "model.language_model.layers.1.input_layernorm.weight"
    gains = first.get_parameter(name) / model.get_parameter(name)
    assert torch.equal(gains.log2(), gains.log2().round()) and gains.unique().numel() > 2
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_the_negative_spread_undoes_it(model: Any) -> None:
    uneven = deepcopy(model)
    spread_channels(uneven, 0.7, seed=5)
    spread_channels(uneven, -0.7, seed=5)
    for name, value in uneven.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name
