"""The weight-only kernels against float64, in Triton's interpreter on the CPU, and on a GPU where there is one."""

from itertools import product

import pytest
import torch
from kernels.case_runs import run_in_the_interpreter, run_on_the_gpu

from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("gpu_weight_only")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    run_on_the_gpu("gpu_weight_only")


@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 64, 100, 2048])
@pytest.mark.parametrize("rows", [11, 4608, 37888])
@pytest.mark.parametrize("bits", [3, 4])
def test_tiles_fit_the_chip(tokens: int, bits: int, rows: int) -> None:
    """The copies ahead of each tile stay inside a Hopper multiprocessor's shared memory; its sizes fit matrix units."""
    from quant_experts.kernels.gpu_weight_only.backend import STEP, tile_for

    tile = tile_for(tokens, rows, bits, 132)
    codes, values = tile.rows * STEP[bits] * bits // 8, 2 * STEP[bits] * tile.tokens
    scales = 4 * tile.rows * STEP[bits] // 128
    assert tile.stages * values + (tile.stages - 1) * (codes + scales) <= 227 * 1024
    assert tile.rows % 64 == 0 and tile.tokens % 16 == 0


@pytest.mark.parametrize("output_bytes", [2, 4])
@pytest.mark.parametrize(("bits", "pieces"), [(4, 4), (3, 8)])
def test_rings_fit_the_chip(bits: int, pieces: int, output_bytes: int) -> None:
    """Of Hopper's persistent kernel, beside what reorders outputs; a step's values fit their ring, or nobody would ever
    free a slot of it."""
    from quant_experts.kernels.gpu.hopper_tiles import Tile
    from quant_experts.kernels.gpu_weight_only.hopper_launch import TIMES, TIMES_OF_3_BITS, tile

    times = TIMES if bits == 4 else TIMES_OF_3_BITS
    for (rows, tokens), groups in product(times.steps, (1, 2, pieces)):
        flags = dict(BITS=bits, PIECES=pieces, PER=pieces // groups, GROUPS=groups)
        c = tile(Tile(rows, tokens, True), output_bytes, FACTORS=0, RANK=32, BIAS=False, **flags)
        weights = rows * (64 + 32 * (bits == 3) + 4 * groups)
        rings = c.STAGES.value * weights + c.VALUE_STAGES.value * tokens * 128
        assert c.STAGES.value >= 1 and c.VALUE_STAGES.value >= pieces // 2
        assert rings + {2: 5_000, 4: 33_200}[output_bytes] <= 232_448, "what the compiler was seen to add"


@pytest.mark.parametrize(
    ("m", "n", "steps", "expected"),
    [(16, 37888, 28, (256, 16)), (64, 4608, 28, (128, 64)), (512, 3584, 28, (128, 128)), (2048, 37888, 28, (256, 128))],
)
def test_tiles_are_chosen_by_shape(m: int, n: int, steps: int, expected: tuple[int, int]) -> None:
    """As they were fastest on an H200 (gpu_tiles_weight_only.json)."""
    from quant_experts.kernels.gpu_weight_only.hopper_launch import config

    c = config(m, n, steps, BITS=4, PIECES=4, PER=4, GROUPS=1, FACTORS=0, RANK=32, BIAS=False)
    assert (c.BN.value, c.BM.value) == expected


@pytest.mark.parametrize(
    ("hopper", "bits", "m", "dtype", "expected"),
    [
        (True, 4, 8, torch.bfloat16, "few"), (True, 4, 9, torch.bfloat16, "streams"),
        (True, 4, 5000, torch.bfloat16, "streams"), (True, 4, 5000, torch.float32, "streams"),
        (True, 3, 8, torch.bfloat16, "few"), (True, 3, 511, torch.bfloat16, "streams"),
        (True, 3, 512, torch.bfloat16, "memory"), (True, 3, 512, torch.float32, "streams"),
        (False, 4, 8, torch.bfloat16, "registers"), (False, 3, 8, torch.bfloat16, "registers"),
        (False, 4, 512, torch.bfloat16, "memory"), (False, 3, 512, torch.float32, "registers"),
    ],
)  # fmt: skip
def test_who_multiplies(
    monkeypatch: pytest.MonkeyPatch, hopper: bool, bits: int, m: int, dtype: torch.dtype, expected: str
) -> None:
    from quant_experts.kernels.gpu_tokens.layout import Tokens
    from quant_experts.kernels.gpu_weight_only import backend, hopper_launch
    from quant_experts.kernels.gpu_weight_only.layout import pack_linear
    from quant_experts.kernels.operands import LinearOperands

    called: list[str] = []
    monkeypatch.setattr(backend, "hopper", lambda device: hopper)
    monkeypatch.setattr(backend, "MANY_TOKENS", 512)
    monkeypatch.setattr(hopper_launch, "linear", lambda *_: called.append("streams"))
    for name in ("few", "memory", "registers"):
        function = "_linear_few" if name == "few" else f"_linear_in_{name}"
        monkeypatch.setattr(backend, function, lambda *_, name=name: called.append(name))
    codes = torch.full((40, 256), -8 if bits == 4 else 0, dtype=torch.int8)
    layout = pack_linear([LinearOperands(codes, torch.ones(40, 2), None, 128, None, None, None)], 1.0)
    values = torch.zeros(m, 256, dtype=torch.float16)
    tokens = Tokens(None, values, torch.ones(m, 1), None, None, None, dtype=dtype)
    assert backend.linear(tokens, layout).shape == (m, 40) and called == [expected]


@pytest.mark.parametrize(
    ("n", "width", "rows"),
    [(37888, 3648, 8448), (3584, 19008, 3584), (8192, 29856, 2048), (59136, 8480, 8448), (11, 256, 256)],
)
def test_slabs_fill_the_chip_and_fit_the_workspace(n: int, width: int, rows: int) -> None:
    """Groups of 7B and 72B models: whole waves of 132 multiprocessors, or equal parts."""
    from quant_experts.kernels.gpu_weight_only.backend import WORKSPACE, slab_rows

    assert slab_rows(n, width, 132) == rows and 2 * rows * width <= WORKSPACE


def test_the_table_names_the_backend_for_gpus() -> None:
    from quant_experts.kernels.dispatch import BACKENDS

    backend = next(b for b in BACKENDS if b.name == "triton-weight-only")
    assert backend.device == "cuda" and backend.activations == ("values",) and backend.layout is not None
    for bits in (3, 4):
        assert backend.fits((bits, 128, False)) and backend.fits((bits, None, True))
    assert not backend.fits((8, 128, False)) and not backend.fits((4, 16, True))


@pytest.mark.parametrize(
    ("bits", "n", "k", "static_rank", "expected"),
    [  # warps, steps at a time, registers
        (4, 37888, 3584, 0, (1, 2, None)), (4, 37888, 3584, 64, (2, 1, 56)), (4, 37888, 3584, 128, (2, 1, None)),
        (3, 37888, 3584, 0, (1, 1, None)), (3, 37888, 3584, 64, (2, 1, None)), (3, 37888, 3584, 128, (2, 1, None)),
        (4, 3584, 18944, 64, (8, 5, 128)), (3, 3584, 18944, 0, (8, 2, 128)),
        (4, 8192, 8192, 0, (4, 7, None)), (3, 16, 256, 64, (4, 4, None)),
    ],
)  # fmt: skip
def test_tiles_of_a_few_tokens(
    bits: int, n: int, k: int, static_rank: int, expected: tuple[int, int, int | None]
) -> None:
    """As they were fastest on an H200; limits of registers leave a multiprocessor room for each program's warps."""
    from quant_experts.kernels.gpu_weight_only.backend import few_tile

    assert few_tile(bits, n, k, static_rank, 132) == expected


@pytest.mark.parametrize(
    ("m", "n", "group_size", "parts", "rank", "few", "settled"),
    [
        (1, 16, 128, ("shared",), 64, True, True),
        (8, 40, 256, ("shared", "routed"), 32, True, True),  # nine factors of rank 32
        (8, 40, 128, ("shared", "routed"), 33, False, False),  # of rank 64: too many ranks at once
        (1, 40, 128, ("shared", "routed"), 33, True, True),
        (1, 40, 128, ("shared",), 65, True, False),
        (1, 40, 128, (), 0, True, False),
        (9, 40, 128, ("shared",), 64, False, False),
        (0, 40, 128, ("shared",), 64, False, False),
        (1, 15, 128, ("shared",), 64, False, False),
        (1, 40, 64, ("shared",), 64, False, False),
    ],
)
def test_who_multiplies_a_few_tokens(
    monkeypatch: pytest.MonkeyPatch, m: int, n: int, group_size: int, parts: tuple[str, ...], rank: int, few: bool,
    settled: bool,
) -> None:  # fmt: skip
    """And whether it settles experts: never where another kernel multiplies, which would read hidden values."""
    from quant_experts.kernels.gpu_weight_only import backend

    experts = 8 if "routed" in parts else 0

    def factor(part: str, *shape: int) -> Factor | None:
        return Factor(torch.ones(shape).half(), None) if part in parts else None

    router = (torch.ones(experts, 512), torch.ones(experts)) if experts else (None, None)
    factors = factor("shared", rank, 512), factor("routed", experts, rank, 512)
    group = GroupOperands(16, torch.ones(512), 0, *factors, *router)
    ups = factor("shared", n, rank), factor("routed", experts, n, rank)
    codes = torch.full((n, 512), -8, dtype=torch.int8)
    linear = LinearOperands(codes, torch.ones(n, 512 // group_size), None, group_size, *ups, None)
    packed = backend.pack(group, [linear], torch.float32)
    assert not backend._takes_few(m, packed.linear, experts), "only Hopper has the kernel"
    monkeypatch.setattr(backend, "hopper", lambda device: True)
    assert backend._takes_few(m, packed.linear, experts) == few
    assert backend._settles(m, packed) == settled
