"""The Triton kernels against the oracle, in Triton's interpreter on the CPU, and on a GPU where there is one."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernels.case_runs import run_in_the_interpreter, run_on_the_gpu


def test_in_the_interpreter() -> None:
    run_in_the_interpreter("gpu_weight_activation")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    run_on_the_gpu("gpu_weight_activation")


@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 64, 100, 128, 200, 512, 2048, 100_000])
@pytest.mark.parametrize("shape", [(11, 128), (4608, 3584), (37888, 3584), (3584, 18944)])
def test_tiles_fit_the_chip(tokens: int, shape: tuple[int, int]) -> None:
    """Ring and registers of each configuration stay inside a Hopper multiprocessor's shared memory and registers."""
    from quant_experts.kernels.gpu.launch import LARGEST_TILE
    from quant_experts.kernels.gpu_weight_activation.hopper_launch import config

    n, k = shape
    c = config(tokens, n, -(-k // 128) * 128, 9, 32, BIAS=True, SORTED=tokens > 256)
    assert c.STAGES.value * (c.BN.value + 2 * c.BM.value) * 64 <= 200 * 1024
    assert c.BN.value * c.BM.value <= LARGEST_TILE
    assert 12 * 32 * c.LAUNCH_REGISTERS.value <= 65536
    assert c.BM.value >= 16 and c.BN.value % 128 == 0


def rows_on_no_device(n: int, k: int) -> Any:
    from quant_experts.kernels.gpu_weight_activation.layout import LinearLayout

    weight = torch.empty(k // 128, n, 64, dtype=torch.int8, device="meta")
    return LinearLayout(weight, torch.empty(n, device="meta"), None, None)


@pytest.mark.parametrize(
    ("tokens", "shape", "experts", "rank", "code_type", "few", "expected"),
    [
        (8, (4608, 3584), 8, 32, torch.int8, True, True),
        (16, (4608, 3584), 8, 32, torch.int8, True, True),
        (17, (4608, 3584), 8, 32, torch.int8, False, True),
        (8, (37888, 3584), 8, 32, torch.int8, True, True),  # large
        (9, (37888, 3584), 8, 32, torch.int8, False, True),
        (8, (10240, 8192), 8, 32, torch.int8, True, True),
        (9, (10240, 8192), 8, 32, torch.int8, False, True),
        (64, (37888, 3584), 8, 32, torch.int8, False, True),
        (65, (37888, 3584), 8, 32, torch.int8, False, False),
        (64, (37888, 3584), 8, 32, torch.float8_e4m3fn, False, True),
        (1, (4608, 3584), 8, 128, torch.int8, True, False),  # values of experts of a high rank
        (4, (4608, 3584), 8, 128, torch.int8, False, True),  # more ranks than registers hold
        (1, (4608, 3584), 8, 32, torch.float8_e4m3fn, False, False),
        (9, (4608, 3584), 8, 32, torch.float8_e4m3fn, False, True),
        (1, (31, 128), 0, 64, torch.int8, False, True),  # fewer rows than a tile
        (8, (4608, 3584), 2, 64, torch.int8, True, True),
        # an expert that reads codes
        (16, (4608, 3584), 0, 64, torch.int8, True, True),
        (16, (4608, 3584), 0, 128, torch.int8, True, True),
        (1, (4608, 3584), 0, 512, torch.int8, False, True),
        (8, (37888, 3584), 0, 64, torch.int8, True, True),
        (9, (37888, 3584), 0, 64, torch.int8, False, True),
        (8, (3584, 18944), 0, 64, torch.int8, True, True),
        (9, (3584, 18944), 0, 64, torch.int8, False, True),
        (9, (3584, 18944), 0, 128, torch.int8, False, True),
        (8, (8192, 29568), 0, 64, torch.int8, True, True),
        (9, (8192, 29568), 0, 64, torch.int8, False, True),  # long
        (100_000, (3584, 18944), 0, 64, torch.int8, False, True),
        (8, (3584, 18944), 0, 64, torch.float8_e4m3fn, False, False),
        (65, (3584, 18944), 0, 64, torch.float8_e4m3fn, False, True),
        (64, (3584, 18944), 8, 32, torch.float8_e4m3fn, False, True),
        (65, (3584, 18944), 8, 32, torch.float8_e4m3fn, False, False),
    ],
)
def test_which_linears_settle(
    monkeypatch: pytest.MonkeyPatch, tokens: int, shape: tuple[int, int], experts: int, rank: int,
    code_type: torch.dtype, few: bool, expected: bool,
) -> None:  # fmt: skip
    """On Hopper the linear chooses experts itself where that is faster; elsewhere none does."""
    from quant_experts.kernels.gpu_tokens.layout import Kind
    from quant_experts.kernels.gpu_weight_activation import backend as triton_backend
    from quant_experts.kernels.gpu_weight_activation import few_launch

    kind = Kind(127, code_type, False, 0, experts + 1, experts, rank, (experts + 1) * rank, 2, experts == 0)
    linear = replace(rows_on_no_device(*shape), up=torch.empty(0, device="meta"))
    packed: Any = SimpleNamespace(group=SimpleNamespace(kind=kind), linear=linear)
    assert not triton_backend._settles(tokens, packed, False)
    monkeypatch.setattr(triton_backend, "hopper", lambda device: True)
    monkeypatch.setattr(few_launch, "programs", lambda device: 132)
    ranks = triton_backend._ranks(kind.factors, kind.experts, kind.rank, tokens)
    assert few_launch.takes_few(tokens, code_type, linear, ranks) == few
    assert triton_backend._settles(tokens, packed, False) == expected
    assert not triton_backend._settles(tokens, packed, True)  # sorted
    packed.linear = replace(linear, up=None)  # linears of the group differ in having experts
    assert not triton_backend._settles(tokens, packed, False)


def test_tokens_that_nobody_would_settle_are_refused() -> None:
    """fp8 codes left to a linear on Hopper, by a layout for another device; unsettled tokens for a linear that does not
    settle. Both would lose their experts in silence."""
    from quant_experts.kernels.gpu_tokens import prepare_launch
    from quant_experts.kernels.gpu_tokens.layout import Tokens, pack_group
    from quant_experts.kernels.gpu_weight_activation import backend as triton_backend
    from quant_experts.kernels.operands import Factor, GroupOperands

    down = Factor(torch.ones(32, 256, dtype=torch.int8), torch.ones(32))
    group = GroupOperands(8, torch.ones(256), 0, down, None, None, None, True, "fp8")
    layout = pack_group(group, torch.bfloat16, torch.device("cpu"))
    assert layout.fp8_projection is None
    with pytest.raises(AssertionError, match="nobody would project"):
        prepare_launch.prepare(torch.ones(17, 256, dtype=torch.bfloat16), layout, settled=False)
    linear = replace(rows_on_no_device(64, 256), up=torch.empty(1, 64, 32, device="meta"))
    codes, scale = torch.zeros(9, 256, dtype=torch.int8), torch.ones(9, 1)
    for unsettled in (dict(sums=torch.zeros(1, 9, 32)), dict(projection=layout.projection)):
        tokens = Tokens(None, codes, scale, None, None, None, **unsettled)
        for multiply in (triton_backend._linear_few, triton_backend._plain_linear):
            with pytest.raises(AssertionError):
                multiply(tokens, linear, torch.empty(9, 64))


@pytest.mark.parametrize("kind", ["none", "projects", "settles"])
@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("shape", [(32, 128), (4608, 3584), (37888, 3584), (3584, 18944), (59136, 8192), (8192, 29568)])
def test_what_few_tokens_ask_for_fits_registers(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], tokens: int, kind: str
) -> None:
    """Weights that a thread asks for ahead leave it half of its registers, and no tile has more rows than a layout."""
    from quant_experts.kernels.gpu_weight_activation import few_launch
    from quant_experts.kernels.gpu_weight_activation.few_launch import LEAST_ROWS

    monkeypatch.setattr(few_launch, "programs", lambda device: 132)
    n, _ = shape
    layout = rows_on_no_device(*shape)
    rows, ways, ahead, most = few_launch.few_tile(tokens, layout, 64 * (kind != "none"), kind == "projects")
    assert ahead * rows * 64 // (32 * 4) <= (most or 256) // 2
    assert 32 * ways * (most or 255) <= 65536
    assert 16 <= rows <= LEAST_ROWS <= n


@pytest.mark.parametrize(
    ("tokens", "shape", "ranks", "projects", "expected"),
    [  # rows, warps, blocks at a time and registers, where outputs are very many
        (4, (37888, 3584), 0, False, (16, 2, 1, 56)),
        (1, (37888, 3584), 64, True, (16, 2, 1, 56)),
        (1, (37888, 3584), 128, True, (16, 2, 1, None)),
        (4, (37888, 3584), 288, False, (32, 2, 2, None)),  # whose 14 turns are no multiple of four
        (5, (37888, 3584), 288, False, (16, 2, 4, None)),
        (1, (28672, 4096), 288, False, (16, 2, 4, None)),
        (1, (17920, 1536), 288, False, (16, 2, 3, None)),
        (1, (59136, 8192), 0, False, (16, 2, 8, None)),
        (1, (59136, 8192), 64, True, (32, 1, 2, None)),
    ],
)
def test_tiles_of_very_many_outputs(
    monkeypatch: pytest.MonkeyPatch, tokens: int, shape: tuple[int, int], ranks: int, projects: bool,
    expected: tuple[int, int, int, int | None],
) -> None:  # fmt: skip
    from quant_experts.kernels.gpu_weight_activation import few_launch

    monkeypatch.setattr(few_launch, "programs", lambda device: 132)
    assert few_launch.few_tile(tokens, rows_on_no_device(*shape), ranks, projects) == expected


@pytest.mark.parametrize(
    ("tokens", "ranks", "projects", "warps"),
    [(1, 0, False, 8), (1, 288, False, 8), (2, 288, False, 4), (1, 64, True, 4)],  # registers decide what is best
)
def test_warps_of_long_tokens(
    monkeypatch: pytest.MonkeyPatch, tokens: int, ranks: int, projects: bool, warps: int
) -> None:
    from quant_experts.kernels.gpu_weight_activation import few_launch

    monkeypatch.setattr(few_launch, "programs", lambda device: 132)
    assert few_launch.few_tile(tokens, rows_on_no_device(3584, 18944), ranks, projects)[1] == warps


@pytest.mark.parametrize(
    ("shape", "experts", "rotation", "expected"),
    [
        ((4608, 3584), False, 0, True),
        ((4608, 3584), False, 64, True),
        ((37888, 3584), False, 0, True),
        ((1024, 8192), False, 64, True),
        ((512, 100), False, 0, True),
        ((37888, 3584), False, 64, False),  # too many programs that would rotate
        ((3584, 18944), False, 0, False),  # more than registers hold
        ((31, 128), False, 0, False),  # fewer rows than a tile
        ((4608, 3584), True, 0, False),
    ],
)
def test_which_groups_of_one_token_take_one_launch(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], experts: bool, rotation: int, expected: bool
) -> None:
    from quant_experts.kernels.gpu_tokens.layout import Kind
    from quant_experts.kernels.gpu_weight_activation import alone_launch, few_launch

    monkeypatch.setattr(alone_launch, "options", lambda device: {})
    monkeypatch.setattr(few_launch, "programs", lambda device: 132)
    n, k = shape
    kind = Kind(127, torch.int8, True, rotation, int(experts), 0, 32, 32 * experts, 1, experts)
    device = torch.device("cuda:9")  # a key of its own among the decisions that are kept
    blocks = -(-k // 128)
    assert alone_launch.is_fastest(kind, n, blocks, device) == expected
    fp8 = kind._replace(code_type=torch.float8_e4m3fn)
    assert not alone_launch.is_fastest(fp8, n, blocks, device)
    if expected:  # every block has a turn, and shared memory holds them
        c = alone_launch.constants(kind, n, blocks, device)
        turns = -(-blocks // c["WAYS"])
        assert c["TURNS"] % 2 == 0 and c["TURNS"] * c["WAYS"] * 128 <= 48 * 1024
        assert c["PARTS"] * c["WAYS"] * 256 >= blocks * 128 and c["TURNS"] >= 2 * c["PARTS"]
        assert c["TURNS"] >= -(-turns // c["AHEAD"]) * c["AHEAD"] and c["ONCE"] == (turns <= c["AHEAD"])


@pytest.mark.parametrize(
    ("tokens", "shape", "fp8", "expected"),
    [  # rows, tokens, whether fewer tiles than multiprocessors are shared
        (20, (3584, 3584), False, (128, 32, True)),
        (48, (28672, 4096), False, (256, 64, False)),  # tokens that are no power of two have a tile that holds them
        (63, (3584, 18944), False, (128, 64, True)),
        (100, (28672, 4096), False, (256, 128, False)),
        (100, (37888, 3584), False, (128, 128, False)),
        (512, (3584, 3584), False, (128, 128, False)),
        (1025, (1536, 1536), False, (128, 128, False)),  # not 54 large tiles
        (8192, (37888, 3584), False, (256, 128, False)),
        (8192, (37888, 3584), True, (256, 128, False)),
        (8192, (3584, 18944), True, (256, 128, False)),
    ],
)
def test_tiles_of_shapes(tokens: int, shape: tuple[int, int], fp8: bool, expected: tuple[int, int, bool]) -> None:
    from quant_experts.kernels.gpu_weight_activation.hopper_launch import config

    c = config(tokens, *shape, 0, 32, BIAS=False, SORTED=False, FP8=fp8)
    assert (c.BN.value, c.BM.value, c.SHARES.value) == expected


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("k", "expected"), [(10_240, (True, 0)), (10_368, (False, 80))])
def test_what_is_left_to_the_matrix_units(k: int, expected: tuple[bool, int], fp8: bool) -> None:
    """In tiles of 256 rows, of fp8 products: sums of 10,240 channels."""
    from quant_experts.kernels.gpu.hopper_tiles import Tile
    from quant_experts.kernels.gpu_weight_activation.hopper_launch import tile

    for rows, tokens in ((256, 128), (256, 64), (128, 128), (128, 32)):
        c = tile(Tile(rows, tokens, True), k, dict(GROUP_M=8, FACTORS=0, RANK=32, BIAS=False, SORTED=False, FP8=fp8))
        assert (c.UNITS.value, c.KEEPS.value) == (expected if fp8 and rows == 256 else (False, 0))


@pytest.mark.parametrize("tokens", [9, 16, 17, 40, 128, 300, 5000, 200_000])
@pytest.mark.parametrize("shape", [(11, 128), (4608, 3584), (37888, 3584), (3584, 18944)])
@pytest.mark.parametrize(
    ("kind", "rows"), [("codes", 32), ("codes", 64), ("codes", 512), ("fp8 codes", 64), ("values", 320)]
)
def test_what_products_do_for_experts(tokens: int, shape: tuple[int, int], kind: str, rows: int) -> None:
    """Pieces of codes are of all tokens and rows; they are few, but not longer than the product can wait for; who does
    nothing but work for experts is not spared steps; there are no more programs than multiprocessors."""
    from quant_experts.kernels.gpu_weight_activation.hopper_launch import MOST_STEPS, TIMES, config, work

    (n, k), codes, fp8 = shape, kind.endswith("codes"), kind.startswith("fp8")
    steps = k // 128
    flags = dict(PROJECTS=codes, SETTLES=not codes, TOTAL=rows, EXPERTS=0 if codes else 8)
    c = config(tokens, n, k, 1 if codes else 9, 32, 132, BIAS=False, SORTED=False, FP8=fp8, **flags)
    cut = work(c, tokens, n, steps, 132)
    tiles = -(-n // c.BN.value) * -(-tokens // c.BM.value)
    assert cut.programs == min(132, tiles * steps if c.SHARES.value else tiles + cut.workers)
    if codes:
        projected = -(-tokens // c.BM.value) * -(-rows // 64)
        assert cut.workers == projected * cut.pieces and 1 <= cut.pieces <= max(1, steps // 4)
        room = 132 - tiles if not c.SHARES.value and 132 - tiles >= projected else 132
        assert cut.workers <= room or cut.pieces == 1
        if cut.workers <= room - projected and cut.pieces < steps // 4:  # more pieces would be possible

            def short(pieces: int) -> bool:
                longest, step = -(-steps // pieces), TIMES.steps.get((c.BN.value, c.BM.value), 0.2)
                cost, multiplied = 4 + longest * (1 + fp8) * 0.2, tiles * steps * step / 132
                return longest <= MOST_STEPS and (longest <= 4 or cost <= max(6, 1.5 * multiplied) + 1e-9)

            assert cut.workers >= 4 and short(cut.pieces)
            fewer = cut.pieces - 1
            assert fewer == 0 or fewer * projected < 4 or not short(fewer), "no more than needed"
    else:
        assert cut.workers * 2 >= -(-tokens // 16) * 9 > (cut.workers - 1) * 2
    assert (cut.cost == 0) == (cut.workers >= cut.programs)
    alone = work(config(tokens, n, k, 0, 32, 132, BIAS=False, SORTED=False, FP8=fp8), tokens, n, steps, 132)
    assert alone[1:] == (0, 0, 0)


@pytest.mark.parametrize(
    ("tokens", "shape", "kind", "rows", "expected", "microseconds"),
    [  # pieces for each tile of tokens and 64 rows, programs that work for experts, and what it costs each of them
        (12, (3584, 18944), "codes", 64, (6, 6), 4 + 25 * 0.2),
        (12, (3584, 18944), "fp8 codes", 64, (12, 12), 4 + 26 * 0.2),  # two steps for each block of channels
        (128, (3584, 3584), "codes", 64, (3, 6), 4 + 10 * 0.2),  # so short that it would wait for longer ones
        (64, (1536, 8960), "fp8 codes", 64, (14, 28), 4 + 10 * 0.2),
        (256, (3584, 3584), "fp8 codes", 64, (3, 12), 4 + 20 * 0.2),
        (512, (4096, 14336), "codes", 64, (1, 4), 4 + 112 * 0.2),  # by the four programs that have no tile
        (1024, (4096, 14336), "codes", 64, (3, 24), 4 + 38 * 0.2),  # four are too few for as many as eight pieces
        (1100, (3584, 18944), "fp8 codes", 64, (4, 36), 4 + 74 * 0.2),
        (512, (4224, 14336), "codes", 64, (3, 12), 4 + 38 * 0.2),  # each program has a tile
        (128, (3584, 18944), "codes", 64, (4, 4), 4 + 37 * 0.2),
        (64, (3584, 18944), "codes", 256, (4, 16), 4 + 37 * 0.2),
        (512, (4608, 3584), "codes", 64, (1, 4), 4 + 28 * 0.2),
        (512, (3584, 18944), "fp8 codes", 64, (4, 16), 4 + 74 * 0.2),
        (2048, (3584, 18944), "codes", 64, (4, 64), 4 + 37 * 0.2),
        (8192, (3584, 18944), "fp8 codes", 64, (2, 128), 4 + 148 * 0.2),  # fewer pieces than programs
        (40, (11, 128), "codes", 32, (1, 2), 4 + 0.2),
        (64, (4608, 3584), "values", 320, (0, 18), 5.0),
    ],
)
def test_how_work_for_experts_is_cut(
    tokens: int, shape: tuple[int, int], kind: str, rows: int, expected: tuple[int, int], microseconds: float
) -> None:
    """As sweeps on an H200 had it, but for 1,024 and more tokens and where each program has a tile, which are by the
    rule alone; the cost is in steps of the product, to the nearest one."""
    from quant_experts.kernels.gpu_weight_activation.hopper_launch import TIMES, config, work

    (n, k), codes = shape, kind != "values"
    flags = dict(PROJECTS=codes, SETTLES=not codes, TOTAL=rows, EXPERTS=0 if codes else 8)
    c = config(tokens, n, k, 1 if codes else 9, 32, 132, BIAS=False, SORTED=False, FP8="fp8" in kind, **flags)
    cut = work(c, tokens, n, k // 128, 132)
    step = TIMES.steps.get((c.BN.value, c.BM.value), 0.2)
    assert (cut.pieces, cut.workers) == expected
    assert abs(cut.cost * step - microseconds) <= step / 2 + 1e-9


@pytest.mark.parametrize("fp8", [False, True])
def test_workspaces_hold_all_tiles(monkeypatch: pytest.MonkeyPatch, fp8: bool) -> None:
    """Shares of each program, and of fp8 tokens the sums that it keeps, have room before a graph may be captured."""
    from quant_experts.kernels.gpu import launch
    from quant_experts.kernels.gpu_weight_activation import backend
    from quant_experts.kernels.operands import GroupOperands, LinearOperands

    sizes: dict[str, int] = {}
    monkeypatch.setattr(launch, "hopper", lambda device: True)
    monkeypatch.setattr(launch, "zeros", lambda name, size, device: sizes.update({name: size}))
    monkeypatch.setattr(backend, "reserve", launch.reserve)
    layer = LinearOperands(torch.ones(1, 128, dtype=torch.int8), torch.ones(1, 1), None, None, None, None, None)
    group = GroupOperands(8, None, 0, None, None, None, None, activation_format="fp8" if fp8 else "int")
    backend.pack(group, [layer])
    assert sizes["hopper sums"] == (1 + fp8) * launch.MAX_PROGRAMS * 256 * 128
    assert launch.MAX_PROGRAMS >= 132 and sizes["hopper shares"] == launch.MAX_PROGRAMS * 4


def test_the_table_names_the_backend_for_gpus() -> None:
    from quant_experts.kernels.dispatch import BACKENDS

    backend = next(b for b in BACKENDS if b.name == "triton")
    assert backend.device == "cuda" and backend.layout is not None
    assert backend.fits((4, None, True)) and backend.fits((3, None, True))
    assert not backend.fits((8, None, True)) and not backend.fits((4, 128, True)) and not backend.fits((4, None, False))
