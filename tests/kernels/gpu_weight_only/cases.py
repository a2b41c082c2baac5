"""Runs the weight-only kernels against the formula in float64: on a GPU, or, with TRITON_INTERPRET=1, on the CPU.

`python cases.py [CASE ...]` prints the name of each case that passed; `test_cases.py` starts it in a
process of its own, because the switch is read when kernels are defined. Cases have no near ties between experts.

Tolerance: activations, hidden values and up factors are rounded to float16, relative to the largest of a token where
they are small, and group scales times codes once more: each term of an output is off by 2^-10 of itself at most, and
`TOLERANCE` is of the root of the sum of the terms' squares, times a few for the tail, plus the output's own rounding.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy
import torch
from torch import Tensor

from quant_experts.kernels import reference
from quant_experts.kernels.gpu import launch
from quant_experts.kernels.gpu.launch import programs
from quant_experts.kernels.gpu_tokens import prepare_launch
from quant_experts.kernels.gpu_tokens.layout import GroupLayout
from quant_experts.kernels.gpu_weight_only import backend as weight_only_backend
from quant_experts.kernels.gpu_weight_only.backend import MANY_TOKENS, SLAB_ROWS
from quant_experts.kernels.gpu_weight_only.layout import pack_codes, unpack_codes
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = 2e-3
EXPERTS_TOLERANCE = TOLERANCE if INTERPRETED else 1.2e-2
"""Of inputs of 16 bits, with experts: on a GPU their down factors are rounded to bfloat16, so that each term of theirs
is off by up to 2^-9 of itself; in these layers experts are most of the output."""
ALL = ("smooth", "shared", "routed", "bias", "asymmetric")


def operands(
    k: int, sizes: tuple[int, ...], bits: int = 4, parts: tuple[str, ...] = ALL, group_size: int | None = 128,
    experts: int = 4, rotation: int = 0, integer_factors: bool = False, rank: int = 5,
) -> tuple[GroupOperands, list[LinearOperands]]:  # fmt: skip
    """A random group and its linears, one for each number of output channels."""
    generator = torch.Generator().manual_seed(k + sum(sizes))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int8).to(DEVICE)

    def factor(part: str, *shape: int) -> Factor | None:
        if part not in parts:
            return None
        if integer_factors:
            return Factor(integers(-127, 128, *shape), (normal(*shape[:-1]).abs() * 0.01 + 0.001).to(DEVICE))
        return Factor(normal(*shape).half().to(DEVICE), None)

    def chosen(part: str, tensor: Tensor) -> Tensor | None:
        return tensor.to(DEVICE) if part in parts else None

    group = GroupOperands(
        16,
        chosen("smooth", normal(k).abs() + 0.5),
        rotation,
        factor("shared", rank, k),
        factor("routed", experts, 3, k),
        chosen("routed", normal(experts, k).half()),
        chosen("routed", normal(experts).half()),
    )
    groups, half = -(-k // (group_size or k)), 2 ** (bits - 1)
    linears = [
        LinearOperands(
            integers(-half, half, n, k),
            (normal(n, groups).abs() * 0.1 + 0.01).bfloat16().float().to(DEVICE),
            chosen("asymmetric", integers(-half, half, n, groups)),
            group_size,
            factor("shared", n, rank),
            factor("routed", experts, n, 3),
            chosen("bias", normal(n)),
        )
        for n in sizes
    ]
    return group, linears


def tokens(m: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(7)).to(dtype).to(DEVICE)


def down_factors(x: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """-> what a layout's down factors read, and those, rounded as they are there: (M, K), (F, R, K) float64."""
    assert layout.projection is not None
    inputs = x if layout.before is None else reference.transform(x, layout.before)
    rows = layout.projection.transpose(0, 1).flatten(1)[: layout.factors * layout.rank, : x.shape[1]]
    return inputs.double(), rows.double().unflatten(0, (layout.factors, layout.rank))


def expected(
    x: Tensor, group: GroupOperands, linear: LinearOperands, layout: GroupLayout | None = None
) -> tuple[Tensor, Tensor]:
    """The format's formula in float64 -> outputs, roots of the sums of the squares of their terms. layout: whose down
    factors are taken instead of the group's."""
    z = reference.transform(x, group)
    weight = linear.codes.double()
    size = linear.group_size or weight.shape[1]
    channel = torch.arange(weight.shape[1], device=weight.device) // size
    if linear.zero_point is not None:
        weight = weight - linear.zero_point.double()[:, channel]
    weight = weight * linear.scale.double()[:, channel]
    exact, squares = z.double(), (z.double().square() @ weight.square().T)
    y = exact @ weight.T
    if group.shared_down is not None and linear.shared_up is not None:
        down, up = group.shared_down.float().double(), linear.shared_up.float().double()
        squares = squares + (exact.square() @ down.T.square()) @ up.T.square()
        read = exact
        if layout is not None:
            read, factors = down_factors(x, layout)
            down = factors[0, : len(down)]
        y = y + read @ down.T @ up.T
    if group.routed_down is not None and linear.routed_up is not None:
        assert group.router_weight is not None and group.router_bias is not None
        chosen = (exact.abs() @ group.router_weight.double().T + group.router_bias.double()).argmin(dim=1)
        down, up = group.routed_down.float().double()[chosen], linear.routed_up.float().double()[chosen]
        read, read_down = exact, down
        if layout is not None:
            read, factors = down_factors(x, layout)
            read_down = factors[layout.factors - layout.experts :, : down.shape[1]][chosen]
        y = y + torch.einsum("mk,mrk,mnr->mn", read, read_down, up)
        squares = squares + torch.einsum("mk,mrk,mnr->mn", exact.square(), down.square(), up.square())
    if linear.bias is not None:
        y, squares = y + linear.bias.double(), squares + linear.bias.double().square()
    return y, squares.sqrt()


def check(x: Tensor, group: GroupOperands, linears: list[LinearOperands]) -> Tensor:
    """Outputs of stacked linears against the formula's, with down factors as given, and as the layout rounds them."""
    packed = weight_only_backend.pack(group, linears, x.dtype)
    y = weight_only_backend.apply(x, packed)
    assert y.dtype == x.dtype
    experts = group.shared_down is not None or group.routed_down is not None
    for layout in (None, packed.group) if experts else (None,):
        pairs = [expected(x, group, linear, layout) for linear in linears]
        value, size = torch.cat([p[0] for p in pairs], dim=1), torch.cat([p[1] for p in pairs], dim=1)
        assert y.shape == value.shape
        error = (y.double() - value).abs()
        rounding = torch.finfo(x.dtype).eps * value.abs() if x.dtype != torch.float32 else 0
        rounded = experts and layout is None and x.dtype != torch.float32
        tolerance = EXPERTS_TOLERANCE if rounded else TOLERANCE
        assert (error <= tolerance * size + rounding + 1e-36).all(), (error / size).max()
    return y


def sizes() -> None:
    for m, k, n, bits in [(1, 45, 11, 3), (13, 300, 70, 4), (35, 600, 33, 3), (1, 1, 1, 4)]:
        check(tokens(m, k), *operands(k, (n,), bits))


def group_sizes() -> None:
    for size in (None, 32, 64, 256):
        for bits in (3, 4):
            assert weight_only_backend.fits((bits, size, False))
            for m in (3,) if INTERPRETED else (3, 20):  # Hopper has two kernels
                check(tokens(m, 530), *operands(530, (9,), bits, ("asymmetric",) if size != 64 else (), size))
    check(tokens(3, 768), *operands(768, (9,), 4, ("asymmetric",), 512))  # the last group is a rest
    for size in (16, 48, 96, 160, 384):
        assert not weight_only_backend.fits((4, size, True))


def few_tokens() -> None:
    """Tiles of each shape that few tokens have on Hopper; groups of whole blocks of 128 channels."""
    large: list[tuple[int, int, int, int | None, tuple[str, ...], int]] = [
        (1, 3584, 4608, 128, ALL, 40), (8, 1024, 17000, 256, ALL, 20), (3, 9216, 96, None, ("shared", "bias"), 200),
        (5, 700, 40, 128, ("routed", "asymmetric"), 40), (2, 512, 17000, 128, (), 0), (7, 9000, 16, 128, ALL, 20),
        (4, 300, 17001, 128, ("shared",), 64), (8, 512, 17000, 128, ALL, 40),
    ]  # fmt: skip
    for i, (m, k, n, size, chosen, rank) in enumerate(large if not INTERPRETED else [(2, 300, 40, 128, ALL, 40)]):
        for bits in (3, 4):
            dtype = torch.float32 if INTERPRETED or i % 2 else torch.bfloat16
            check(tokens(m, k, dtype), *operands(k, (n,), bits, chosen, size, experts=8, rank=rank))


@numpy.errstate(invalid="ignore")  # the interpreter's arithmetic is NumPy's
def products_that_settle() -> None:
    """Experts that are settled in Hopper's linear for a few tokens, against hidden values that were finished before;
    also of an input in between, half of whose tokens are not finite."""
    if INTERPRETED or not launch.hopper(torch.device(DEVICE)):
        return
    for k, n, bits, chosen, rank in (
        (1000, 40, 4, ALL, 20), (512, 17000, 4, ALL, 20), (9000, 33, 4, ("shared",), 64), (512, 17000, 3, ALL, 20),
        (9000, 33, 3, ("shared",), 64),
    ):  # fmt: skip
        packed = weight_only_backend.pack(*operands(k, (n,), bits, chosen, 128, experts=8, rank=rank), torch.bfloat16)
        for m in (1, 2, 8):
            x = tokens(m, k, torch.bfloat16)
            assert weight_only_backend._settles(m, packed), "there would be one way"
            expected = weight_only_backend.linear(weight_only_backend.prepare(x, packed.group), packed.linear)
            first = weight_only_backend.apply(x, packed)
            error = (first.double() - expected.double()).norm(dim=1)
            assert (error <= TOLERANCE * expected.double().norm(dim=1)).all(), (m, k, error)
            broken = x.clone()
            broken[::2, -1] = torch.inf
            for _ in range(4):
                assert torch.equal(weight_only_backend.apply(x, packed), first)
                y = weight_only_backend.apply(broken, packed)
                assert y[::2].isnan().all() and torch.equal(y[1::2], first[1::2])


def parts() -> None:
    for m, chosen in [(5, ("smooth", "shared")), (18, ("routed",)), (18, ("shared", "bias")), (5, ("bias",))]:
        check(tokens(m, 140), *operands(140, (33,), parts=chosen))


def without_rounding_of_weights() -> None:
    """Activations that float16 holds: what is left is that of scales times codes."""
    for bits in (3, 4):
        group, linears = operands(300, (40,), bits, ("asymmetric",), None)
        packed = weight_only_backend.pack(group, linears)
        for x in (tokens(4, 300), tokens(20, 300)):
            x = x.mul(8).round()
            value, size = expected(x, group, linears[0])
            assert ((weight_only_backend.apply(x, packed).double() - value).abs() <= 2e-6 * size).all()


def stacked_linears() -> None:
    for bits in (3, 4):
        group, linears = operands(300, (33, 7, 20), bits)
        linears[1] = replace(linears[1], bias=None)
        x = tokens(5, 300)
        y = check(x, group, linears)
        packed = weight_only_backend.pack(group, linears)
        assert torch.equal(weight_only_backend.apply(x, packed), y), "a second launch must find clean workspaces"
        for rows, linear in zip([slice(0, 33), slice(33, 40), slice(40, 60)], linears, strict=True):
            assert torch.equal(weight_only_backend.codes(packed, rows, 300), linear.codes)
            alone = weight_only_backend.linear(weight_only_backend.prepare(x, group), linear)
            # A GPU may take another kernel for few rows.
            close = 1e-5 if INTERPRETED or bits == 3 else TOLERANCE * float(y.abs().max())
            torch.testing.assert_close(alone, y[:, rows], rtol=close, atol=close)


def input_types() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        check(tokens(9, 45, dtype), *operands(45, (11,)))


@numpy.errstate(invalid="ignore", over="ignore")  # the interpreter's arithmetic is NumPy's
def rotation_and_integer_factors() -> None:
    check(tokens(4, 192), *operands(192, (33,), integer_factors=True))
    check(tokens(18, 192), *operands(192, (33,), 3, rotation=64, integer_factors=True, rank=40))
    for rotation, k in [(16, 48), (64, 320), (128, 128), (8, 24)]:
        parts = ("smooth", "shared", "asymmetric")
        check(tokens(3, k), *operands(k, (9,), parts=parts, rotation=rotation, integer_factors=True))
    x = tokens(3, 320)
    x[0, 70], x[2] = torch.inf, x[2] * 1e30
    y = check(x[1:], *operands(320, (9,), parts=("shared",), rotation=64))
    group, linears = operands(320, (9,), parts=("shared",), rotation=64)
    other = weight_only_backend.apply(x, weight_only_backend.pack(group, linears))
    assert other[0].isnan().all() and torch.equal(other[1:], y)
    x = tokens(3, 320) * 2e37  # sums of 64 of them are beyond float32, eighths of them are not
    prepared, expected = weight_only_backend.prepare(x, group), reference.transform(x, group)
    assert prepared.codes is not None and prepared.token_scale is not None
    values = prepared.codes[:, :320].double() * prepared.token_scale.double()
    assert ((values - expected.double()).abs() <= 2**-10 * expected.abs().amax()).all()


def experts_are_the_oracles() -> None:
    for m, experts in [(7, 4), (20, 5), (5, 17)]:
        group, _ = operands(300, (11,), experts=experts)
        ours, plain = weight_only_backend.prepare(tokens(m, 300), group), reference.prepare(tokens(m, 300), group)
        assert ours.expert is not None and plain.expert is not None
        assert torch.equal(ours.expert.long(), plain.expert)


def one_expert_for_all_and_ties() -> None:
    group, linears = operands(45, (40,))
    assert group.router_weight is not None and group.router_bias is not None
    for only in (0, 3):
        group.router_bias[:] = 1000
        group.router_bias[only] = -1000
        ours = weight_only_backend.prepare(tokens(6, 45), group)
        assert ours.expert is not None and set(ours.expert.tolist()) == {only}
        check(tokens(6, 45), group, linears)
    group.router_weight[:] = 1
    group.router_bias[:] = torch.tensor([1.0, 0, 0, 0])
    ours = weight_only_backend.prepare(tokens(6, 45), group)
    assert ours.expert is not None and ours.expert.tolist() == [1] * 6


@numpy.errstate(over="ignore")
def zero_and_extreme_tokens() -> None:
    x = tokens(7, 45)
    x[1] = 0
    x[2] *= 1e30
    x[3] *= 1e-20
    x[4] *= 1e-37
    x[5] *= 1e-42  # subnormal
    x[6] = x[6].clamp(-1, 1) * 1e-3
    x[6, 0] = 2.5e36  # whose projection float32 holds
    group, linears = operands(45, (40,), parts=("shared", "bias", "asymmetric"))
    up = linears[0].shared_up
    assert up is not None
    linears = [replace(linears[0], scale=linears[0].scale * 2**-8, shared_up=Factor(up.values * 2**-8, None))]
    y = check(x, group, linears)
    assert torch.equal(y[1], linears[0].bias)


@numpy.errstate(invalid="ignore")  # the interpreter's arithmetic is NumPy's
def non_finite_tokens() -> None:
    group, linears = operands(45, (40,))
    packed = weight_only_backend.pack(group, linears)
    clean = weight_only_backend.apply(tokens(7, 45), packed)
    x = tokens(7, 45)
    x[1, 17], x[2, 0], x[5, 44] = torch.nan, torch.inf, -torch.inf
    y = weight_only_backend.apply(x, packed)
    assert y[[1, 2, 5]].isnan().all()
    assert torch.equal(y[[0, 3, 4, 6]], clean[[0, 3, 4, 6]])


def no_tokens() -> None:
    group, linears = operands(45, (11,))
    assert weight_only_backend.apply(tokens(0, 45), weight_only_backend.pack(group, linears)).shape == (0, 11)


def packing() -> None:
    for n, k in [(1, 1), (3, 128), (5, 200), (2, 257)]:
        for half in (2, 4, 8):
            generator = torch.Generator().manual_seed(k)
            codes = torch.randint(-half, half, (n, k), generator=generator, dtype=torch.int8)
            codes[0, 0] = -half
            low, high = pack_codes(codes)
            steps = -(-k // 256)
            assert low.shape == (steps if half < 8 else 2 * steps, n, 32) and low.dtype == torch.int16
            assert (high is None) == (half == 8)
            assert high is None or (high.shape == low.shape and high.dtype == torch.int8)
            assert torch.equal(unpack_codes(low, high, k), codes)
            assert int(low[0, 0, 0]) & 3 == (-half + (4 if half < 8 else 8)) & 3


@numpy.errstate(invalid="ignore", over="ignore")
def many_tokens() -> None:
    """Weights dequantized in memory, slab by slab."""
    m, two_slabs = MANY_TOKENS + 3, SLAB_ROWS * programs(torch.device(DEVICE)) + 40
    for dtype in (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16):
        for bits in (4,) if INTERPRETED else (3, 4):  # on Hopper those of 3 bits only
            check(tokens(m, 300, dtype), *operands(300, (two_slabs - 33, 33), bits))
        check(tokens(m, 300, dtype), *operands(300, (33, 7), 3, experts=5, rotation=4))
        for bits, size, rotation in [(4, None, 64), (3, 32, 128), (3, 256, 0), (4, 512, 0)]:
            parts = ("shared", "asymmetric") if rotation else ("smooth",)
            check(tokens(m, 640, dtype), *operands(640, (48,), bits, parts, size, rotation=rotation, rank=40))
        x = tokens(m, 300, dtype)
        little, much = (1e-4, 4) if dtype == torch.float16 else (1e-30, 1e30)
        x[0], x[1], x[2:, 11] = x[0] * little, x[1] * much, x[2:, 11] * 30
        check(x, *operands(300, (33,), parts=("smooth", "shared")))
    group, linears = operands(300, (33, 7), parts=("routed", "bias"))
    x = tokens(m, 300, torch.float16)
    x[1, 17], x[2, 0], x[5] = torch.nan, torch.inf, 0
    y = weight_only_backend.apply(x, weight_only_backend.pack(group, linears, x.dtype))
    assert y[1:3].isnan().all() and y[[0, *range(3, m)]].isfinite().all()
    alone = weight_only_backend.linear(weight_only_backend.prepare(x, group), linears[1])
    torch.testing.assert_close(alone[3:], y[3:, 33:], rtol=2e-3, atol=2e-3)


def the_largest_outputs_of_many_tokens() -> None:
    """Codes and zero points at opposite ends, tokens just below the next power of two, alone and with experts."""
    x = torch.full((MANY_TOKENS, 512), 1.999, device=DEVICE, dtype=torch.float16)
    for bits, part in product((3, 4), ((), ("shared",))):
        group, linears = operands(512, (9,), bits, parts=("asymmetric", *part))
        (linear,) = linears
        assert linear.zero_point is not None
        linear.codes.fill_(2 ** (bits - 1) - 1)
        linear.zero_point.fill_(-(2 ** (bits - 1)))
        linear.scale.fill_(0.5 - 2**-10)
        check(x, group, linears)


def inputs_follow_one_another() -> None:
    """Kernels overlap and wait for nobody: an input's outputs are its own, in graphs as well."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from kernels.case_runs import check_inputs_that_follow_one_another

    sizes = [(2, 300, 40, torch.float32), (17, 300, 40, torch.float32)]
    if not INTERPRETED:
        sizes = [(3, 700, 90, torch.float32), (40, 700, 90, torch.float32), (MANY_TOKENS, 700, 90, torch.bfloat16)]
        sizes += [(m, 3584, 4096, torch.bfloat16) for m in (1, 4, 8, 9)] + [(2, 512, 17920, torch.bfloat16)]
    for m, k, n, dtype in sizes:
        packed = weight_only_backend.pack(*operands(k, (n,)), dtype)
        inputs = [tokens(m, k, dtype) * factor for factor in ((1, -3) if INTERPRETED else (1, -3, 0.01, 1))]
        check_inputs_that_follow_one_another(lambda x, packed=packed: weight_only_backend.apply(x, packed), inputs)


def large_sizes() -> None:
    """Every tile that a GPU uses."""
    if INTERPRETED:
        return
    for bits in (3, 4):
        for m in (1, 16, 17, 40, 100, 300, 1500):
            check(tokens(m, 1536), *operands(1536, (640, 200), bits, rank=32, experts=8))
    check(tokens(2100, 1536), *operands(1536, (3900,), rank=32, experts=8))
    check(tokens(2100, 1536, torch.bfloat16), *operands(1536, (3900,), rank=32, experts=8))
    check(
        tokens(2, 1536, torch.bfloat16), *operands(1536, (640,), rotation=64, parts=("shared", "asymmetric"), rank=64)
    )


def every_tile() -> None:
    """Hopper's persistent kernel with each of its tiles, shared with one of two kinds of weights and whole with the
    other, of tokens sorted by expert, and of groups of 32 channels. Outputs are not numbers before."""
    if INTERPRETED or not launch.hopper(torch.device(DEVICE)):
        return
    from quant_experts.kernels.gpu.hopper_tiles import Tile
    from quant_experts.kernels.gpu_weight_only import hopper_launch

    sizes: list[tuple[int, int, int, int, int, tuple[str, ...]]] = [
        (300, 1000, 701, 4, 128, ALL), (77, 768, 301, 3, 32, ("asymmetric",)),
    ]  # fmt: skip
    for i, (m, k, n, bits, size, chosen) in enumerate(sizes):
        group, linears = operands(k, (n,), bits, chosen, size, experts=8, rank=40)
        x, packed = tokens(m, k), weight_only_backend.pack(group, linears)
        value, terms = expected(x, group, linears[0])
        prepared = prepare_launch.prepare(x, packed.group, sorts="routed" in chosen)
        _, factors = weight_only_backend._factors(prepared, packed.linear)
        fixed = dict(
            FACTORS=factors["F"], RANK=factors["R"], SORTED=prepared.order is not None,
            LATER=prepared.hidden_comes_later, **hopper_launch.weight_flags(packed.linear),
        )  # fmt: skip
        times = hopper_launch.TIMES if bits == 4 else hopper_launch.TIMES_OF_3_BITS
        for j, (rows, columns) in enumerate(times.steps):
            y = torch.full((m, n), torch.nan, device=DEVICE)
            config = hopper_launch.tile(Tile(rows, columns, (i + j) % 2 == 0), y.element_size(), **fixed)
            hopper_launch.linear(prepared, packed.linear, y, config)
            assert ((y.double() - value).abs() <= TOLERANCE * terms).all(), (m, rows, columns)


def sorted_tokens() -> None:
    """As many outputs and tokens as are sorted for."""
    if INTERPRETED:
        return
    m, n = 2100, 11000
    group, linears = operands(640, (n,), experts=8, rank=32)
    packed = weight_only_backend.pack(group, linears)
    assert prepare_launch.sorts_tokens(packed.group.kind, m, n)
    check(tokens(m, 640), group, linears)


def a_model_runs_stacked() -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from kernels.case_runs import check_a_stacked_model

    for scheme in ("W4A16", "W3A16g32"):
        check_a_stacked_model("triton-weight-only", scheme, DEVICE, TOLERANCE)


CASES: list[Callable[[], None]] = [
    sizes, group_sizes, few_tokens, products_that_settle, parts, without_rounding_of_weights, stacked_linears,
    input_types,
    rotation_and_integer_factors, experts_are_the_oracles, one_expert_for_all_and_ties, zero_and_extreme_tokens,
    non_finite_tokens, no_tokens, packing, many_tokens, the_largest_outputs_of_many_tokens, inputs_follow_one_another,
    large_sizes, every_tile, sorted_tokens, a_model_runs_stacked,
]  # fmt: skip

if __name__ == "__main__":
    for case in CASES:
        if case.__name__ in sys.argv[1:] or not sys.argv[1:]:
            case()
            print(case.__name__, flush=True)
