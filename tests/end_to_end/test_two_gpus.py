"""Kernels on a second GPU, which is not the current one. Skipped where there are no two."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import product
from threading import Thread
from typing import Any

import pytest
import torch
from kernels.gpu_weight_activation import cases
from torch import Tensor

from quant_experts.kernels.dispatch import Layout, select
from quant_experts.kernels.gpu import recorded
from quant_experts.kernels.gpu.recorded import Program

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DEVICES = ("cuda:0", "cuda:1")
TOKENS = (1, 4, 16, 100, 600)
CALLS = 30
KINDS: tuple[tuple[int, bool, tuple[str, ...]], ...] = (
    (8, False, ()),
    (8, False, cases.ALL),
    (8, True, ("smooth", "shared")),
    (16, False, ()),
)
"""Bits of activations, whether an expert reads codes, and what a group has."""


def moved(value: Any, device: str) -> Any:
    """Operands on another device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [moved(one, device) for one in value]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
    return value


def groups() -> Iterator[tuple[Layout, list[Any]]]:
    """A layout, and a group laid out on each device."""
    for bits, reads_codes, parts in KINDS:
        layout = select("cuda", bits).layout
        assert layout is not None
        group, linears = cases.operands(
            1024, (640, 256), bits, parts, rotation=64 if reads_codes else 0, rank=32, integer_factors=reads_codes,
            reads_codes=reads_codes,
        )  # fmt: skip
        yield layout, [layout.pack(moved(group, on), moved(linears, on), torch.bfloat16) for on in DEVICES]


def test_both_give_the_same_in_turns_and_at_once() -> None:
    assert torch.cuda.current_device() == 0
    recorded._programs.clear()
    with torch.inference_mode():
        for (layout, packed), m in product(groups(), TOKENS):
            x = cases.tokens(m, 1024, torch.bfloat16)
            inputs = [x.to(device) for device in DEVICES]
            expected = layout.apply(inputs[0], packed[0]).cpu()
            assert expected.isfinite().all()
            for _ in range(4):  # recorded, and repeated
                for given, own in zip(inputs, packed, strict=True):
                    y = layout.apply(given, own)
                    assert y.device == given.device and torch.equal(y.cpu(), expected)
            found: list[list[Tensor]] = [[] for _ in DEVICES]

            def work(i: int, found: Any = found, inputs: Any = inputs, own: Any = packed, layout: Any = layout) -> None:
                with torch.inference_mode():
                    found[i] += [layout.apply(inputs[i], own[i]) for _ in range(CALLS)]

            threads = [Thread(target=work, args=(i,)) for i in range(len(DEVICES))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(len(outputs) == CALLS for outputs in found)
            assert all(torch.equal(y.cpu(), expected) for outputs in found for y in outputs)
    assert torch.cuda.current_device() == 0
    repeated = {str(key[-1]) for key, kept in recorded._programs.items() if isinstance(kept, Program)}  # type: ignore[index]
    assert repeated == set(DEVICES)
