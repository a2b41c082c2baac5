"""What `config.json` may say, and the shapes that follow from it."""

import json
from math import ceil, prod

import pytest
import torch

from quant_experts.checkpoint.schema import (
    CheckpointConfig,
    GroupSpec,
    group_stored_bits,
    group_tensors,
    linear_tensors,
    stored_bits,
)
from quant_experts.config import FORMAT_VERSION, RECIPES, Scheme
from quant_experts.errors import QuantExpertsError

FULL = GroupSpec(linears=("q", "k", "v"), smooth=True, shared_rank=5, routed_rank=3, experts=4)
PLAIN = GroupSpec(linears=("o",))


def checkpoint(scheme: str = "W4A6") -> CheckpointConfig:
    parsed = Scheme.parse(scheme)
    return CheckpointConfig(
        format_version=parsed.format_version,
        scheme=parsed,
        recipe=RECIPES["paper"],
        seed=7,
        groups=(FULL, PLAIN),
        ignore=("lm_head",),
    )


@pytest.mark.parametrize("scheme", ["W4A6", "W3A16", "W8A8g64-asym", "W4Afp8"])
def test_round_trip_through_json(scheme: str) -> None:
    config = checkpoint(scheme)
    text = json.dumps(config.to_json())
    assert CheckpointConfig.read(json.loads(text)) == config
    entries = json.loads(text)
    assert (entries["quant_method"], entries["format_version"]) == ("quant_experts", 2 if scheme == "W4Afp8" else 1)


def test_fp8_activations_are_refused_in_a_format_that_does_not_know_them() -> None:
    with pytest.raises(QuantExpertsError, match="format_version is 1; W4Afp8 needs 2"):
        CheckpointConfig.read(checkpoint("W4Afp8").to_json() | {"format_version": 1})


def test_activations_take_no_bits_of_a_checkpoint() -> None:
    counts = {group_stored_bits(FULL, Scheme.parse(text), (64, 32), 96) for text in ("W4A6", "W4A8", "W4Afp8")}
    assert len(counts) == 1


def test_newer_formats_are_refused_before_their_keys_are_read() -> None:
    with pytest.raises(QuantExpertsError, match=rf"version {FORMAT_VERSION + 1}.*upgrade"):
        CheckpointConfig.read({"format_version": FORMAT_VERSION + 1, "something": "new"})


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.0, [1]])
def test_a_format_version_that_is_none_is_refused(version: object) -> None:
    with pytest.raises(QuantExpertsError, match="format_version"):
        CheckpointConfig.read(checkpoint().to_json() | {"format_version": version})
    with pytest.raises(QuantExpertsError, match="format_version"):
        CheckpointConfig.read({})


def test_bad_entries_are_named() -> None:
    def refused(change: dict, *named: str) -> None:
        with pytest.raises(QuantExpertsError) as caught:
            CheckpointConfig.read(checkpoint().to_json() | change)
        assert all(name in str(caught.value) for name in named)

    group = FULL.to_json()
    refused({"quant_method": "gptq"}, "quant_method")
    refused({"colour": 1}, "colour")
    refused({"scheme": {"weight_bits": 4, "activation_bits": 6, "bits": 4}}, "scheme", "bits")
    refused({"groups": [group | {"rank": 3}]}, "groups.0", "rank")
    refused({"groups": [group | {"linears": []}]}, "groups.0.linears")
    refused({"groups": [group | {"experts": 0}]}, "groups.0", "routed_rank")
    refused({"groups": [group | {"routed_rank": 0}]}, "groups.0", "experts")
    refused({"groups": [group | {"shared_rank": -1}]}, "groups.0.shared_rank")
    refused({"groups": [group | {"rotation": 48}]}, "groups.0", "power of two")
    refused({"groups": [group | {"factor_bits": 4}]}, "groups.0.factor_bits")
    refused({"groups": [group | {"shared_reads": "both"}]}, "groups.0.shared_reads")
    refused({"groups": [group | {"shared_reads": "codes", "factor_bits": 8}]}, "groups.0", "no routed experts")
    refused({"groups": None}, "groups")


def test_group_tensors() -> None:
    assert group_tensors(PLAIN, 48) == {}
    assert group_tensors(FULL, 48) == {
        "smooth_scale": ((48,), torch.float32),
        "shared_down": ((5, 48), torch.float16),
        "routed_down": ((4, 3, 48), torch.float16),
        "router_weight": ((4, 48), torch.float16),
        "router_bias": ((4,), torch.float16),
    }


def test_int8_factors_have_a_scale_a_row() -> None:
    spec = FULL.model_copy(update=dict(factor_bits=8))
    assert group_tensors(spec, 48) | linear_tensors(spec, Scheme.parse("W4A6"), 7, 48) == {
        **group_tensors(PLAIN, 48),
        **linear_tensors(PLAIN, Scheme.parse("W4A6"), 7, 48),
        "smooth_scale": ((48,), torch.float32),
        "shared_down": ((5, 48), torch.int8),
        "shared_down_scale": ((5,), torch.float32),
        "routed_down": ((4, 3, 48), torch.int8),
        "routed_down_scale": ((4, 3), torch.float32),
        "router_weight": ((4, 48), torch.float16),
        "router_bias": ((4,), torch.float16),
        "shared_up": ((7, 5), torch.int8),
        "shared_up_scale": ((7,), torch.float32),
        "routed_up": ((4, 7, 3), torch.int8),
        "routed_up_scale": ((4, 7), torch.float32),
    }


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 32, 48, 129, 300])
@pytest.mark.parametrize("grid", ["pc-sym", "g128-asym", "g2-sym", "pc-asym"])
def test_linear_tensors(columns: int, bits: int, grid: str) -> None:
    scheme, group_size = Scheme.parse(f"W{bits}A8{grid}"), {"g128-asym": 128, "g2-sym": 2}.get(grid)
    scales = ceil(columns / group_size) if group_size else 1
    expected = {
        "weight_packed": ((7, ceil(columns / 32) * bits), torch.int32),
        "weight_scale": ((7, scales), torch.bfloat16 if group_size else torch.float32),
        "weight_shape": ((2,), torch.int32),
    }
    if grid.endswith("asym"):
        expected["weight_zero_point"] = ((scales, bits), torch.int32)
    assert linear_tensors(PLAIN, scheme, 7, columns) == expected
    experts = {"shared_up": ((7, 5), torch.float16), "routed_up": ((4, 7, 3), torch.float16)}
    assert linear_tensors(FULL, scheme, 7, columns) == expected | experts


def test_stored_bits_are_those_of_real_tensors() -> None:
    scheme = Scheme.parse("W3A16g64")
    sizes, columns = (96, 32, 32), 160
    specs = [group_tensors(FULL, columns), *(linear_tensors(FULL, scheme, n, columns) for n in sizes)]
    real = sum(torch.zeros(shape, dtype=dtype).nbytes for spec in specs for shape, dtype in spec.values())
    assert group_stored_bits(FULL, scheme, sizes, columns) == 8 * real
    assert stored_bits({}) == 0 and stored_bits({"a": ((), torch.int8), "b": ((0, 3), torch.int8)}) == 8


def test_stored_bits_of_a_plain_four_bit_layer_are_four_a_weight_and_a_scale_a_row() -> None:
    count = group_stored_bits(PLAIN, Scheme.parse("W4A8"), (1536,), 1536)
    assert count == 4 * prod((1536, 1536)) + 32 * 1536 + 64


def test_a_weight_group_costs_half_precision_and_a_code_more() -> None:
    count = group_stored_bits(PLAIN, Scheme.parse("W4A16"), (1536,), 1536)
    assert count == 4 * prod((1536, 1536)) + (16 + 4) * 1536 * 1536 // 128 + 64
