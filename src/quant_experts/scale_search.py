"""Smoothing scales that are searched by running the modules that read a group's input: AWQ's and MBQ's.

Here the stages that know errors (`calibration`) and those that know scales (`quantizers`) meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from quant_experts.artifacts import Event
from quant_experts.calibration.search import ReaderTrials, reader_trials
from quant_experts.calibration.sensitivity import branch_sensitivities
from quant_experts.calibration.streaming import BlockStream
from quant_experts.config import Scheme
from quant_experts.group import GroupTask, Search
from quant_experts.kernels.reference import round_tokens, smooth
from quant_experts.quantizers import awq, mbq
from quant_experts.quantizers.grids import dequantize
from quant_experts.quantizers.rtn import quantize_rtn

ImageWeights = Mapping[str, float]
"""MBQ's rho of each branch (attention, MLP) of a block."""


def measure_image_weights(stream: BlockStream) -> dict[str, ImageWeights]:
    """MBQ's rho by name of the language model's blocks, from gradients through the full-precision model.

    stream: a differentiable one over `sensitivity_batches`, not started yet; it ends here.
    """
    weights = mbq.image_weights(branch_sensitivities(stream))
    return dict(zip(stream.skeleton.names_of("language"), weights, strict=True))


def scale_search(
    stream: BlockStream,
    block: nn.Module,
    groups: Sequence[tuple[str, ...]],
    held_out: frozenset[int],
    image_weights: ImageWeights | None,
) -> Search:
    """AWQ's search for the groups of a full-precision block, or MBQ's if image weights are given.

    AWQ: squared errors, every token alike. MBQ: absolute errors, of answers and images only, balanced by rho; in front
    of the language model, where all tokens are images', there is nothing to balance and MBQ's search is AWQ's.
    """
    in_order = [name for names in groups for name in names]

    def search(task: GroupTask) -> Tensor:
        weigh: Callable[[Tensor], Tensor] = awq.token_weights
        if image_weights is not None:
            weigh = partial(mbq.token_weights, image_weight=image_weights[task.names[0].partition(".")[0]])
        power = 2 if image_weights is None else 1
        trials = reader_trials(stream, block, task.names, in_order, held_out=held_out, token_weights=weigh, power=power)
        if not trials.counts:
            task.events.append(Event(task.where, "no token of the search samples counts here: left unsmoothed"))
        return awq.search_scale(task.statistics.mean_abs, lambda scale: scale_error(task, trials, scale))

    return search


def scale_error(task: GroupTask, trials: ReaderTrials, scale: Tensor) -> float:
    """What the group's reader loses if W diag(s) is rounded to nearest and reads the rounded x / s."""
    rounded = dequantize(quantize_rtn(task.weight * scale, task.scheme))
    return trials.error(rounded.split(list(task.rows)), lambda x: _as_read(x, scale, task.scheme))


def _as_read(x: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """x / s, rounded per token unless activations keep their precision. x (..., K), in its dtype."""
    return round_tokens(smooth(x, scale).reshape(-1, x.shape[-1]), scheme).reshape(x.shape).to(x.dtype)
