"""How much the answer's loss depends on what each block's attention and MLP put out, with one block in memory.

Forward, the model's own pass pauses in front of every block and what it is given is kept on the host. Backward, blocks
come in reverse order: each is run once more on what it was given, this time recorded, and the gradient of its output
becomes that of its input. From there to the output of the block before, the gradient passes through whatever the model
did between the two (Qwen3-VL adds image features there), which was recorded on the way forward; so it does from the
loss to the last block's output.

One path is followed: the hidden state. What a model carries past its blocks otherwise (positions, masks) counts as
constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from quant_experts.artifacts import CalibrationBatch, Modality
from quant_experts.calibration.statistics import block_linears
from quant_experts.calibration.streaming import BlockCall, BlockStream, hidden_state, to_device
from quant_experts.errors import QuantExpertsError

SENSITIVITY_SAMPLES = 32
"""Most samples that gradients are taken of: each keeps its hidden state in front of every block on the host."""

HOST = torch.device("cpu")


def sensitivity_batches(batches: Sequence[CalibrationBatch], held_out: frozenset[int]) -> list[CalibrationBatch]:
    """The first samples with an answer that are not held out (all are, if there is only one). Raises
    `QuantExpertsError` if none has an answer."""
    seen = [batch for i, batch in enumerate(batches) if i not in held_out] or list(batches)
    chosen = [batch for batch in seen if bool((batch.modality[1:] == Modality.ANSWER).any())][:SENSITIVITY_SAMPLES]
    if not chosen:
        raise QuantExpertsError("MBQ weighs tokens by the answer's loss, and no sample has an answer: give some.")
    return chosen


def answer_loss(logits: Tensor, batch: CalibrationBatch) -> Tensor:
    """Mean negative log-likelihood of the answer's tokens: logits (1, T, V) -> a float32 scalar."""
    answer = (batch.modality[1:] == Modality.ANSWER).nonzero()[:, 0]
    return nn.functional.cross_entropy(logits[0, answer].float(), batch.inputs["input_ids"][0, answer + 1])


def branch_names(block: nn.Module) -> list[str]:
    """The block's direct children that hold its linears: in most models its attention and its MLP."""
    return list(dict.fromkeys(name.partition(".")[0] for name in block_linears(block)))


def branch_sensitivities(stream: BlockStream) -> list[dict[str, dict[Modality, float]]]:
    """Per block of the language model and branch, by modality: the mean over its tokens and channels of
    |d loss / d output|, the loss being each sample's `answer_loss` (MBQ, Li et al., CVPR 2025, section 3.2).

    stream: a differentiable one over the full-precision model, not started yet; it ends here. Every sample has an
    answer.
    """
    entries, gradients = _forward(stream)
    found: list[dict[str, dict[Modality, float]]] = []
    first = len(stream.skeleton.blocks) - len(entries)  # the language model's blocks come last
    while entries:
        index = first + len(entries) - 1
        block = stream.skeleton.load_block(index, stream.device)
        sums = {name: torch.zeros(len(Modality), 2, dtype=torch.float64) for name in branch_names(block)}
        for i, entry in entries.pop().items():
            gradients[i], branches = _through_block(block, entry, gradients[i], stream.device)
            for name, gradient in branches:
                sums[name] += _by_modality(gradient, stream.batches[i].modality)
        stream.skeleton.release_block(index)
        means = {name: (total[:, 0] / total[:, 1]).tolist() for name, total in sums.items()}
        found.append({name: {m: means[name][m] for m in Modality if sums[name][m, 1]} for name in sums})
    return found[::-1]


@dataclass
class _Entry:
    """What one sample gave one block."""

    call: BlockCall
    left: Tensor | None
    """The hidden state that the block before put out; the call's own was made from it. None at the first block."""


def _forward(stream: BlockStream) -> tuple[list[dict[int, _Entry]], dict[int, Tensor]]:
    """Entries by block of the language model and sample that runs through it, and by sample the gradient of its loss at
    its last block's output."""
    entries: list[dict[int, _Entry]] = []
    gradients: dict[int, Tensor] = {}
    left: list[Tensor | None] = [None] * len(stream.batches)
    for index in stream.blocks():
        block = stream.skeleton.load_block(index, stream.device)
        if stream.scope != "language":
            stream.advance(block)
            stream.skeleton.release_block(index)
            continue
        calls = {i: stream.calls[i] for i in stream.waiting}
        entries.append({i: _Entry(call, left[i]) for i, call in calls.items()})
        for i, call in calls.items():
            with torch.no_grad():
                output = to_device(stream.call_block(block, call), HOST)
            hidden = left[i] = hidden_state(output).requires_grad_()
            result = stream.resume(i, output)
            if not isinstance(result, BlockCall):
                (gradients[i],) = torch.autograd.grad(answer_loss(result.logits, stream.batches[i]), hidden)
        stream.skeleton.release_block(index)
    return entries, gradients


def _through_block(
    block: nn.Module, entry: _Entry, gradient: Tensor, device: torch.device
) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """From the gradient of a block's output to that of the output of the block before (or of the first block's input),
    and those of its branches' outputs by name, once a run."""
    entered = hidden_state((entry.call.args, entry.call.kwargs))
    leaves, structure = tree_flatten((entry.call.args, entry.call.kwargs))
    inputs = [leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    hidden = inputs[next(i for i, leaf in enumerate(leaves) if leaf is entered)].requires_grad_()
    args, kwargs = tree_unflatten(inputs, structure)
    outputs: list[tuple[str, Tensor]] = []
    with ExitStack() as hooks:
        for name in branch_names(block):

            def watch(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                outputs.append((name, hidden_state(output)))

            hooks.callback(block.get_submodule(name).register_forward_hook(watch).remove)
        with torch.enable_grad():
            final = hidden_state(block(*args, **kwargs))
    names, tensors = [name for name, _ in outputs], [tensor for _, tensor in outputs]
    inward, *found = torch.autograd.grad(final, [hidden, *tensors], gradient.to(device), materialize_grads=True)
    inward = inward.to(HOST)
    if entry.left is not None:
        inward = torch.autograd.grad(entered, entry.left, inward)[0]
    return inward, list(zip(names, found, strict=True))


def _by_modality(gradient: Tensor, modality: Tensor) -> Tensor:
    """(sum of |gradient|, number of entries) over the tokens of each modality. gradient (..., N) -> (modalities, 2).

    Nothing is counted where a branch sees another number of tokens than the sequence has."""
    rows = gradient.reshape(-1, gradient.shape[-1]).abs().sum(dim=1, dtype=torch.float64).cpu()
    sums = torch.zeros(len(Modality), 2, dtype=torch.float64)
    if len(rows) == len(modality):
        kinds = modality.long()
        sums[:, 0].index_add_(0, kinds, rows)
        sums[:, 1] = torch.bincount(kinds, minlength=len(Modality)) * gradient.shape[-1]
    return sums
