"""A layer of several quantized linears: loads as vLLM loads, gives what the linears give, names what is wrong."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from runtime.test_modules import SCHEMES, SIZES, Attention, K, model, normal, quantized_group
from torch import Tensor, nn

from quant_experts.artifacts import QuantizedGroup
from quant_experts.checkpoint.tensors import describe_group, group_state
from quant_experts.config import Scheme
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.modules import InputGroup, install_groups
from quant_experts.runtime.vllm.fused import FusedLinears
from quant_experts.runtime.vllm.plan import Part

SHARDS = dict(zip(SIZES, "qkv", strict=True))
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def alone(group: QuantizedGroup, place: int) -> QuantizedGroup:
    """One linear of the group as a group of its own."""
    n = list(SIZES.values())
    rows = slice(sum(n[:place]), sum(n[: place + 1]))
    return replace(
        group,
        linears=(group.linears[place],),
        weights=(group.weights[place],),
        shared=replace(group.shared, up=group.shared.up[rows]),
        routed=replace(group.routed, up=group.routed.up[:, rows]),
    )


def reordered(group: QuantizedGroup) -> QuantizedGroup:
    """The same linears in another order than the layer's outputs."""
    parts = [alone(group, place) for place in (2, 0, 1)]
    return replace(
        group,
        linears=tuple(part.linears[0] for part in parts),
        weights=tuple(part.weights[0] for part in parts),
        shared=replace(group.shared, up=torch.cat([part.shared.up for part in parts])),
        routed=replace(group.routed, up=torch.cat([part.routed.up for part in parts], dim=1)),
    )


KINDS = {
    "one group": lambda group: [group],
    "a group a linear": lambda group: [alone(group, place) for place in range(3)],
    "another order": lambda group: [reordered(group)],
}


def checkpoint(scheme: str, kind: str = "one group") -> tuple[Attention, list[QuantizedGroup], State, FusedLinears]:
    """(the model as it runs in transformers, its groups, tensors of the files, an empty layer)"""
    quantized, parsed = model(), Scheme.parse(scheme)
    groups = KINDS[kind](quantized_group(quantized, parsed))
    state = {name: tensor for group in groups for name, tensor in group_state(group).items()}
    install_groups(quantized, [describe_group(group) for group in groups], parsed, state)
    specs = {name: describe_group(group) for group in groups for name in group.linears}
    parts = [Part(name, specs[name], guarded=name == "attn.q") for name in SIZES]
    return quantized, groups, state, FusedLinears(parts, parsed, list(SIZES.values()), K)


def bias_of(quantized: Attention) -> Tensor:
    linears = quantized.attn.values()
    return torch.cat([torch.zeros(x.out_features) if x.bias is None else x.bias for x in linears])


def deliver(layer: nn.Module, state: State) -> None:
    """As vLLM's models do: to the parameter of that name of the layer, with the linear's shard."""
    parameters = dict(layer.named_parameters())
    for name, tensor in state.items():
        linear = name[: len("attn.q")]
        parameter: Any = parameters[name.removeprefix(f"{linear}.")]
        parameter.weight_loader(parameter, tensor, SHARDS[linear])


def loaded(fused: FusedLinears, state: State, bias: Tensor | None = None) -> FusedLinears:
    layer = nn.Module()
    fused.add_inlets(layer)
    deliver(layer, state)
    fused.remove_inlets(layer)
    assert not list(layer.named_modules())[1:] and not list(layer.parameters())
    fused.finalize(bias, torch.float32)
    return fused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layer_gives_what_the_linears_give(scheme: str, kind: str) -> None:
    quantized, _, state, fused = checkpoint(scheme, kind)
    loaded(fused, state, bias_of(quantized))
    for x in (normal(7, K, seed=8), normal(1, K, seed=9).bfloat16(), normal(6, K, seed=10).view(2, 3, K)):
        assert torch.equal(fused(x), quantized(x)) and fused(x).dtype == x.dtype


def test_a_bias_that_the_caller_adds_is_left_to_it() -> None:
    quantized, _, state, fused = checkpoint("W4A6")
    x = normal(7, K, seed=8)
    torch.testing.assert_close(loaded(fused, state)(x) + bias_of(quantized), quantized(x))


def test_a_single_linear_is_all_pieces_of_its_layer() -> None:
    """A qkv that is one linear in files."""
    quantized, groups, state, _ = checkpoint("W4A6", "a group a linear")
    spec, n = describe_group(groups[0]), SIZES["attn.q"]
    fused = FusedLinears([Part("attn.q", spec)], Scheme.parse("W4A6"), [n - 4, 2, 2], K)
    layer = nn.Module()
    fused.add_inlets(layer)
    for name, parameter in layer.named_parameters():
        parameter.weight_loader(parameter, state[f"attn.q.{name}"])
    fused.finalize(None, torch.float32)
    quantized.attn["q"].bias = None
    x = normal(7, K, seed=8)
    assert torch.equal(fused(x), quantized.attn["q"](x))


def test_weights_are_laid_out_once_all_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.device, torch.dtype]] = []
    monkeypatch.setattr(InputGroup, "lay_out", lambda group, *where: seen.append(where))
    _, _, state, fused = checkpoint("W4A6", "a group a linear")
    loaded(fused, state)
    assert seen == [(torch.device("cpu"), torch.float32)] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_missing_is_named(kind: str) -> None:
    _, _, state, _ = checkpoint("W8A8g16-asym", kind)
    for name in state:
        fused = checkpoint("W8A8g16-asym", kind)[-1]
        with pytest.raises(QuantExpertsError, match=rf"'{name}' is missing"):
            loaded(fused, {key: value for key, value in state.items() if key != name})


def test_a_tensor_that_does_not_fit_is_named() -> None:
    _, _, state, fused = checkpoint("W4A6")
    layer = nn.Module()
    fused.add_inlets(layer)
    for wrong in (state["attn.k.weight_packed"][:-1], state["attn.k.weight_packed"].long()):
        with pytest.raises(QuantExpertsError, match=r"'attn\.k\.weight_packed' comes as"):
            deliver(layer, {"attn.k.weight_packed": wrong})
    with pytest.raises(QuantExpertsError, match=r"'attn\.k\.input_group\.smooth_scale' is not one"):
        deliver(layer, {"attn.k.input_group.smooth_scale": state["attn.q.input_group.smooth_scale"]})


def test_damaged_tensors_are_named() -> None:
    _, _, state, fused = checkpoint("W4A6")
    state["attn.v.weight_scale"][0] = torch.nan
    with pytest.raises(QuantExpertsError, match=r"'attn\.v\.weight_scale' holds NaN"):
        loaded(fused, state)


def test_the_guard_is_let_in_and_a_weight_is_not() -> None:
    _, _, state, fused = checkpoint("W4A6")
    loaded(fused, state | {"attn.q.weight": torch.zeros(0)})
    fused = checkpoint("W4A6")[-1]
    with pytest.raises(QuantExpertsError, match=r"'attn\.q\.weight' is in full precision"):
        loaded(fused, {"attn.q.weight": torch.zeros(10, K)})


def in_two_layers(scheme: str, first: tuple[str, ...]) -> tuple[Attention, State, list[tuple[nn.Module, FusedLinears]]]:
    """One group whose linears are in two layers. -> as it runs in transformers, tensors, layers with inlets."""
    quantized, groups, state, _ = checkpoint(scheme)
    spec, spread, layers = describe_group(groups[0]), dict[Any, Any](), []
    for names in (first, tuple(name for name in SIZES if name not in first)):
        parts = [Part(name, spec) for name in names]
        fused = FusedLinears(parts, Scheme.parse(scheme), [SIZES[name] for name in names], K, spread)
        layers.append((nn.Module(), fused))
        fused.add_inlets(layers[-1][0])
    return quantized, state, layers


def deliver_to(layers: list[tuple[nn.Module, FusedLinears]], state: State) -> None:
    for name, tensor in state.items():
        linear = name[: len("attn.q")]
        layer, fused = next(pair for pair in layers if linear in pair[1].names)
        parameter: Any = layer.get_parameter(name.removeprefix(f"{linear}."))
        parameter.weight_loader(parameter, tensor, fused.names.index(linear))


@pytest.mark.parametrize("first", [("attn.q", "attn.k"), ("attn.v",), ("attn.q",)])
@pytest.mark.parametrize("scheme", ["W4A6", "W3A16"])
def test_a_group_in_two_layers(scheme: str, first: tuple[str, ...]) -> None:
    """Both have what its linears share, whichever comes first."""
    quantized, state, layers = in_two_layers(scheme, first)
    deliver_to(layers, state)
    x, outputs = normal(7, K, seed=8), {}
    for layer, fused in layers:
        fused.remove_inlets(layer)
        fused.finalize(None, torch.float32)
        outputs |= dict(zip(fused.names, fused(x).split([SIZES[name] for name in fused.names], -1), strict=True))
    y = torch.cat([outputs[name] for name in SIZES], -1)
    torch.testing.assert_close(y + bias_of(quantized), quantized(x))
    _, _, others = in_two_layers(scheme, first)
    deliver_to(others, {name: tensor for name, tensor in state.items() if "shared_down" not in name})
    for _, fused in others:
        with pytest.raises(QuantExpertsError, match=r"'attn\.q\.input_group\.shared_down' is missing"):
            fused.finalize(None, torch.float32)


def test_a_linear_of_several_pieces() -> None:
    """As the projections of linear attention in Qwen3.5: q, k and v are one linear in files, z another."""
    quantized, groups, state, _ = checkpoint("W4A6")
    spec, (q, k, v) = describe_group(groups[0]), SIZES.values()
    parts = [Part(name, spec, rows=n) for name, n in SIZES.items()]
    fused, layer = FusedLinears(parts, Scheme.parse("W4A6"), [q - 5, 3, 2, k, v - 1, 1], K), nn.Module()
    fused.add_inlets(layer)
    shards: dict[str, Any] = {"attn.q": (0, 1, 2), "attn.k": 3, "attn.v": (4, 5)}
    for name, tensor in state.items():
        linear = name[: len("attn.q")]
        parameter: Any = layer.get_parameter(name.removeprefix(f"{linear}."))
        parameter.weight_loader(parameter, tensor, shards[linear])
    with pytest.raises(QuantExpertsError, match=r"into piece \(2, 3\)"):
        fused.load("weight_scale", state["attn.k.weight_scale"], (2, 3))
    fused.finalize(bias_of(quantized), torch.float32)
    x = normal(7, K, seed=8)
    assert torch.equal(fused(x), quantized(x))
    for pieces in ([q + k + v], [q - 5, 5, k, v - 1], [q + 1, k - 1, v - 1, 1]):
        with pytest.raises(QuantExpertsError, match=rf"one layer of {len(pieces)} pieces"):
            FusedLinears(parts, Scheme.parse("W4A6"), pieces, K)


def test_nothing_is_loaded_once_all_is() -> None:
    _, _, state, fused = checkpoint("W4A6")
    loaded(fused, state)
    for again in (
        lambda: fused.load("weight_scale", state["attn.q.weight_scale"], "q"),
        lambda: fused.finalize(None, torch.float32),
    ):
        with pytest.raises(QuantExpertsError, match="loaded once: start vLLM again"):
            again()


def test_pieces_that_are_no_linears_are_refused() -> None:
    _, groups, _, fused = checkpoint("W4A6")
    parts = [Part(name, describe_group(groups[0])) for name in SIZES]
    with pytest.raises(QuantExpertsError, match=r"in one layer of 4 pieces"):
        FusedLinears(parts, Scheme.parse("W4A6"), [10, 6, 3, 3], K)
    for shard in (None, 3, (0, 1), "x", "qk"):
        with pytest.raises(QuantExpertsError, match=r"into piece .* not supported"):
            fused.load("weight_scale", torch.zeros(10, 1), shard)
