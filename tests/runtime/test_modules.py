"""Quantized modules in a model: what is computed once, what is let go, and that a state dict is the file's content."""

import copy
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive_e4m3 import nearest
from torch import Tensor, nn

from quant_experts.artifacts import LowRankExpert, QuantizedGroup, RoutedExperts, Router
from quant_experts.checkpoint.schema import GroupSpec
from quant_experts.checkpoint.tensors import describe_group, group_state
from quant_experts.config import Scheme
from quant_experts.errors import QuantExpertsError
from quant_experts.kernels.operands import GroupOperands, Prepared
from quant_experts.kernels.reference import round_tokens
from quant_experts.quantizers.grids import dequantize
from quant_experts.quantizers.rtn import quantize_rtn
from quant_experts.runtime import modules
from quant_experts.runtime.modules import QuantizedLinear, install_groups, swap_linears

K, SIZES = 37, {"attn.q": 10, "attn.k": 6, "attn.v": 6}
SCHEMES = ["W4A6", "W3A16g16", "W8A8g16-asym", "W4Afp8"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({name[-1]: nn.Linear(K, n, bias=name != "attn.k") for name, n in SIZES.items()})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([linear(x) for linear in self.attn.values()], dim=-1)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model() -> Attention:
    torch.manual_seed(0)
    return Attention().eval()


def quantized_group(plain: Attention, scheme: Scheme) -> QuantizedGroup:
    weights = tuple(quantize_rtn(plain.get_submodule(name).weight.detach(), scheme) for name in SIZES)
    n = sum(SIZES.values())
    return QuantizedGroup(
        tuple(SIZES),
        weights,
        smooth_scale=normal(K, seed=1).abs() + 0.5,
        shared=LowRankExpert(normal(n, 4, seed=2), normal(4, K, seed=3)),
        routed=RoutedExperts(normal(3, n, 2, seed=4), normal(3, 2, K, seed=5)),
        router=Router(normal(3, K, seed=6).abs(), torch.zeros(3)),
    )


def install(scheme: str = "W4A6") -> tuple[Attention, QuantizedGroup]:
    quantized, parsed = model(), Scheme.parse(scheme)
    group = quantized_group(quantized, parsed)
    install_groups(quantized, [describe_group(group)], parsed, group_state(group))
    return quantized, group


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Prepared]]:
    """One entry a call of a backend's `prepare`: a weak reference to what it returned."""
    calls: list[weakref.ref[Prepared]] = []
    choose = modules.select

    def counting(*choice: Any) -> modules.Backend:
        backend = choose(*choice)

        def prepare(x: Tensor, group: GroupOperands) -> Prepared:
            result = backend.prepare(x, group)
            calls.append(weakref.ref(result))
            return result

        return replace(backend, prepare=prepare)

    monkeypatch.setattr(modules, "select", counting)
    return calls


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_shared_expert_reads_codes_where_there_are_codes(scheme: str) -> None:
    """Weight-only schemes round no activations: there it reads values, whatever the checkpoint says."""
    parsed, quantized = Scheme.parse(scheme), model()
    group = quantized_group(quantized, parsed)
    group.routed = group.router = None
    group.factor_bits, group.shared_reads = 8, "codes"
    install_groups(quantized, [describe_group(group)], parsed, group_state(group))
    z = normal(20, K, seed=8) / group.smooth_scale
    z = round_tokens(z, parsed)
    first = quantized.attn["q"]
    up = torch.cat([linear.operands().shared_up.float() for linear in quantized.attn.values()]).double()
    matrix = torch.cat([dequantize(weight) for weight in group.weights]).double()
    matrix += up @ first.group.operands().shared_down.float().double()
    linears = quantized.attn.values()
    bias = [torch.zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears]
    expected = z.double() @ matrix.T + torch.cat(bias)
    torch.testing.assert_close(quantized(normal(20, K, seed=8)).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_outputs_are_the_formula(scheme: str) -> None:
    """y = Wq q(x/m) + up_s down_s x/m + up_e down_e x/m + bias in float64; integer activations off by half a step, fp8
    ones by a sixteenth, or half the smallest number, of which 448 has 2^18."""
    quantized, group = install(scheme)
    x = normal(20, K, seed=8)
    z = (x / group.smooth_scale).double()
    experts = (z.abs() @ group.router.weight.half().double().T).argmin(dim=1)
    assert len(experts.unique()) > 1
    base = torch.cat([dequantize(weight) for weight in group.weights]).double()
    bias = torch.cat(
        [torch.zeros(n) if name == "attn.k" else model().get_submodule(name).bias for name, n in SIZES.items()]
    )
    shared = z @ group.shared.down.half().double().T @ group.shared.up.half().double().T
    down, up = group.routed.down.half().double(), group.routed.up.half().double()
    routed = torch.stack([up[e] @ (down[e] @ row) for e, row in zip(experts.tolist(), z, strict=True)])
    parsed, largest = Scheme.parse(scheme), z.abs().amax(dim=1, keepdim=True)
    exact, most = z, torch.zeros_like(z)
    if parsed.activation_format == "fp8":
        most = torch.maximum(z.abs() / 16, largest / 448 / 2**10)
        exact = torch.tensor([[nearest(v) for v in row] for row in (z / largest * 448).tolist()]) * largest / 448
    elif not parsed.weight_only:
        step = largest / (2 ** (parsed.activation_bits - 1) - 1)
        most = step / 2
        exact = (z / step).round() * step
    error = (quantized(x).double() - (z @ base.T + shared + routed + bias)).abs()
    assert (error <= most.expand_as(z) @ base.abs().T + 1e-4).all()
    torch.testing.assert_close(quantized(x).double(), exact @ base.T + shared + routed + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_group_is_prepared_once_a_forward_and_let_go(scheme: str, prepared: list[weakref.ref[Prepared]]) -> None:
    quantized, _ = install(scheme)
    x = normal(5, K, seed=8)
    first = quantized(x)
    assert len(prepared) == 1 and prepared[0]() is None
    assert torch.equal(quantized(x), first)
    assert len(prepared) == 2 and prepared[1]() is None
    quantized(x.clone())
    assert len(prepared) == 3


@pytest.mark.parametrize("order", [("k", "q", "v"), ("v", "k", "q")])
def test_any_linear_may_ask_first(order: tuple[str, ...], prepared: list[weakref.ref[Prepared]]) -> None:
    quantized, _ = install()
    x = normal(5, K, seed=8)
    expected = {name: linear(x.clone()) for name, linear in quantized.attn.items()}
    prepared.clear()
    assert all(torch.equal(quantized.attn[name](x), expected[name]) for name in order)
    assert len(prepared) == 1


def test_a_new_tensor_is_prepared_anew(prepared: list[weakref.ref[Prepared]]) -> None:
    quantized, _ = install()
    x, other = normal(5, K, seed=8), normal(5, K, seed=9)
    expected = quantized.attn["k"](other.clone())
    prepared.clear()
    quantized.attn["q"](x)
    assert torch.equal(quantized.attn["k"](other), expected)
    assert len(prepared) == 2
    equal_but_new = quantized.attn["q"](x), quantized.attn["k"](x.clone())
    assert len(prepared) == 4 and equal_but_new[0].shape == (5, 10)


def test_a_tensor_that_was_changed_in_place_is_prepared_anew() -> None:
    quantized, _ = install()
    x = normal(5, K, seed=8)
    expected = quantized.attn["k"](x + 1)
    quantized.attn["q"](x)
    x += 1
    assert torch.equal(quantized.attn["k"](x), expected)


def test_in_inference_mode_a_linear_that_asks_again_sees_what_changed() -> None:
    """Tensors of inference mode count no versions, but a linear that asks a second time is in a new forward."""
    quantized, _ = install()
    with torch.inference_mode():
        buffer, other = normal(5, K, seed=8), normal(5, K, seed=9)
        expected = quantized.attn["q"](other)
        quantized.attn["q"](buffer)
        buffer.copy_(other)
        assert torch.equal(quantized.attn["q"](buffer), expected)


def test_inference_mode_gives_the_same_and_prepares_once(prepared: list[weakref.ref[Prepared]]) -> None:
    quantized, _ = install()
    expected = quantized(normal(5, K, seed=8))
    prepared.clear()
    with torch.inference_mode():
        found = quantized(normal(5, K, seed=8))
    assert torch.equal(found, expected) and len(prepared) == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_forward_that_records_gradients_gives_the_same(scheme: str) -> None:
    quantized, _ = install(scheme)
    x = normal(5, K, seed=8)
    expected = quantized(x)
    with torch.enable_grad():
        assert torch.equal(quantized(x.clone().requires_grad_()).detach(), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_follow_the_inputs_dtype_and_shape(dtype: torch.dtype, scheme: str) -> None:
    quantized, _ = install(scheme)
    flat = normal(12, K, seed=8).to(dtype)
    expected = quantized(flat)
    assert expected.dtype == dtype and expected.shape == (12, 22)
    for shape in ((3, 4), (2, 1, 6), (12, 1)):
        y = quantized(flat.view(*shape, K))
        assert y.dtype == dtype and torch.equal(y, expected.view(*shape, 22))
    assert quantized(flat[0]).shape == (22,)
    strided = flat.repeat(1, 2)[:, :K]
    assert not strided.is_contiguous() and torch.equal(quantized(strided), expected)
    for empty in ((0,), (2, 0), (0, 3)):
        y = quantized(torch.zeros(*empty, K, dtype=dtype))
        assert y.dtype == dtype and y.shape == (*empty, 22)


def test_an_input_of_another_width_is_refused() -> None:
    quantized, _ = install()
    for shape in ((4, K + 1), (4, 2 * K), ()):
        with pytest.raises(
            RuntimeError, match=re.escape(f"The input has the shape {shape}, the layer takes {K} channels")
        ):
            quantized.attn["q"](torch.zeros(shape))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_state_dict_is_what_files_hold(scheme: str) -> None:
    quantized, group = install(scheme)
    biases = {f"{name}.bias": p for name in SIZES if (p := quantized.get_submodule(name).bias) is not None}
    expected = group_state(group) | biases
    state = quantized.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[key].dtype == value.dtype and torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_state_dict_fills_a_new_model(scheme: str) -> None:
    quantized, group = install(scheme)
    fresh = model()
    swapped = swap_linears(fresh, describe_group(group), Scheme.parse(scheme))
    fresh.load_state_dict(quantized.state_dict())
    for name, module in swapped.items():
        module.finalize(name)
        module.finalize(name)  # a second time changes nothing
    x = normal(5, K, seed=8)
    assert torch.equal(fresh(x), quantized(x))
    again = fresh.state_dict()
    assert all(torch.equal(again[key], value) for key, value in quantized.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_state_dict_goes_back_into_its_model(scheme: str) -> None:
    quantized, _ = install(scheme)
    x = normal(5, K, seed=8)
    expected = quantized(x)
    state = {key: value.clone() for key, value in quantized.state_dict().items()}
    other, _ = install(scheme)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)


def test_a_deep_copy_is_whole_and_its_own(prepared: list[weakref.ref[Prepared]]) -> None:
    quantized, _ = install()
    x = normal(5, K, seed=8)
    expected = quantized(x)
    quantized.attn["q"](x)  # leaves a prepared input behind
    copied = copy.deepcopy(quantized)
    groups = {id(linear.group) for linear in copied.attn.values()}
    assert len(groups) == 1 and groups.isdisjoint({id(linear.group) for linear in quantized.attn.values()})
    for buffer in quantized.buffers():
        buffer.zero_()
    prepared.clear()
    assert torch.equal(copied(x.clone()), expected)
    assert len(prepared) == 1


def test_a_forced_backend_gives_the_same_numbers() -> None:
    quantized, _ = install()
    x = normal(50, K, seed=8)
    found = quantized(x)
    quantized.attn["q"].group.backend = "reference"
    torch.testing.assert_close(quantized(x), found, rtol=1e-5, atol=1e-5)
    quantized.attn["q"].group.backend = "abacus"
    with pytest.raises(QuantExpertsError, match="abacus"):
        quantized(x)


def test_a_rotation_that_does_not_divide_the_width_is_refused() -> None:
    quantized, scheme = model(), Scheme.parse("W4A6")
    group = quantized_group(quantized, scheme)
    spec = describe_group(group).model_copy(update=dict(rotation=4096))
    with pytest.raises(QuantExpertsError, match="blocks of 4096"):
        install_groups(quantized, [spec], scheme, group_state(group))


def test_shared_tensors_are_held_once() -> None:
    quantized, _ = install()
    names = [name for name, _ in quantized.named_buffers()]
    assert [n for n in names if n.endswith("shared_down")] == ["attn.q.input_group.shared_down"]
    assert not any(name.endswith("weight_packed") for name in names)


OF_GROUP = [
    f"q.input_group.{leaf}" for leaf in ["smooth_scale", "shared_down", "routed_down", "router_weight", "router_bias"]
]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name", ["attn." + leaf for leaf in ("v.weight_scale", "k.shared_up", "q.routed_up", *OF_GROUP)]
)
def test_tensors_that_are_not_finite_are_named(name: str, value: float) -> None:
    quantized, scheme = model(), Scheme.parse("W4A6")
    group = quantized_group(quantized, scheme)
    state = group_state(group)
    state[name].view(-1)[-1] = value
    with pytest.raises(QuantExpertsError, match=f"'{name}'.*NaN or infinity"):
        install_groups(quantized, [describe_group(group)], scheme, state)


@pytest.mark.parametrize("name", list(SIZES))
def test_a_shape_of_another_model_is_named(name: str) -> None:
    quantized, scheme = model(), Scheme.parse("W4A6")
    group = quantized_group(quantized, scheme)
    state = group_state(group)
    state[f"{name}.weight_shape"] = torch.tensor([K, SIZES[name]], dtype=torch.int32)
    with pytest.raises(QuantExpertsError, match=rf"'{name}\.weight_shape'"):
        install_groups(quantized, [describe_group(group)], scheme, state)


@pytest.mark.parametrize("name", ["attn", "attn.missing", "nowhere"])
def test_what_is_no_linear_of_the_model_is_named(name: str) -> None:
    spec = GroupSpec(linears=("attn.q", name))
    with pytest.raises(QuantExpertsError, match=f"'{name}'"):
        swap_linears(model(), spec, Scheme.parse("W4A6"))


def test_a_linear_before_finalize_says_so() -> None:
    fresh = model()
    group = quantized_group(fresh, Scheme.parse("W4A6"))
    swapped = swap_linears(fresh, describe_group(group), Scheme.parse("W4A6"))
    assert all(isinstance(module, QuantizedLinear) for module in swapped.values()) and list(swapped) == list(SIZES)
    with pytest.raises(AssertionError, match="finalize"):
        fresh(torch.zeros(1, K))
