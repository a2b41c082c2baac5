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


@torch.inference_mode()
def answer_log_probs(model: Any, batches: Sequence[CalibrationBatch]) -> list[Tensor]:
    """For each batch, log-probabilities (n, V) float32 on the CPU: what the model expects at each of n answer tokens.

    One unpadded sequence at a time: exact for every family. Takes n * V * 4 bytes for each batch.

    Raises:
        QuantExpertsError: a batch without an answer.
    """
    model.eval()
    results = []
    for number, batch in enumerate(batches, start=1):
        positions = _answer_positions(batch)
        if not len(positions):
            raise QuantExpertsError(
                f"Sample {number} has no answer to compare with: give it one, or allow more tokens."
            )
        inputs = to_model(batch.inputs, model)
        # Token t is predicted at position t - 1.
        logits = model(**inputs, use_cache=False, logits_to_keep=positions.to(model.device) - 1).logits[0]
        results.append(logits.double().log_softmax(dim=-1).float().cpu())
    return results


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
