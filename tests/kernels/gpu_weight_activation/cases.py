"""Runs the Triton kernels against the oracle: on a GPU, or, with TRITON_INTERPRET=1 in the environment, on the CPU.

`python cases.py [CASE ...]` prints the name of each case that passed; `test_cases.py` starts it in a
process of its own, because the switch is read when kernels are defined. Cases have no near ties between experts.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy
import torch
from torch import Tensor

from quant_experts.config import ActivationFormat
from quant_experts.errors import QuantExpertsError
from quant_experts.kernels import reference
from quant_experts.kernels.gpu import launch, recorded
from quant_experts.kernels.gpu_tokens import prepare_launch
from quant_experts.kernels.gpu_tokens.layout import GroupLayout, Tokens, pack_group
from quant_experts.kernels.gpu_weight_activation import backend as triton_backend
from quant_experts.kernels.gpu_weight_activation.layout import pack_codes, unpack_codes, unzigzag, zigzag
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands, Prepared

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
EXPERTS_TOLERANCE = 1e-3 if INTERPRETED else 3e-3
"""Of the norm of a token's output when experts are on: hidden values are rounded to float16, down factors to bfloat16
for inputs of 16 bits (and then `check` adds their rounding), and terms may cancel. In these layers experts are most of
the output; in real ones they are a correction."""
SUMS_TOLERANCE = 2e-6
"""Without experts: float32 scales over exact sums."""
FP8_TOLERANCE = 1e-5
"""More of float32 sums of exact products, which matrix units cut instead of rounding."""
TENSOR_CORE_FP8 = 0.0 if INTERPRETED else 2.0**-9
"""With more than 8 tokens: Hopper's matrix units keep 14 bits of sums of fp8 products, and those of 2,048 channels are
added up in float32. A model of that (`fp8_sums.py`) stays below 0.3 of it, and below 0.8 for the up to 10,240 in tiles
of 256 rows; these are allowed twice as much where outputs are few and codes are spread evenly."""
FP8_OUTLIERS = 2.0**-7
"""The same, where one channel is a thousand times as large: the model stays below 0.9 of it."""

ALL = ("smooth", "shared", "routed", "bias")


def operands(
    k: int, sizes: tuple[int, ...], bits: int = 6, parts: tuple[str, ...] = ALL, experts: int = 4, rotation: int = 0,
    integer_factors: bool = False, rank: int = 5, reads_codes: bool = False,
    activation_format: ActivationFormat = "int",
) -> tuple[GroupOperands, list[LinearOperands]]:  # fmt: skip
    """A random group and its linears, one for each number of output channels."""
    generator = torch.Generator().manual_seed(k + sum(sizes))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def factor(part: str, *shape: int) -> Factor | None:
        if part not in parts:
            return None
        if integer_factors:
            codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
            return Factor(codes.to(DEVICE), (normal(*shape[:-1]).abs() * 0.01 + 0.001).to(DEVICE))
        return Factor(normal(*shape).half().to(DEVICE), None)

    def chosen(part: str, tensor: Tensor) -> Tensor | None:
        return tensor.to(DEVICE) if part in parts else None

    group = GroupOperands(
        bits,
        chosen("smooth", normal(k).abs() + 0.5),
        rotation,
        factor("shared", rank, k),
        factor("routed", experts, 3, k),
        chosen("routed", normal(experts, k).half()),
        chosen("routed", normal(experts).half()),
        reads_codes,
        activation_format,
    )
    linears = [
        LinearOperands(
            torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8).to(DEVICE),
            (normal(n, 1).abs() * 0.1 + 0.01).to(DEVICE),
            None,
            None,
            factor("shared", n, rank),
            factor("routed", experts, n, 3),
            chosen("bias", normal(n)),
        )
        for n in sizes
    ]
    return group, linears


def tokens(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(7)).to(dtype).to(DEVICE)


def steps_apart(ours: Tensor, plain: Tensor) -> Tensor:
    """How many codes lie between codes, of either format."""

    def rank(codes: Tensor) -> Tensor:
        bits = codes.view(torch.int8).int()
        return bits if codes.dtype == torch.int8 else torch.where(bits < 0, -(bits & 127), bits)

    return (rank(ours) - rank(plain)).abs()


def prepared_like_the_oracle(x: Tensor, group: GroupOperands) -> tuple[Tokens, Prepared]:
    """Codes, scales and experts equal the oracle's bit for bit; rows may be in another order."""
    ours, plain = triton_backend.prepare(x, group), reference.prepare(x, group)
    assert ours.codes is not None and ours.token_scale is not None
    assert plain.codes is not None and plain.token_scale is not None
    order = torch.arange(len(x), device=x.device) if ours.order is None else ours.order.long()
    assert sorted(order.tolist()) == list(range(len(x)))
    assert ours.codes.dtype == plain.codes.dtype
    apart = steps_apart(ours.codes[:, : x.shape[1]], plain.codes[order])
    # Sums of a rotation come in another order: a value on a tie may fall to either side.
    free = 1 if group.rotation else 0
    assert apart.max() <= free and apart.float().mean() <= 1e-3 * free
    assert not ours.codes[:, x.shape[1] :].float().any(), "padding must be zero"
    torch.testing.assert_close(ours.token_scale, plain.token_scale[order], rtol=1e-6 * free, atol=0, equal_nan=True)
    if plain.expert is not None:
        assert ours.expert is not None and torch.equal(ours.expert.long(), plain.expert[order])
    return ours, plain


def check(x: Tensor, group: GroupOperands, linears: list[LinearOperands], more: float = 0.0) -> Tensor:
    """Outputs of stacked linears against the oracle's, in float64 norms, token by token. more: tolerance than usual."""
    ours, plain = prepared_like_the_oracle(x, group)
    packed = triton_backend.pack(group, linears, x.dtype)
    y = triton_backend.linear(ours, packed.linear)
    assert y.dtype == x.dtype
    expected = torch.cat([reference.linear(plain, linear) for linear in linears], dim=1)
    assert y.shape == expected.shape
    experts = group.shared_down is not None or group.routed_down is not None
    tolerance = more + (EXPERTS_TOLERANCE if experts else SUMS_TOLERANCE)
    if group.activation_format == "fp8":
        tolerance += FP8_TOLERANCE
    if group.activation_format == "fp8" and len(x) > triton_backend.LINEAR_FEW:
        tolerance += TENSOR_CORE_FP8
    if x.dtype != torch.float32:
        tolerance += torch.finfo(torch.bfloat16).eps
    size = expected.double().norm(dim=1)
    for outputs in (y,) if INTERPRETED else (y, triton_backend.apply(x, packed)):  # which may prepare in another way
        error = (outputs.double() - expected.double()).norm(dim=1)
        assert (error <= tolerance * size + 1e-30).all(), error / size
    assert torch.equal(triton_backend.linear(ours, packed.linear), y), "a second launch must find clean workspaces"
    return y


def sizes() -> None:
    for m, k, n in [(1, 45, 11), (13, 300, 70), (17, 300, 40), (20, 129, 65), (1, 1, 1)]:
        check(tokens(m, k), *operands(k, (n,)))


def parts() -> None:
    for m, chosen in [
        (5, ("smooth", "shared")),
        (5, ("routed",)),
        (17, ("shared",)),
        (18, ("routed",)),
        (18, ("shared", "bias")),
        (18, ()),
    ]:
        check(tokens(m, 140), *operands(140, (33,), parts=chosen))


def few_tokens() -> None:
    """Tiles of each shape; experts chosen by `prepare` or, on Hopper, by the linear; several words of experts; more
    ranks than registers hold."""
    for m, k, n, experts, rank in [(1, 300, 70, 4, 5), (4, 600, 33, 12, 40)]:
        check(tokens(m, k), *operands(k, (n,), experts=experts, rank=rank))
    large = [
        (1, 3584, 4608, ALL), (3, 4096, 512, ("shared",)), (7, 1536, 2048, ("routed", "bias")), (1, 9000, 96, ALL),
        (2, 1024, 17000, ALL), (8, 640, 17000, ALL), (12, 3584, 4608, ()), (16, 640, 96, ()), (16, 3584, 512, ALL),
        (11, 9000, 96, ()), (5, 9000, 1000, ALL), (8, 8192, 2048, ("routed",)), (1, 20608, 96, ("bias",)),
    ]  # fmt: skip
    for i, (m, k, n, parts) in enumerate(large if not INTERPRETED else ()):
        group, linears = operands(k, (n,), 8, parts, rank=32, experts=8)
        if group.router_weight is not None:
            group.router_weight[:, 8:] = 0  # short sums: no near ties
        check(tokens(m, k, torch.bfloat16 if i % 2 == 0 else torch.float32), group, linears)
    if not INTERPRETED:
        check(tokens(6, 640), *operands(640, (96,), 8, experts=6, rank=100))


def few_tokens_whose_codes_are_read() -> None:
    """The same for experts that read codes, of short and of long tokens."""
    sizes = [(1, 300, 40, 0)]
    if not INTERPRETED:
        sizes = [(1, 3584, 4608, 64), (4, 640, 17000, 64), (8, 640, 17000, 64), (8, 9000, 96, 0), (12, 3584, 4608, 64)]
        sizes += [
            (16, 9024, 96, 64),
            (9, 22528, 96, 64),
            (1, 22528, 96, 64),
            (13, 640, 17000, 64),
            (40, 3584, 4608, 64),
            (700, 3584, 512, 64),
            (600, 9024, 96, 64),
        ]
    for m, k, n, rotation in sizes:
        group, linears = operands(
            k, (n,), 8, ("smooth", "shared"), rotation=rotation, integer_factors=True, rank=64, reads_codes=True
        )
        check(tokens(m, k, torch.bfloat16 if m < 8 and not INTERPRETED else torch.float32), group, linears)


def one_token() -> None:
    """On Hopper groups without experts take one launch for one token, but for some; each tile of it, and of others."""
    rows = [(45, 11), (300, 70)]
    if not INTERPRETED:
        rows = [(3584, 4608), (1536, 2048), (640, 17000), (3584, 17000), (8192, 1024), (18944, 512), (18944, 3584)]
        rows += [(1000, 33), (100, 64), (20480, 96)]
    for i, (k, n) in enumerate(rows):
        dtype = torch.float32 if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)[i % 3]
        group, linears = operands(k, (n,), 8, ("smooth", "bias"))
        check(tokens(1, k, dtype), group, linears)
        takes_one_launch(group, linears, dtype, k <= 8192)
    coded = [(300, 40, 5)] if INTERPRETED else [(3584, 4608, 64), (896, 200, 33), (18944, 3584, 64), (9024, 96, 20)]
    for i, (k, n, rank) in enumerate(coded):
        rotation, parts = ((64, ("smooth", "shared")), (0, ("shared", "bias")))[i % 2 if k % 64 == 0 else 1]
        group, linears = operands(
            k, (n,), 8, parts, rotation=rotation, integer_factors=True, rank=rank, reads_codes=True
        )
        check(tokens(1, k, torch.float32 if INTERPRETED else torch.bfloat16), group, linears)
        takes_one_launch(group, linears, torch.bfloat16, False)
    for parts, experts in ((ALL, 8), (("routed",), 12), (("shared", "smooth"), 8)):
        k, n = (300, 40) if INTERPRETED else (9000, 700)
        group, linears = operands(k, (n,), 8, parts, rank=32, experts=experts)
        takes_one_launch(group, linears, torch.bfloat16, False)
        if group.router_weight is not None:
            group.router_weight[:, 8:] = 0  # short sums: no near ties
        check(tokens(1, k, torch.float32 if INTERPRETED else torch.bfloat16), group, linears)


def takes_one_launch(group: GroupOperands, linears: list[LinearOperands], dtype: torch.dtype, expected: bool) -> None:
    """Whether one token of it does, on Hopper."""
    if launch.hopper(torch.device(DEVICE)):
        from quant_experts.kernels.gpu_weight_activation.alone_launch import takes_alone

        packed = triton_backend.pack(group, linears, dtype)
        assert takes_alone(packed.group, packed.linear) == expected


@numpy.errstate(invalid="ignore")  # the interpreter's arithmetic is NumPy's
def hard_inputs_of_one_token() -> None:
    """Zero, huge, tiny and infinite tokens, ties between experts, and clean ones after them."""
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    for parts, reads_codes in (((), False), (("smooth",), False), (("smooth", "shared"), True), (ALL, False)):
        k, n = (300, 40) if INTERPRETED else (8000 if "shared" not in parts else 9000, 700)
        group, linears = operands(k, (n,), 8, parts, integer_factors=reads_codes, rank=32, reads_codes=reads_codes)
        if group.router_weight is not None and group.router_bias is not None:
            group.router_weight[:] = 1
            group.router_bias[:] = torch.tensor([1.0, 0, 0, 0])
        x, packed = tokens(1, k, dtype), triton_backend.pack(group, linears, dtype)
        clean = triton_backend.apply(x, packed)
        takes_one_launch(group, linears, dtype, "shared" not in parts)
        for factor in (0, 1e30, 1e-20):
            check(x * factor, group, linears)
        for bad in (torch.nan, torch.inf):
            broken = x.clone()
            broken[0, 17] = bad
            assert triton_backend.apply(broken, packed).isnan().all()
            assert torch.equal(triton_backend.apply(x, packed), clean)


def uncommon_layouts() -> None:
    """One output channel in every kernel; a rotation alone; ranks above 64; factors of zeros, tiny tokens."""
    for m in (3, 9, 20):
        check(tokens(m, 130), *operands(130, (1,), parts=("bias",)))
    check(tokens(20, 192), *operands(192, (33,), parts=(), rotation=64))
    for m in (3, 20):
        check(tokens(m, 140), *operands(140, (33,), rank=70, experts=2))
        check(tokens(m, 45), *operands(45, (11,), experts=12))
        group, linears = operands(45, (11,))
        assert group.shared_down is not None and group.routed_down is not None
        for factor in (group.shared_down, group.routed_down):
            factor.values.zero_()
        check(tokens(m, 45) * 1e-20, group, linears)
    try:
        triton_backend.pack(*operands(45, (11,), experts=31))
    except QuantExpertsError as error:
        assert "31" in str(error) and "reference" in str(error)
    else:
        raise AssertionError("more factors than an int32 has bits")


def stacked_linears() -> None:
    group, linears = operands(200, (33, 7, 20))
    y = check(tokens(5, 200), group, linears)
    packed = triton_backend.pack(group, linears)
    for rows, linear in zip([slice(0, 33), slice(33, 40), slice(40, 60)], linears, strict=True):
        assert torch.equal(triton_backend.codes(packed, rows, 200), linear.codes)
    assert torch.equal(triton_backend.apply(tokens(5, 200), packed), y)


def sums_are_exact() -> None:
    """With unit scales an output is the integer sum itself, extreme codes included."""
    group, (linear,) = operands(260, (40,), bits=8, parts=())
    codes = torch.where(linear.codes < 0, -8, 7).to(torch.int8)
    linear = LinearOperands(codes, torch.ones_like(linear.scale), None, None, None, None, None)
    for m in (3, 20):
        x = torch.where(tokens(m, 260) > 0, 127.0, -127.0)
        expected = reference.integer_product(x.to(torch.int8), codes)
        assert torch.equal(triton_backend.apply(x, triton_backend.pack(group, [linear])), expected.float())


def activation_widths() -> None:
    for bits in (4, 5, 6, 7, 8):
        prepared_like_the_oracle(tokens(4, 45), operands(45, (11,), bits=bits, parts=("smooth",))[0])


def input_types() -> None:
    for dtype in (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16):
        check(tokens(9, 45, dtype), *operands(45, (11,), parts=("smooth", "bias")))
        if not INTERPRETED:  # few tokens and many, in other kernels
            for m in (3, 9, 70):
                check(tokens(m, 300, dtype), *operands(300, (70,)))
                check(tokens(m, 320, dtype), *operands(320, (70,), parts=("smooth", "shared"), rotation=64))


def rotation_and_integer_factors() -> None:
    check(tokens(4, 192), *operands(192, (33,), integer_factors=True))
    check(tokens(18, 192), *operands(192, (33,), rotation=64, integer_factors=True, rank=40))


def rotations() -> None:
    """Blocks of each size; tokens that fit a program's registers twice, once, and that take more of its threads; more
    tokens than programs."""
    sizes = [(3, 384)] if INTERPRETED else [(3, 384), (1200, 1152), (5, 29568), (3, 33280)]
    for rotation in (16, 32, 64, 128):
        for m, k in sizes:
            group, _ = operands(k, (11,), 8, ("smooth",), rotation=rotation)
            prepared_like_the_oracle(tokens(m, k), group)
            if not INTERPRETED:
                prepared_like_the_oracle(tokens(m, k, torch.bfloat16), group)


def shared_expert_that_reads_codes(activation_format: ActivationFormat = "int") -> None:
    """One rounding to float16 away from the oracle, and with fp8 codes that of float32 sums."""
    for m, k, rotation, rank in [(1, 45, 0, 5), (4, 320, 64, 40), (18, 192, 64, 32), (20, 700, 0, 3)]:
        parts, bits = ("smooth", "shared", "bias"), 6 if activation_format == "int" else 8
        group, linears = operands(
            k, (33, 7), bits, parts, rotation=rotation, integer_factors=True, rank=rank, reads_codes=True,
            activation_format=activation_format,
        )  # fmt: skip
        x = tokens(m, k)
        x[0, :5] *= 1e20
        ours, plain = prepared_like_the_oracle(x, group)
        packed = triton_backend.pack(group, linears)
        assert packed.group.code_scale is not None and ours.token_scale is not None and plain.shared_hidden is not None
        assert ours.hidden is not None and ours.present is not None and (ours.present == 1).all()
        hidden = (ours.hidden.float() * ours.headroom * ours.token_scale)[:, :rank]
        expected = plain.shared_hidden
        free = 0.0 if activation_format == "int" else FP8_TOLERANCE * expected.norm(dim=1, keepdim=True)
        assert ((hidden - expected).abs() <= 2**-10 * expected.abs() + free).all()
        check(x, group, linears)
        y = triton_backend.apply(x, packed)
        x[m - 1, 2] = torch.inf
        other = triton_backend.apply(x, packed)
        assert other[m - 1].isnan().all() and torch.equal(other[: m - 1], y[: m - 1])


def many_tokens_unsorted() -> None:
    """Sorted by expert or not, many tokens have the same outputs, one that is not finite beside them too; sorted ones
    are compared with the oracle's elsewhere."""
    for m, activation_format in ((20, "int"), (20, "fp8")) if INTERPRETED else ((1000, "int"), (1000, "fp8")):
        group, linears = operands(140, (33,), 8, activation_format=activation_format)
        x, packed = tokens(m, 140), triton_backend.pack(group, linears)
        x[m // 2, 5] = torch.nan
        outputs = []
        for sorts in (False, True):
            prepared = prepare_launch.prepare(x, packed.group, sorts=sorts)
            assert (prepared.order is not None) == sorts
            outputs.append(triton_backend.linear(prepared, packed.linear).double())
        unsorted, expected = outputs
        others = [i for i in range(m) if i != m // 2]
        assert unsorted[m // 2].isnan().all() and expected[m // 2].isnan().all()
        error = (unsorted - expected)[others].norm(dim=1)
        assert (error <= EXPERTS_TOLERANCE * expected[others].norm(dim=1)).all(), error.max()


def all_tokens_to_one_expert() -> None:
    for m, n in ((6, 11), (4, 40), (20, 11)):
        group, linears = operands(45, (n,))
        assert group.router_bias is not None
        for only in (0, 3)[: 2 if m == 6 else 1]:
            group.router_bias[:] = 1000
            group.router_bias[only] = -1000
            ours, _ = prepared_like_the_oracle(tokens(m, 45), group)
            assert ours.expert is not None and set(ours.expert.tolist()) == {only}
            check(tokens(m, 45), group, linears)


def experts_without_tokens() -> None:
    for m, n in ((6, 11), (4, 40), (18, 11)):
        group, linears = operands(45, (n,), experts=5)
        assert group.router_bias is not None
        group.router_bias[[0, 2]] = 1000
        check(tokens(m, 45), group, linears)


def ties_go_to_the_first() -> None:
    group, linears = operands(45, (40,))
    assert group.router_weight is not None and group.router_bias is not None
    group.router_weight[:] = 1
    group.router_bias[:] = torch.tensor([1.0, 0, 0, 0])
    for m in (4, 6, 20):
        ours, _ = prepared_like_the_oracle(tokens(m, 45), group)
        assert ours.expert is not None and ours.expert.tolist() == [1] * m
        check(tokens(m, 45), group, linears)


def zero_and_extreme_tokens() -> None:
    for m, n in ((6, 11), (4, 40)):
        x = tokens(m, 45)
        x[1] = 0
        x[2] *= 1e30
        x[3] *= 1e-20
        check(x, *operands(45, (n,)))


@numpy.errstate(invalid="ignore")  # the interpreter's arithmetic is NumPy's
def non_finite_tokens() -> None:
    for m, n in ((5, 11), (4, 40), (20, 11)):
        group, linears = operands(45, (n,))
        packed = triton_backend.pack(group, linears)
        clean = triton_backend.apply(tokens(m, 45), packed)
        for bad in (torch.nan, torch.inf, -torch.inf)[: 3 if m == 5 else 1]:
            x = tokens(m, 45)
            x[2, 17] = bad
            prepared = triton_backend.prepare(x, group)
            assert prepared.codes is not None and prepared.token_scale is not None
            row = 2 if prepared.order is None else prepared.order.tolist().index(2)
            assert not prepared.codes[row].any() and prepared.token_scale[row].isnan()
            others = [i for i in range(m) if i != 2]
            for y in (triton_backend.linear(prepared, packed.linear), triton_backend.apply(x, packed)):
                assert y[2].isnan().all()
                torch.testing.assert_close(y[others], clean[others], rtol=1e-5, atol=1e-5)


def inputs_follow_one_another(activation_format: ActivationFormat = "int", reads_codes: bool = False) -> None:
    """Kernels overlap: whatever a buffer or a cache held before, an input's outputs are its own, in graphs as well."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from kernels.case_runs import check_inputs_that_follow_one_another

    sizes = [(1, 300, 40, torch.float32), (17, 300, 40, torch.float32)]
    if not INTERPRETED:
        sizes = [(m, 18944, 4096, torch.float32) for m in (1, 4, 12, 40, 200, 300)]
        sizes += [(1, 18944, 4096, torch.bfloat16)]
        sizes += [(m, 3584, 4096, torch.bfloat16) for m in (1, 4, 8, 9, 16, 17, 256, 257, 512, 513)]
        sizes += [(m, 18944, 4096, torch.bfloat16) for m in (40, 200, 700)]
        sizes += [(513, 3584, 38000, torch.bfloat16), (1100, 9000, 18000, torch.bfloat16)]  # tokens are sorted
        sizes += [(2, 8960, 1536, torch.bfloat16), (2, 1536, 17920, torch.bfloat16), (8, 3584, 17920, torch.bfloat16)]
    runs = [(*size, ("smooth", "shared") if reads_codes else ALL) for size in sizes]
    if not (INTERPRETED or reads_codes) and activation_format == "int":
        runs.append((1, 3584, 4096, torch.bfloat16, ("smooth",)))  # one launch
    for m, k, n, dtype, parts in runs:
        group, linears = operands(
            k, (n,), 8, parts, integer_factors=reads_codes, reads_codes=reads_codes, rank=32,
            activation_format=activation_format,
        )  # fmt: skip
        packed = triton_backend.pack(group, linears, dtype)
        inputs = [tokens(m, k, dtype) * factor for factor in ((1, -3) if INTERPRETED else (1, -3, 0.01, 1))]
        check_inputs_that_follow_one_another(lambda x, packed=packed: triton_backend.apply(x, packed), inputs)


def no_tokens() -> None:
    group, linears = operands(45, (11,))
    assert triton_backend.apply(tokens(0, 45), triton_backend.pack(group, linears)).shape == (0, 11)


def packing() -> None:
    for n, k in [(1, 1), (3, 128), (5, 200), (2, 257)]:
        codes = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(k), dtype=torch.int8)
        packed = pack_codes(codes)
        assert packed.shape == (-(-k // 128), n, 64)
        assert torch.equal(unpack_codes(packed, k), codes)
        numbers = zigzag(codes)
        assert torch.equal(numbers.int(), torch.where(codes < 0, -2 * codes - 1, 2 * codes).int())
        assert torch.equal(unzigzag(unpack_codes(pack_codes(numbers), k)), codes)
        byte = int(packed[0, 0, 0])
        assert ((byte & 15) ^ 8) - 8 == codes[0, 0]
        assert byte >> 4 == (codes[0, 64] if k > 64 else 0)


def fp8_layers() -> None:
    """Odd sizes with all kinds of experts, and without; a rotation; zero and extreme tokens; types of input."""
    for m, k, n in [(1, 45, 11), (13, 300, 70), (20, 129, 65), (1, 1, 1)]:
        check(tokens(m, k), *operands(k, (n,), 8, activation_format="fp8"))
    for m in (3, 9, 20):
        check(tokens(m, 260), *operands(260, (33, 7), 8, ("bias",), activation_format="fp8"))
        check(tokens(m, 192), *operands(192, (33,), 8, ("smooth", "shared"), rotation=64, activation_format="fp8"))
        x = tokens(m, 45)
        x[0], x[1], x[2] = 0, x[1] * 1e30, x[2] * 1e-20
        check(x, *operands(45, (11,), 8, activation_format="fp8"))
    assert triton_backend.apply(
        tokens(0, 45), triton_backend.pack(*operands(45, (11,), 8, activation_format="fp8"))
    ).shape == (0, 11)
    for dtype in () if INTERPRETED else (torch.float16, torch.bfloat16):
        for m in (3, 9, 70, 300):
            check(tokens(m, 300, dtype), *operands(300, (70,), 8, activation_format="fp8"))
    for k in () if INTERPRETED else (3584, 9000):
        x = tokens(200, k)
        check(x, *operands(k, (300,), 8, (), activation_format="fp8"))
        x[:, 1] *= 1000
        check(x, *operands(k, (300,), 8, (), activation_format="fp8"), FP8_OUTLIERS)
    for k in () if INTERPRETED else (3584, 10_240, 29_568):  # tiles of 256 rows; three parts of the last one's sums
        x = tokens(2100, k)
        check(x, *operands(k, (9000,), 8, ("shared",), activation_format="fp8"))
        x[:, 1] *= 1000
        check(x, *operands(k, (9000,), 8, (), activation_format="fp8"), FP8_OUTLIERS)


def fp8_codes_of_every_number_and_tie() -> None:
    """The nearest numbers of e4m3, halves to even: at every number, between every two, and beside that."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()].unique()
    between = (numbers[1:] + numbers[:-1]) / 2
    beside = [between.nextafter(torch.tensor(side)) for side in (-1e9, 1e9)]
    row = torch.cat([numbers, between, *beside, numbers * 2.0**-9]).to(DEVICE)
    group, _ = operands(len(row), (1,), 8, (), activation_format="fp8")
    for m in (2, 20) if INTERPRETED else (2, 20, 300):
        ours, _ = prepared_like_the_oracle(row.expand(m, -1).contiguous(), group)
        assert ours.token_scale is not None and (ours.token_scale == 1).all()


def fp8_weights_are_exact() -> None:
    """Of tokens with one channel each, outputs are single products: every weight code in every place."""
    k = 260
    group, (linear,) = operands(k, (40,), 8, (), activation_format="fp8")
    linear = LinearOperands(linear.codes, torch.ones_like(linear.scale), None, None, None, None, None)
    packed = triton_backend.pack(group, [linear])
    assert torch.equal(triton_backend.codes(packed, slice(0, 40), k), linear.codes)
    channels = torch.eye(k, device=DEVICE)
    for some in ([0, 63, 64, 131, 259], range(0, 256, 13) if INTERPRETED else range(k)):
        x = channels[list(some)] * 448
        assert torch.equal(triton_backend.apply(x, packed), x @ linear.codes.float().T)


def fp8_shared_expert_that_reads_codes() -> None:
    shared_expert_that_reads_codes("fp8")


@numpy.errstate(invalid="ignore")  # the interpreter's arithmetic is NumPy's
def fp8_non_finite_tokens() -> None:
    for m in (5, 20):
        group, linears = operands(45, (11,), 8, activation_format="fp8")
        packed = triton_backend.pack(group, linears)
        x = tokens(m, 45)
        clean = triton_backend.apply(x, packed)
        x[2, 17] = torch.inf
        y = triton_backend.apply(x, packed)
        others = [i for i in range(m) if i != 2]
        assert y[2].isnan().all()
        torch.testing.assert_close(y[others], clean[others], rtol=1e-5, atol=1e-5)


def inputs_of_codes_follow_one_another() -> None:
    inputs_follow_one_another("int", reads_codes=True)


def fp8_inputs_follow_one_another() -> None:
    inputs_follow_one_another("fp8")


def fp8_inputs_of_codes_follow_one_another() -> None:
    inputs_follow_one_another("fp8", reads_codes=True)


def large_layers() -> None:
    """On a GPU: tiles of each size, whole ones and ones cut into shares, which must add up alike in each launch."""
    formats: tuple[ActivationFormat, ...] = () if INTERPRETED else ("int", "fp8")
    for activation_format in formats:
        for m, k, n, parts, dtype in [
            (12, 3584, 4608, (), torch.float32),
            (200, 3584, 4608, ALL, torch.float32),
            (600, 8192, 9000, (), torch.float32),
            (3000, 1024, 33000, ALL, torch.float32),
            (700, 9000, 512, ("smooth", "shared"), torch.float32),
            (5000, 1024, 96, ALL, torch.float32),
            (9000, 1024, 96, ALL, torch.bfloat16),
        ]:
            group, linears = operands(k, (n,), 8, parts, rank=32, activation_format=activation_format)
            if group.router_weight is not None:
                group.router_weight[:, 8:] = 0  # short sums: no near ties among thousands of tokens
            check(tokens(m, k, dtype), group, linears)


def products_that_settle(activation_format: ActivationFormat = "int") -> None:
    """On Hopper, linears that project codes, or settle values, against those whose tokens `prepare` has settled, in
    launches one after another: with fewer programs than pieces, tiles that no program shares, several runs of ranks,
    blocks of tokens that are not full, a single block of channels."""
    codes = [
        (17, 300, 40, 5), (128, 3584, 4608, 64), (64, 18944, 3584, 64), (13, 640, 17000, 100), (512, 9472, 512, 64),
        (700, 3584, 512, 200), (20_000, 512, 256, 64), (300, 100, 33000, 32), (2, 3584, 4608, 400),
    ]  # fmt: skip
    values = [(12, 640, 17000, 8), (33, 640, 17000, 0), (50, 300, 70, 30), (64, 9472, 512, 8), (5, 1000, 96, 8)]
    if not launch.hopper(torch.device(DEVICE)):
        codes, values = [(3, 140, 33, 5)], [(3, 140, 33, 4)]
    fp8 = activation_format == "fp8"
    if fp8 and not INTERPRETED:  # of fewer tokens `prepare` settles all
        codes, values = ([size for size in sizes if size[0] > 8] for sizes in (codes, values))
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    free = EXPERTS_TOLERANCE + torch.finfo(torch.bfloat16).eps + (TENSOR_CORE_FP8 if fp8 else 0.0)
    for m, k, n, rank in codes:
        rotation = 64 if k % 64 == 0 else 0
        group, linears = operands(
            k, (n,), 8, ("smooth", "shared", "bias"), rotation=rotation, integer_factors=True, rank=rank,
            reads_codes=True, activation_format=activation_format,
        )  # fmt: skip
        packed = triton_backend.pack(group, linears, dtype)
        sums = free - EXPERTS_TOLERANCE if fp8 else 0.0  # those of fp8 depend on where they are cut
        both_ways(tokens(m, k, dtype), packed, sums)
    for m, k, n, experts in values:
        rank = 128 if m == 5 else 40
        parts = ALL if experts else ("smooth", "shared")
        group, linears = operands(
            k, (n,), 8, parts, rank=rank, experts=experts, activation_format=activation_format
        )  # fmt: skip
        if group.router_weight is not None:
            group.router_weight[:, 8:] = 0  # short sums: no near ties
        both_ways(tokens(m, k, dtype), triton_backend.pack(group, linears, dtype), free)


@numpy.errstate(invalid="ignore")  # the interpreter's arithmetic is NumPy's
def both_ways(x: Tensor, packed: triton_backend.Packed, tolerance: float) -> None:
    """Outputs of `apply`, each of them, against those of tokens that are settled first; also of an input in between,
    half of whose tokens are not finite."""
    if launch.hopper(x.device):
        assert triton_backend._settles(len(x), packed, sorts=False), "there would be one way"
    expected = triton_backend.linear(triton_backend.prepare(x, packed.group), packed.linear)
    first = triton_backend.apply(x, packed)
    error = (first.double() - expected.double()).norm(dim=1)
    assert (error <= tolerance * expected.double().norm(dim=1)).all(), (x.shape, error)
    broken = x.clone()
    broken[::2, -1] = torch.inf
    for _ in range(1 if INTERPRETED else 4):
        assert torch.equal(triton_backend.apply(x, packed), first)
        y = triton_backend.apply(broken, packed)
        assert y[::2].isnan().all() and torch.equal(y[1::2], first[1::2])
    if launch.hopper(x.device):
        assert not launch.zeros("hopper tokens", 0, x.device).any(), "counts must be zero for the next launch"


def fp8_products_that_settle() -> None:
    products_that_settle("fp8")


def shares_of_every_tile(activation_format: ActivationFormat = "int") -> None:
    """On Hopper, each tile whole, cut into a few shares and into dozens: sums of integers are the same to the bit, in
    each of two launches, one right after the other; those of fp8 differ by the order of additions. Outputs are poisoned
    before, and counts are zero after."""
    if not launch.hopper(torch.device(DEVICE)):
        return
    from quant_experts.kernels.gpu.hopper_tiles import Tile
    from quant_experts.kernels.gpu_weight_activation import hopper_launch

    for m, n, k, parts in [
        (16, 130, 18944, ()), (70, 300, 18944, ()), (140, 2000, 9000, ()), (140, 20000, 1300, ("smooth", "bias")),
        (70, 300, 18944, ALL),
    ]:  # fmt: skip
        group, linears = operands(k, (n,), 8, parts, rank=32, experts=8, activation_format=activation_format)
        packed = triton_backend.pack(group, linears, torch.float32)
        prepared = prepare_launch.prepare(tokens(m, k), packed.group, sorts=False)
        fixed = dict(
            GROUP_M=8, FACTORS=packed.group.factors, RANK=max(32, packed.group.rank), BIAS="bias" in parts,
            SORTED=False, FP8=activation_format == "fp8", LATER=prepared.hidden is not None,
        )  # fmt: skip
        tiles = [
            hopper_launch.tile(Tile(rows, columns, shares), k, fixed)
            for rows, columns in hopper_launch.TIMES.steps
            for shares in (False, True)
        ]
        if m <= 16:
            few = {name: value for name, value in fixed.items() if name not in ("GROUP_M", "FACTORS", "RANK")}
            tiles += [
                hopper_launch.config(m, n, k, fixed["FACTORS"], fixed["RANK"], **few, SHARES=shares)
                for shares in (False, True)
            ]
        outputs = []
        for tile in tiles:
            both = torch.full((2, m, n), torch.nan, device=DEVICE)
            for y in both:
                hopper_launch.linear(prepared, packed.linear, y, tile)
            outputs += both
            assert not launch.zeros("hopper shares", 0, both.device).any(), "counts must be zero for the next launch"
        plain = reference.prepare(tokens(m, k), group)
        expected = reference.linear(plain, linears[0]).double()
        usual = EXPERTS_TOLERANCE if parts == ALL else SUMS_TOLERANCE
        for i, y in enumerate(outputs):
            free = usual
            if fixed["FP8"]:
                free += TENSOR_CORE_FP8 * (2 if tiles[i // 2].BN.value == 256 else 1)
            error = (y.double() - expected).norm(dim=1)
            assert (error <= free * expected.norm(dim=1)).all(), (m, n, k, i, error / expected.norm(dim=1))
            if fixed["FP8"] or parts == ALL:
                assert torch.equal(y, outputs[i // 2 * 2]), (m, n, k, i)
            else:
                assert torch.equal(y, outputs[0]), (m, n, k, i)


def fp8_shares_of_every_tile() -> None:
    shares_of_every_tile("fp8")


def dense_projections() -> None:
    """On Hopper, sums of every tile of values against float64: tokens and rows that do not fill tiles, a token that is
    not finite beside others; and outputs of tokens that take it in each pipeline."""
    if not launch.hopper(torch.device(DEVICE)):
        return
    for m, k, experts, rank, parts in [
        (17, 3584, 8, 32, ALL), (65, 1000, 8, 64, ALL), (129, 1000, 16, 32, ALL), (300, 4736, 8, 32, ALL),
        (200, 1000, 0, 32, ("smooth", "shared")), (65, 200, 0, 64, ("shared",)), (129, 1000, 8, 5, ("routed",)),
        (40, 64, 8, 32, ALL), (70, 504, 30, 32, ALL), (130, 600, 8, 128, ALL),
    ]:  # fmt: skip
        sums_of_every_tile(tokens(m, k, torch.bfloat16), *operands(k, (1,), 8, parts, experts=experts, rank=rank))
    tolerance = EXPERTS_TOLERANCE + torch.finfo(torch.bfloat16).eps
    for m, k, n in [
        (17, 3584, 200), (65, 9472, 200), (129, 1000, 200), (500, 9472, 200), (513, 3584, 200), (2500, 9472, 200),
        (513, 3584, 38000), (2500, 1000, 8000),
    ]:  # fmt: skip
        group, linears = operands(k, (n,), 8, rank=32, experts=8)
        assert group.router_weight is not None
        group.router_weight[:, 8:] = 0  # short sums: no near ties among thousands of tokens
        x = tokens(m, k, torch.bfloat16)
        check(x, group, linears)
        packed = triton_backend.pack(group, linears, x.dtype)
        clean = triton_backend.apply(x, packed)
        apart = torch.zeros(m * k + 1, dtype=x.dtype, device=DEVICE)[1:].view(m, k)  # which the copy engine cannot read
        outputs = triton_backend.apply(apart.copy_(x), packed).double()
        assert ((outputs - clean).norm(dim=1) <= tolerance * clean.double().norm(dim=1)).all()
        x[m - 2, 900] = torch.nan
        y = triton_backend.apply(x, packed)
        others = [i for i in range(m) if i != m - 2]
        assert y[m - 2].isnan().all()
        assert torch.equal(y[others], clean[others])


def few_dense_projections() -> None:
    """The same for a few tokens, which one launch projects and quantizes: codes and scales to the bit, sums against
    float64, with channels that fill no block, and a token that is not finite."""
    if not launch.hopper(torch.device(DEVICE)):
        return
    static = ("smooth", "shared")
    for m, k, experts, rank, parts in [
        (1, 3584, 8, 32, ALL), (4, 300, 8, 32, ALL), (8, 18944, 8, 32, ALL), (9, 1001, 8, 64, ALL), (1, 1, 8, 32, ALL),
        (16, 9472, 0, 100, static), (16, 4096, 20, 32, ("routed",)), (3, 32768, 0, 32, ("shared",)),
    ]:  # fmt: skip
        group, linears = operands(k, (96,), 8, parts, experts=experts, rank=rank)
        few_sums(tokens(m, k, torch.bfloat16), group)
        if group.router_weight is not None:
            group.router_weight[:, 8:] = 0  # short sums: no near ties
        check(tokens(m, k, torch.bfloat16), group, linears)
    for bits, activation_format in ((8, "fp8"), (16, "int")):  # codes in e4m3; values in float16
        for m, k, parts, rotation in [(1, 3584, ALL, 0), (7, 9024, static, 64), (16, 300, static, 0)]:
            group, _ = operands(k, (1,), 8, parts, rank=32, rotation=rotation, activation_format=activation_format)
            few_sums(tokens(m, k, torch.bfloat16), replace(group, activation_bits=bits))
    for m, k in ((16, 32769), (17, 3584)):
        x = tokens(m, k, torch.bfloat16)
        layout = pack_group(operands(k, (1,), 8)[0], x.dtype, x.device)
        assert prepare_launch.projector(x, layout, False) is not prepare_launch.Projector.FEW


def few_sums(x: Tensor, group: GroupOperands) -> None:
    """What `hopper_begin` leaves of x, in tiles of several kinds; and once more with a token that is not finite."""
    from quant_experts.kernels.gpu_tokens import hopper_begin

    layout = pack_group(group, x.dtype, x.device)
    launch.complete_writes(x.device)
    assert prepare_launch.projector(x, layout, False) is prepare_launch.Projector.FEW and layout.projection is not None
    blocks, m = len(layout.projection), len(x)
    for tile in (hopper_begin.tile(m, blocks), hopper_begin.sliced(8, 1, blocks), hopper_begin.sliced(4, 3, blocks)):
        few_sums_of_a_tile(x, layout, tile, list(range(m)))
        broken = x.clone()
        broken[m // 2, x.shape[1] // 2] = torch.nan
        sums = few_sums_of_a_tile(broken, layout, tile, [i for i in range(m) if i != m // 2])
        assert sums[m // 2].isnan().all()


def few_sums_of_a_tile(x: Tensor, layout: GroupLayout, tile: Any, finite: list[int]) -> Tensor:
    """-> sums (M, rows of the projection) of all slices, of which those of finite tokens are as they should be."""
    from quant_experts.kernels.gpu_tokens import hopper_begin, hopper_tokens

    assert layout.projection is not None
    (m, k), kind = x.shape, layout.kind
    rows = layout.projection.transpose(0, 1).reshape(kind.rows, -1)[:, :k].double()
    factor_rows = kind.factors * kind.rank
    values, magnitudes = x.double(), x.double().abs()
    expected = torch.cat([values @ rows[:factor_rows].T, magnitudes @ rows[factor_rows:].T], dim=1)[finite]
    free = 1e-5 * (magnitudes @ rows.abs().T)[finite]
    padded = 128 * len(layout.projection)
    codes, found = (torch.full((m, padded), 99, device=DEVICE).to(kind.code_type) for _ in range(2))
    unit, units = (torch.full((m, 1), 99.0, device=DEVICE) for _ in range(2))
    hopper_tokens.write_tokens(x, layout.inverse_smooth, layout.rotation, kind.largest_code, codes, unit)
    sums = torch.full((tile.slices, m, kind.rows), 7e7, device=DEVICE)
    counts = torch.full((32,), 99, device=DEVICE)
    hopper_begin.begin(x, layout, found, units, sums, counts, tile)
    assert torch.equal(found.view(torch.int8), codes.view(torch.int8)), tile
    assert torch.equal(units.nan_to_num(-1), unit.nan_to_num(-1)) and not counts.any(), tile
    assert ((sums.double().sum(dim=0)[finite] - expected).abs() <= free).all(), tile
    return sums.sum(dim=0)


def sums_of_every_tile(x: Tensor, group: GroupOperands, linears: list[LinearOperands]) -> None:
    """With one slice of the input channels and with several."""
    from quant_experts.kernels.gpu_tokens import hopper_project

    layout = triton_backend.pack(group, linears, x.dtype).group
    assert layout.projection is not None and hopper_project.takes(x, layout)
    m, k = x.shape
    x[m // 2, 5] = torch.nan
    others = [i for i in range(m) if i != m // 2]
    rows = layout.projection.transpose(0, 1).reshape(layout.kind.rows, -1)[:, :k].double()
    factor_rows = layout.factors * layout.rank
    values, magnitudes = x.double(), x.double().abs()
    expected = torch.cat([values @ rows[:factor_rows].T, magnitudes @ rows[factor_rows:].T], dim=1)[others]
    free = 1e-5 * (magnitudes @ rows.abs().T)[others]
    for tile in hopper_project.tiles(factor_rows, layout.kind.rows - factor_rows):
        for slices in (1, min(5, -(-k // 128))):
            sums = torch.full((slices, m, layout.kind.rows), torch.nan, device=DEVICE)
            hopper_project.project(x, layout, sums, tile, **launch.options(x.device))
            assert ((sums.double().sum(dim=0)[others] - expected).abs() <= free).all(), (tile.PIECES, slices)
            assert sums[0, m // 2].isnan().all() and not sums[1:].isnan().any()


def threads_that_have_not_used_the_gpu() -> None:
    """What comes first in a thread, before and after a call of the kind was recorded; also kernels with tensor maps."""
    runs = [(2, 40), (20, 40)] if INTERPRETED else [(1, 256), (20, 256), (600, 256), (600, 33000)]
    for m, n in runs:
        k, dtype = (300, torch.float32) if INTERPRETED else (1024, torch.bfloat16)
        group, linears = operands(k, (n,), 8, rank=32, experts=8)
        packed = triton_backend.pack(group, linears, dtype)
        x, outputs = tokens(m, k, dtype), list[Tensor]()

        def call(x: Tensor = x, outputs: list[Tensor] = outputs, packed: triton_backend.Packed = packed) -> None:
            outputs.append(triton_backend.apply(x, packed))

        for _ in range(2 if INTERPRETED else 6):
            thread = Thread(target=call)
            thread.start()
            thread.join()
        call()
        assert len(outputs) == (3 if INTERPRETED else 7)
        assert all(torch.equal(y, outputs[0]) for y in outputs) and outputs[0].isfinite().all()
        if not INTERPRETED:
            assert packed.operands is not None
            key = (packed.operands.number, x.numel(), k, x.dtype, x.device)
            assert isinstance(recorded._programs[key], recorded.Program)


def a_model_runs_stacked(scheme: str = "W4A6") -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from kernels.case_runs import check_a_stacked_model

    check_a_stacked_model("triton", scheme, DEVICE, EXPERTS_TOLERANCE)


def fp8_model_runs_stacked() -> None:
    a_model_runs_stacked("W4Afp8")


CASES: list[Callable[[], None]] = [
    sizes, parts, few_tokens, few_tokens_whose_codes_are_read, one_token, hard_inputs_of_one_token,
    uncommon_layouts, stacked_linears, sums_are_exact, activation_widths, input_types,
    rotation_and_integer_factors, rotations, shared_expert_that_reads_codes, many_tokens_unsorted,
    all_tokens_to_one_expert, experts_without_tokens,
    ties_go_to_the_first, zero_and_extreme_tokens, non_finite_tokens, inputs_follow_one_another,
    inputs_of_codes_follow_one_another, no_tokens, packing,
    fp8_layers, fp8_codes_of_every_number_and_tie, fp8_weights_are_exact, fp8_shared_expert_that_reads_codes,
    fp8_non_finite_tokens, fp8_inputs_follow_one_another,
    fp8_inputs_of_codes_follow_one_another, large_layers, products_that_settle,
    fp8_products_that_settle, shares_of_every_tile, fp8_shares_of_every_tile,
    dense_projections, few_dense_projections, threads_that_have_not_used_the_gpu,
    a_model_runs_stacked, fp8_model_runs_stacked,
]  # fmt: skip

if __name__ == "__main__":
    for case in CASES:
        if case.__name__ in sys.argv[1:] or not sys.argv[1:]:
            case()
            print(case.__name__, flush=True)
