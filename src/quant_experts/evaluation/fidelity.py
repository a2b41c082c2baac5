"""How closely a quantized model follows the full-precision one, measured on reference answers (teacher forcing).

The model reads question and answer in one pass. Its distribution at each answer token gives two numbers that react
long before a greedy answer changes: the negative log-likelihood of the right token, and the Kullback-Leibler
divergence from full precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_experts.artifacts import CalibrationBatch, Modality
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.generation import to_model

SIDE_BY_SIDE = 32
"""Most sequences in one pass."""


@torch.inference_mode()
def answer_log_probs(model: Any, batches: Sequence[CalibrationBatch]) -> list[Tensor]:
    """For each batch, log-probabilities (n, V) float32 on the CPU: what the model expects at each of n answer tokens.

    Sequences are never padded: those whose inputs have the same shapes go through the model side by side, up to
    `SIDE_BY_SIDE` of them. Takes n * V * 4 bytes for each batch.

    Raises:
        QuantExpertsError: a batch without an answer.
    """
    model.eval()
    alike: dict[Any, list[int]] = {}
    for index, batch in enumerate(batches):
        if not len(_answer_positions(batch)):
            raise QuantExpertsError(
                f"Sample {index + 1} has no answer to compare with: give it one, or allow more tokens."
            )
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(batch.inputs.items()))
        alike.setdefault(shapes, []).append(index)
    results: dict[int, Tensor] = {}
    for indices in alike.values():
        for start in range(0, len(indices), SIDE_BY_SIDE):
            chosen = indices[start : start + SIDE_BY_SIDE]
            results |= zip(chosen, _side_by_side(model, [batches[i] for i in chosen]), strict=True)
    return [results[index] for index in range(len(batches))]


def _side_by_side(model: Any, batches: Sequence[CalibrationBatch]) -> list[Tensor]:
    """(n, V) for each of some sequences of equal shapes."""
    inputs = {name: torch.cat([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}
    positions = [_answer_positions(batch) for batch in batches]
    kept = torch.cat(positions).unique()
    # Token t is predicted at position t - 1.
    logits = model(**to_model(inputs, model), use_cache=False, logits_to_keep=kept.to(model.device) - 1).logits
    rows = zip(logits, positions, strict=True)
    return [
        row[torch.searchsorted(kept, own).to(row.device)].double().log_softmax(dim=-1).float().cpu()
        for row, own in rows
    ]


def answer_tokens(batch: CalibrationBatch) -> Tensor:
    """(n,) int64, the reference answer's token ids."""
    return batch.inputs["input_ids"][0][_answer_positions(batch)]


def answer_nll(log_probs: Sequence[Tensor], batches: Sequence[CalibrationBatch]) -> Tensor:
    """(S,) float64: for each sample, -log p(token) averaged over its answer's tokens, in nats."""
    pairs = zip(log_probs, batches, strict=True)
    return torch.tensor(
        [float(-lp.double().gather(1, answer_tokens(batch)[:, None]).mean()) for lp, batch in pairs],
        dtype=torch.float64,
    )


def answer_kl(reference: Sequence[Tensor], quantized: Sequence[Tensor]) -> Tensor:
    """(S,) float64: for each sample, KL(reference || quantized) averaged over its answer's tokens, in nats.

    Raises ValueError if the two do not describe the same tokens.
    """
    return torch.tensor([_mean_kl(p, q) for p, q in zip(reference, quantized, strict=True)], dtype=torch.float64)


def _mean_kl(p: Tensor, q: Tensor) -> float:
    if p.shape != q.shape:
        raise ValueError(f"log-probabilities have shapes {tuple(p.shape)} and {tuple(q.shape)}")
    p, q = p.double(), q.double()
    # Where p is 0 its log is -inf and the term is 0 by convention, not NaN.
    terms = torch.where(p == -torch.inf, torch.zeros_like(p), p.exp() * (p - q))
    return float(terms.sum(dim=-1).mean())


def _answer_positions(batch: CalibrationBatch) -> Tensor:
    positions = (batch.modality == Modality.ANSWER).nonzero()[:, 0]
    return positions[positions > 0]
