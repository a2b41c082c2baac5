"""Tries weights of a group's linears in the module that reads their input, and measures what its output loses.

The reader is found by structure, not by names: the module that a group's linears stand in (attention for q, k, v; the
MLP for gate, up), or, for a linear that others of its module come before (o, down), the linear itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from quant_experts.calibration.statistics import token_labels
from quant_experts.calibration.streaming import BlockStream, hidden_state, to_device

SEARCH_SAMPLES = 32
"""Most samples that trials run on: what each gives the reader is kept on the host, for one group at a time."""

HOST = torch.device("cpu")


def find_reader(names: Sequence[str], in_order: Sequence[str]) -> str:
    """Name within the block of the module whose output judges the linears `names`; "" is the block.

    in_order: all linears of the block in the order of first use.
    """
    parents = [name.rpartition(".")[0] for name in names]
    first = next(name for name in in_order if name.rpartition(".")[0] == parents[0])
    if len(names) == 1 and names[0] != first:
        return names[0]
    levels = zip(*(parent.split(".") for parent in parents), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


@dataclass
class _Call:
    """What a reader was given and gave back, on the host."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    """(..., N)"""
    weights: Tensor
    """(T,) float32, how much each token's error counts."""


@dataclass
class ReaderTrials:
    """A group's linears, to be tried in their reader on calibration samples."""

    reader: nn.Module
    linears: list[nn.Linear]
    calls: list[_Call]
    power: int
    """1: absolute errors, 2: squared ones."""
    device: torch.device

    @property
    def counts(self) -> bool:
        """Whether any token counts: without one, every trial's error is 0."""
        return any(bool((call.weights > 0).any()) for call in self.calls)

    def error(self, weights: Sequence[Tensor], transform: Callable[[Tensor], Tensor]) -> float:
        """Mean over the outputs of tokens that count of weight * |difference from full precision|^power.

        weights: one (N, K) for each linear, which reads transform(x) for its input x (..., K). The linears are as
        before afterwards, whatever happens.
        """
        total, count = 0.0, 0
        with _replaced(self.linears, weights, transform), torch.inference_mode():
            for call in self.calls:
                output = hidden_state(
                    self.reader(*to_device(call.args, self.device), **to_device(call.kwargs, self.device))
                )
                delta = (output.float() - call.output.to(self.device).float()).abs_().pow_(self.power)
                rows = delta.reshape(len(call.weights), -1).sum(dim=1, dtype=torch.float64).cpu()
                total += float((call.weights * rows).sum())
                count += int((call.weights > 0).sum()) * output.shape[-1]
        return total / max(1, count)


def reader_trials(
    stream: BlockStream,
    block: nn.Module,
    names: Sequence[str],
    in_order: Sequence[str],
    *,
    held_out: frozenset[int],
    token_weights: Callable[[Tensor], Tensor],
    power: int,
) -> ReaderTrials:
    """Run the first samples that are not held out through the full-precision block and keep what the reader sees.

    token_weights: (T,) modalities -> (T,) float32, how much each token's error counts.
    """
    chosen = ([i for i in stream.waiting if i not in held_out] or stream.waiting)[:SEARCH_SAMPLES]
    reader = block.get_submodule(find_reader(names, in_order))
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    calls: list[_Call] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((to_device(args, HOST), to_device(kwargs, HOST), hidden_state(output).to(HOST)))

    handle = reader.register_forward_hook(watch, with_kwargs=True)
    try:
        for sample in stream.run(block):
            if sample in chosen:
                for args, kwargs, output in seen:
                    tokens = output.numel() // output.shape[-1]
                    weights = token_weights(token_labels(stream.modality(sample), tokens))
                    calls.append(_Call(args, kwargs, output, weights))
            seen.clear()
            if sample == chosen[-1]:
                break
    finally:
        handle.remove()
    linears = [linear for linear in map(block.get_submodule, names) if isinstance(linear, nn.Linear)]
    return ReaderTrials(reader, linears, calls, power, stream.device)


@contextmanager
def _replaced(
    linears: Sequence[nn.Linear], weights: Sequence[Tensor], transform: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """The linears with other weights, reading a transformed input."""
    kept = [linear.weight for linear in linears]
    handles = []
    try:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=False)
            handles.append(linear.register_forward_pre_hook(lambda _, args: (transform(args[0]), *args[1:])))
        yield
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight = weight
        for handle in handles:
            handle.remove()
