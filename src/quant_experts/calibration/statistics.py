"""Finds a block's input groups and measures what their tokens look like.

Sums over tokens are taken in float32 within one sample and in float64 across samples. A bounded, uniform sample of
held-out tokens is kept as it is, to measure errors on tokens that no factor was fitted to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from quant_experts.artifacts import Event, GroupStatistics, Modality
from quant_experts.calibration.scopes import is_linear
from quant_experts.calibration.streaming import BlockStream
from quant_experts.errors import QuantExpertsError

RESERVOIR_TOKENS = 2048
"""Most held-out tokens that errors are measured on."""
MOMENT_ROWS = 512
"""Rows of a second moment that are updated at once: bounds the float32 product beside the float64 sum."""


def block_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The block's linear layers by name, in the order of registration."""
    return {name: cast(nn.Linear, module) for name, module in block.named_modules() if is_linear(module)}


def find_groups(stream: BlockStream, block: nn.Module, *, together: bool) -> tuple[list[tuple[str, ...]], list[str]]:
    """Linears that read the same tensor object, by watching the first sample's pass; in order of first use.

    Returns (groups of linear names within the block, names of linears that never ran). With `together` False each
    linear is its own group.
    """
    readers: dict[int, list[str]] = {}
    inputs: list[Tensor] = []  # kept alive, or an address could be used twice
    linears = block_linears(block)
    name_of: dict[nn.Module, str] = {module: name for name, module in linears.items()}

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])
        names = readers.setdefault(id(args[0]), [])
        if name_of[module] not in names:
            names.append(name_of[module])

    handles = [module.register_forward_pre_hook(watch) for module in linears.values()]
    try:
        next(stream.run(block))
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for names in readers.values():
        fresh = [name for name in names if name not in seen]
        seen.update(fresh)
        groups += [tuple(fresh)] if together and fresh else [(name,) for name in fresh]
    return groups, [name for name in linears if name not in seen]


def without_small(
    groups: list[tuple[str, ...]], linears: Mapping[str, nn.Linear], rank: int
) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """(groups that are larger than a rank, name and shape of the linears of others): experts of that rank would take
    more bytes than such a group itself."""
    large: list[tuple[str, ...]] = []
    small: list[tuple[str, str]] = []
    for names in groups:
        rows, columns = sum(linears[name].out_features for name in names), linears[names[0]].in_features
        if rank <= min(rows, columns):
            large.append(names)
        else:
            small += [(name, f"{linears[name].out_features} x {columns}") for name in names]
    return large, small


@dataclass
class _Collector:
    """Running sums for one group."""

    channel_weight: Tensor
    """(K,) float32, mean over rows of |W|"""
    k: int
    keep: dict[int, Tensor]
    """held-out sample -> its rows to keep in the reservoir"""
    fit: dict[int, Tensor]
    """sample that is not held out -> its rows to keep among the tokens to fit to"""
    abs_sum: Tensor
    moment_sum: Tensor
    absmax: Tensor
    max_mean_abs: Tensor
    important: list[Tensor] = field(default_factory=list)
    modality: list[Tensor] = field(default_factory=list)
    reservoir: list[Tensor] = field(default_factory=list)
    reservoir_modality: list[Tensor] = field(default_factory=list)
    reservoir_position: list[Tensor] = field(default_factory=list)
    fit_tokens: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, brought: Tensor, sample: int, *, held_out: bool) -> None:
        """x (T, K) of one sample, which brought tokens of these modalities to the block."""
        modality = token_labels(brought, len(x))
        x = x.float()
        if sample in self.keep:
            rows = _existing(self.keep[sample], x)
            self.reservoir.append(x[rows.to(x.device)].cpu())
            self.reservoir_modality.append(modality[rows])
            self.reservoir_position.append(token_positions(brought, len(x))[rows])
        if sample in self.fit:
            self.fit_tokens.append(x[_existing(self.fit[sample], x).to(x.device)].cpu())
        if held_out or not len(x):
            return
        magnitude = x.abs()
        total = magnitude.sum(dim=0, dtype=torch.float64)
        self.abs_sum += total
        self.max_mean_abs = torch.maximum(self.max_mean_abs, total / len(x))
        self.absmax = torch.maximum(self.absmax, magnitude.amax(dim=0))
        for start in range(0, x.shape[1], MOMENT_ROWS):
            self.moment_sum[start : start + MOMENT_ROWS] += x[:, start : start + MOMENT_ROWS].T @ x
        top = (magnitude * self.channel_weight).topk(self.k, dim=1, sorted=False).indices
        self.important.append(top.to(device="cpu", dtype=torch.int32))
        self.modality.append(modality)

    def result(self) -> GroupStatistics:
        modality = torch.cat(self.modality)
        return GroupStatistics(
            mean_abs=self.abs_sum / len(modality),
            second_moment=self.moment_sum.div_(len(modality)),
            important=torch.cat(self.important),
            modality=modality,
            reservoir=torch.cat(self.reservoir),
            reservoir_modality=torch.cat(self.reservoir_modality),
            reservoir_position=torch.cat(self.reservoir_position),
            fit_tokens=torch.cat(self.fit_tokens) if self.fit_tokens else None,
            absmax=self.absmax,
            max_mean_abs=self.max_mean_abs,
        )


def collect_statistics(
    stream: BlockStream,
    block: nn.Module,
    groups: Sequence[tuple[str, ...]],
    *,
    important_channels: int,
    held_out: frozenset[int],
    seed: int,
    fit_tokens: int = 0,
) -> dict[tuple[str, ...], GroupStatistics]:
    """One pass of all samples that wait for it through the full-precision block.

    held_out: indices of samples whose tokens go into the reservoir only. fit_tokens: how many tokens of the others to
    keep as they are. Raises `QuantExpertsError` for NaN or infinite
    activations, naming the sample.
    """
    device = stream.device
    linears = block_linears(block)
    brought = {sample: stream.modality(sample) for sample in stream.waiting}
    lengths = {sample: len(modality) for sample, modality in brought.items()}
    keep = _sample_rows(lengths, held_out, RESERVOIR_TOKENS, seed)
    # One sample alone serves both purposes.
    others = frozenset(lengths) - held_out or held_out
    fit = _sample_rows(lengths, others, fit_tokens, seed)
    collectors: dict[tuple[str, ...], _Collector] = {}
    current: dict[tuple[str, ...], list[Tensor]] = {}
    handles = []
    for names in groups:
        members = [linears[name] for name in names]
        width = members[0].in_features
        absolute = torch.stack([m.weight.abs().sum(dim=0, dtype=torch.float64) for m in members]).sum(dim=0)
        collectors[names] = _Collector(
            channel_weight=(absolute / sum(m.out_features for m in members)).float(),
            k=min(important_channels, width),
            keep=keep,
            fit=fit,
            abs_sum=torch.zeros(width, dtype=torch.float64, device=device),
            moment_sum=torch.zeros(width, width, dtype=torch.float64, device=device),
            absmax=torch.zeros(width, dtype=torch.float64, device=device),
            max_mean_abs=torch.zeros(width, dtype=torch.float64, device=device),
        )

        def watch(module: nn.Module, args: tuple[Tensor, ...], names: tuple[str, ...] = names) -> None:
            current.setdefault(names, []).append(args[0].reshape(-1, args[0].shape[-1]))

        handles.append(members[0].register_forward_pre_hook(watch))
    try:
        for sample in stream.run(block):
            for names, x in ((names, x) for names, inputs in current.items() for x in inputs):
                if not x.isfinite().all():
                    raise QuantExpertsError(
                        f"Activations of calibration sample {sample + 1} are NaN or infinite in block {stream.index} "
                        f"at "
                        f"'{names[0]}': remove the sample, calibrate in float32, or check the model's weights."
                    )
                collectors[names].add(x, brought[sample], sample, held_out=sample not in others)
            current.clear()
    finally:
        for handle in handles:
            handle.remove()
    return {names: collector.result() for names, collector in collectors.items()}


def token_labels(brought: Tensor, tokens: int) -> Tensor:
    """(tokens,) int8, the modalities of what a layer sees. brought: those of the tokens that came to its block.

    A layer that sees another number of them (of which several may have become one) does not know which is which: TEXT,
    unless all are images'.
    """
    if len(brought) == tokens:
        return brought
    images = len(brought) > 0 and bool((brought == Modality.IMAGE).all())
    return torch.full((tokens,), Modality.IMAGE if images else Modality.TEXT, dtype=torch.int8)


def token_positions(brought: Tensor, tokens: int) -> Tensor:
    """(tokens,) float32: how much of the sequence lies before each token, in [0, 1). NaN for layers that see another
    number of tokens than came to the block."""
    if len(brought) == tokens:
        return torch.arange(tokens) / max(1, tokens)
    return torch.full((tokens,), torch.nan)


def _existing(rows: Tensor, x: Tensor) -> Tensor:
    """The rows that x has: a layer may see fewer tokens than the sequence has."""
    return rows[rows < len(x)]


def _sample_rows(lengths: Mapping[int, int], chosen_from: frozenset[int], limit: int, seed: int) -> dict[int, Tensor]:
    """Choose at most `limit` tokens of some samples uniformly: sample index -> its chosen rows, ascending."""
    if not limit:
        return {}
    samples = sorted(chosen_from)
    origin = torch.cat([torch.full((lengths[i],), i) for i in samples])
    row = torch.cat([torch.arange(lengths[i]) for i in samples])
    chosen = torch.randperm(len(origin), generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    return {i: row[chosen][origin[chosen] == i] for i in samples}


def held_out_among(samples: Sequence[int]) -> frozenset[int]:
    """The samples that are held out of those that come to a block: by `split_held_out`, in their order."""
    return frozenset(samples[place] for place in split_held_out(len(samples))[0])


def split_held_out(samples: int, fraction: float = 1 / 8) -> tuple[frozenset[int], list[Event]]:
    """Every 1/fraction-th sample is held out, at least one; a single sample serves both purposes, with an event."""
    if samples == 1:
        return frozenset({0}), [
            Event("calibration", "one sample only: errors are measured on the tokens it was fitted to")
        ]
    step = round(1 / fraction)
    return frozenset(range(min(step, samples) - 1, samples, step)), []
