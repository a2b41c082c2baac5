"""The table of backends, and what every row of it must keep: the formula of the format, in float64, token by token.

Tolerance: an output may differ by `TOLERANCE` of the sum of its terms' magnitudes (float32 epilogues over short sums).
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from naive_e4m3 import nearest

from quant_experts.errors import QuantExpertsError
from quant_experts.kernels import dispatch
from quant_experts.kernels.dispatch import BACKENDS, Backend, select
from quant_experts.kernels.gpu_weight_activation import backend as triton_backend
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands

TOLERANCE = 1e-5
SMALLEST = 2.0**-100  # a token without a larger magnitude counts as zero
Bits = int | Literal["fp8"]
CPU_BACKENDS = [b for b in BACKENDS if b.device in ("cpu", "any")]


class Layer:
    """Random operands of one linear and its group.

    parts: any of smooth, rotated, shared, routed, bias, asymmetric, int8."""

    def __init__(
        self,
        k: int,
        n: int,
        bits: Bits,
        parts: str = "",
        group_size: int | None = None,
        experts: int = 4,
        seed: int = 0,
    ):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        def chosen(part: str, tensor: torch.Tensor) -> torch.Tensor | None:
            return tensor if part in parts.split() else None

        def factor(part: str, *shape: int) -> Factor | None:
            if part not in parts.split():
                return None
            if "int8" in parts.split():
                codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
                return Factor(codes, normal(*shape[:-1]).abs() / 100)
            return Factor(normal(*shape).half(), None)

        groups = -(-k // (group_size or k))
        codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
        zero = torch.randint(-8, 8, (n, groups), generator=generator, dtype=torch.int8)
        self.group = GroupOperands(
            8 if bits == "fp8" else bits,
            chosen("smooth", normal(k).abs() + 0.5),
            k & -k if "rotated" in parts.split() else 0,
            factor("shared", 5, k),
            factor("routed", experts, 3, k),
            chosen("routed", normal(experts, k).half()),
            chosen("routed", normal(experts).half()),
            activation_format="fp8" if bits == "fp8" else "int",
        )
        self.linear = LinearOperands(
            codes,
            normal(n, groups).abs() * 0.1 + 0.01,
            chosen("asymmetric", zero),
            group_size,
            factor("shared", n, 5),
            factor("routed", experts, n, 3),
            chosen("bias", normal(n)),
        )

    def __call__(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        y = backend.linear(backend.prepare(x, self.group), self.linear)
        assert y.dtype == torch.float32 and y.shape == (len(x), len(self.linear.codes))
        return y

    def expected(self, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """y = s_x s_w q(x/m) (Wq - zero)^T + up_s (down_s x/m) + up_e (down_e x/m) + bias -> value, magnitude."""
        rows = [self._token(row) for row in x.float().numpy()]
        return np.array([r[0] for r in rows]), np.array([r[1] for r in rows])

    def _token(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        def exact(t: torch.Tensor | Factor) -> np.ndarray:
            if isinstance(t, Factor):
                return exact(t.values) * (1 if t.scale is None else exact(t.scale)[..., None])
            return t.double().numpy()

        group, linear = self.group, self.linear
        z = x if group.smooth_scale is None else x / group.smooth_scale.numpy()  # float32, as the format says
        if block := group.rotation:
            signs = [[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)]
            z = (z.astype(np.float64).reshape(-1, block) @ signs / block**0.5).reshape(-1).astype(np.float32)
        left = z.astype(np.float64)
        if group.activation_bits < 16:
            largest = 448 if group.activation_format == "fp8" else 2 ** (group.activation_bits - 1) - 1
            scale = np.float32(np.abs(z).max()) / np.float32(largest)
            steps = z * (np.float32(1) / scale) if np.abs(z).max() >= SMALLEST else z * 0
            codes = np.rint(steps)
            if group.activation_format == "fp8":
                codes = np.array([nearest(float(step)) for step in steps])
            left = codes.astype(np.float64) * np.float64(scale)
        weight = exact(linear.codes)
        size = linear.group_size or weight.shape[1]
        for c in range(weight.shape[1]):
            zero = 0.0 if linear.zero_point is None else exact(linear.zero_point)[:, c // size]
            weight[:, c] = (weight[:, c] - zero) * exact(linear.scale)[:, c // size]
        terms = [(weight, left)]
        exact_z = z.astype(np.float64)
        if linear.shared_up is not None:
            terms.append((exact(linear.shared_up) @ exact(group.shared_down), exact_z))
        if linear.routed_up is not None:
            expert = int(np.argmin(exact(group.router_weight) @ np.abs(exact_z) + exact(group.router_bias)))
            terms.append((exact(linear.routed_up[expert]) @ exact(group.routed_down[expert]), exact_z))
        value, size_ = sum(m @ v for m, v in terms), sum(np.abs(m) @ np.abs(v) for m, v in terms)
        if linear.bias is not None:
            value, size_ = value + exact(linear.bias), size_ + np.abs(exact(linear.bias))
        return value, size_

    def check(self, backend: Backend, x: torch.Tensor) -> torch.Tensor:
        y, (value, size) = self(backend, x), self.expected(x)
        assert (np.abs(y.double().numpy() - value) <= TOLERANCE * size + 1e-35).all()
        return y


def tokens(rows: int, columns: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def backends(*bits: Bits) -> list:
    """Each backend that runs on a CPU with each activation width or format that it takes."""
    kinds = {a: "fp8" if a == "fp8" else "values" if a == 16 else "integer" for a in bits}
    pairs = [(b, a) for b in CPU_BACKENDS for a in bits if kinds[a] in b.activations]
    return [pytest.param(b, a, id=f"{b.name}-A{a}") for b, a in pairs]


ALL = "smooth shared routed bias asymmetric"
PARTS = ["", "bias", "asymmetric", "smooth shared", "routed", "smooth shared routed bias", ALL]


@pytest.mark.parametrize(("backend", "bits"), backends(4, 6, 8, 16, "fp8"))
@pytest.mark.parametrize("parts", ["rotated", "smooth rotated", "shared routed int8", "rotated int8 " + ALL])
@pytest.mark.parametrize("k", [16, 48, 128])
def test_rotation_and_int8_factors(backend: Backend, bits: Bits, k: int, parts: str) -> None:
    Layer(k, 11, bits, parts).check(backend, tokens(13, k))


@pytest.mark.parametrize(("backend", "bits"), backends(4, 6, 8, 16, "fp8"))
@pytest.mark.parametrize("group_size", [None, 16, 44, 64])
@pytest.mark.parametrize("parts", PARTS)
def test_equals_the_formula(backend: Backend, bits: Bits, group_size: int | None, parts: str) -> None:
    Layer(45, 11, bits, parts, group_size).check(backend, tokens(13, 45))


@pytest.mark.parametrize(("backend", "bits"), backends(6, 16, "fp8"))
@pytest.mark.parametrize("size", [(1, 45, 11), (1, 1, 1), (3, 1, 2), (2, 300, 1), (1, 129, 65)])
def test_odd_sizes(backend: Backend, bits: Bits, size: tuple[int, int, int]) -> None:
    rows, k, n = size
    for group_size in (None, 32):
        Layer(k, n, bits, ALL, group_size).check(backend, tokens(rows, k))


@pytest.mark.parametrize(("backend", "bits"), backends(8, 16, "fp8"))
def test_no_tokens(backend: Backend, bits: Bits) -> None:
    assert Layer(45, 11, bits, ALL, 16)(backend, torch.zeros(0, 45)).shape == (0, 11)


@pytest.mark.parametrize(("backend", "bits"), backends(6, 16, "fp8"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_float_input_is_read_and_left_alone(backend: Backend, bits: Bits, dtype: torch.dtype) -> None:
    layer, x = Layer(45, 11, bits, ALL), tokens(9, 45).to(dtype)
    before = x.clone()
    prepared = backend.prepare(x, layer.group)
    first, second = backend.linear(prepared, layer.linear), backend.linear(prepared, layer.linear)
    assert torch.equal(x, before)
    assert torch.equal(first, second)
    layer.check(backend, x)


@pytest.mark.parametrize(("backend", "bits"), backends(6, 16, "fp8"))
def test_inputs_and_biases_that_require_grad_are_served(backend: Backend, bits: Bits) -> None:
    """A loaded model called without `torch.no_grad()`: embeddings, norms and biases require grad."""
    layer, x = Layer(45, 11, bits, ALL), tokens(9, 45)
    expected = layer(backend, x)
    layer.linear = replace(layer.linear, bias=torch.nn.Parameter(layer.linear.bias))
    assert torch.equal(layer(backend, x.requires_grad_()).detach(), expected)


@pytest.mark.parametrize(("backend", "bits"), backends(6, 16, "fp8"))
def test_autocast_changes_nothing(backend: Backend, bits: Bits) -> None:
    layer, x = Layer(45, 11, bits, ALL), tokens(9, 45)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.check(backend, x)


@pytest.mark.parametrize(("backend", "bits"), backends(6, 16, "fp8"))
@pytest.mark.parametrize("only", [0, 1, 3])
def test_all_tokens_to_one_expert(backend: Backend, bits: Bits, only: int) -> None:
    layer, x = Layer(45, 11, bits, "shared routed"), tokens(9, 45)
    bias = torch.full((4,), 1000.0).half()
    bias[only] = -1000
    layer.group = replace(layer.group, router_bias=bias)
    assert set(backend.prepare(x, layer.group).expert.tolist()) == {only}
    layer.check(backend, x)


@pytest.mark.parametrize(("backend", "bits"), backends(6, 16, "fp8"))
def test_an_expert_without_tokens(backend: Backend, bits: Bits) -> None:
    layer, x = Layer(45, 11, bits, "routed", experts=5), tokens(30, 45)
    bias = layer.group.router_bias.clone()
    bias[[0, 2]] = 1000
    layer.group = replace(layer.group, router_bias=bias)
    assert set(backend.prepare(x, layer.group).expert.tolist()) == {1, 3, 4}
    layer.check(backend, x)


@pytest.mark.parametrize(("backend", "bits"), backends(6, 16, "fp8"))
def test_ties_go_to_the_first_expert(backend: Backend, bits: Bits) -> None:
    layer, x = Layer(45, 11, bits, "routed"), tokens(9, 45)
    bias = torch.tensor([1.0, 0, 0, 0]).half()
    layer.group = replace(layer.group, router_weight=torch.ones(4, 45).half(), router_bias=bias)
    assert backend.prepare(x, layer.group).expert.tolist() == [1] * 9


@pytest.mark.parametrize(("backend", "bits"), backends(8, 16, "fp8"))
def test_rows_keep_their_order(backend: Backend, bits: Bits) -> None:
    layer, x = Layer(45, 11, bits, ALL), tokens(40, 45)
    y = layer(backend, x)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(backend, x[order]), y[order], rtol=1e-4, atol=1e-4)
    one_by_one = torch.cat([layer(backend, row[None]) for row in x])
    torch.testing.assert_close(y, one_by_one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "bits"), backends(6, 16, "fp8"))
@pytest.mark.parametrize("parts", ["", "asymmetric", ALL])
def test_zero_and_extreme_tokens(backend: Backend, bits: Bits, parts: str) -> None:
    x = tokens(6, 45)
    x[1] = 0
    x[2] *= 1e30
    x[3] *= 1e-30
    x[4] *= 1e-38  # subnormal
    x[5] = 0
    x[5, 0] = 1e-42
    layer = Layer(45, 11, bits, parts, 16)
    y = layer.check(backend, x)
    bias = layer.linear.bias
    assert torch.equal(y[1], torch.zeros(11) if bias is None else bias)


@pytest.mark.parametrize(("backend", "bits"), backends(4, 8, 16, "fp8"))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("parts", ["", "asymmetric", ALL])
def test_a_non_finite_token_gets_nan_and_touches_no_other(backend: Backend, bits: Bits, bad: float, parts: str) -> None:
    layer, x = Layer(45, 11, bits, parts, 16), tokens(5, 45)
    clean = layer(backend, x)
    x[2, 17] = bad
    y = layer(backend, x)
    others = [0, 1, 3, 4]
    torch.testing.assert_close(y[others], clean[others], rtol=1e-4, atol=1e-4)
    assert y[2].isnan().all()


@pytest.mark.parametrize(("backend", "bits"), backends(8))
def test_asymmetric_sums_near_the_end_of_int32(backend: Backend, bits: int) -> None:
    k = 65535  # 127 * 255 * k = 2.122e9, just below 2^31
    codes = torch.stack([torch.full((k,), value, dtype=torch.int8) for value in (-128, 127)])
    zero = torch.tensor([[127], [-128]], dtype=torch.int8)
    group = GroupOperands(bits, None, 0, None, None, None, None)
    linear = LinearOperands(codes, torch.ones(2, 1), zero, None, None, None, None)
    y = backend.linear(backend.prepare(torch.ones(1, k), group), linear)
    np.testing.assert_allclose(y.numpy(), [[-255.0 * k, 255.0 * k]], rtol=1e-6)


@pytest.mark.parametrize(("bits", "name"), [(4, "cpu-int8"), (8, "cpu-int8"), (16, "reference")])
def test_the_first_row_that_fits_is_chosen(bits: int, name: str) -> None:
    assert select("cpu", bits).name == name
    assert select("cpu", bits, name) is select("cpu", bits)
    assert select("cpu", bits, "reference").name == "reference"


def test_fp8_activations_run_on_hopper_and_elsewhere_on_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "mps"):
        assert select(device, 8, activation_format="fp8").name == "reference"
    with pytest.raises(QuantExpertsError, match=r"'cpu-int8' cannot run Afp8 on cpu: choose one of reference\."):
        select("cpu", 8, "cpu-int8", activation_format="fp8")
    monkeypatch.setattr(triton_backend, "is_exact", lambda: True)
    for capability, name in [((8, 9), "reference"), ((9, 0), "triton")]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert select("cuda", 8, activation_format="fp8").name == name
        assert select("cuda", 8, weights=(4, 128, True), activation_format="fp8").name == "reference"
        assert select("cuda", 8).name == "triton"


def test_weight_only_schemes_have_a_backend_of_their_own_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(replace(b, usable=lambda activations: True) for b in BACKENDS))
    for weights in [(4, 128, False), (3, 128, False), (4, None, True), (3, 64, True)]:
        assert select("cuda", 16, weights=weights).name == "triton-weight-only"
    for weights in [(4, 16, False), (8, 128, False)]:
        assert select("cuda", 16, weights=weights).name == "reference"
    assert select("cuda", 8, weights=(4, 128, False)).name == "reference"
    assert select("cuda", 8).name == "triton"


def test_every_device_has_a_backend_for_every_width() -> None:
    for device in ("cpu", "cuda", "mps", "xpu"):
        for bits in (4, 5, 6, 7, 8, 16):
            chosen = select(device, bits)
            assert chosen.device in (device, "any")
            assert ("values" if bits == 16 else "integer") in chosen.activations


@pytest.mark.parametrize(("device", "bits"), [("cpu", 16), ("mps", 8)])
@pytest.mark.parametrize("forced", ["cpu-int8", "tpu-int2"])
def test_a_forced_backend_that_does_not_apply_is_refused(device: str, bits: int, forced: str) -> None:
    with pytest.raises(QuantExpertsError, match=rf"'{forced}'.*A{bits}.*{device}.*reference"):
        select(device, bits, forced)


def test_an_inexact_backend_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    table = tuple(replace(b, usable=lambda activations: False) if b.name == "cpu-int8" else b for b in BACKENDS)
    monkeypatch.setattr(dispatch, "BACKENDS", table)
    assert select("cpu", 8).name == "reference"
    with pytest.raises(QuantExpertsError, match="cpu-int8"):
        select("cpu", 8, "cpu-int8")
