"""What the training script measures: exact match per kind, at full precision and under plain round-to-nearest.

Under greedy decoding an answer is right exactly if every token of it is the most likely one after the right ones before
it, so one forward pass over question and answer gives the exact match that generation would give.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from quant_experts.demo.forward import TrainingForward
from quant_experts.demo.questions import KINDS
from quant_experts.demo.stream import IGNORED, Batch, row_of


class RoundedLinear(nn.Module):
    """A linear layer at W4: 4-bit weights, one scale an output channel; activations of ``bits``, one scale a token."""

    def __init__(self, linear: nn.Linear, bits: int) -> None:
        super().__init__()
        weight = linear.weight.detach()  # (N, K)
        scale = (weight.abs().amax(dim=1, keepdim=True) / 7).clamp(min=1e-12)
        self.weight = nn.Parameter((weight / scale).round().clamp(-8, 7) * scale, requires_grad=False)
        self.bias = linear.bias
        self.top = 2 ** (bits - 1) - 1

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        scale = (x.abs().amax(dim=-1, keepdim=True) / self.top).clamp(min=1e-12)
        return nn.functional.linear((x / scale).round().clamp(-self.top - 1, self.top) * scale, self.weight, self.bias)


def rounded(model: Any, bits: int) -> Any:
    """A copy of ``model`` whose language model's decoder blocks have `RoundedLinear` for every linear layer."""
    copy = deepcopy(model)
    for layer in copy.model.language_model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, RoundedLinear(child, bits))
    return copy


@torch.no_grad()
def exact_match(model: Any, batches: list[Batch]) -> dict[str, float]:
    """Percent of answers that are right in every token, per kind and as ``average`` over the kinds."""
    hits: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    forward = TrainingForward(model)
    for batch in batches:
        best = forward.logits(batch.tokens, forward.image_features(batch.images)).argmax(dim=-1)
        right = ((best == batch.targets) | (batch.targets == IGNORED)).all(dim=1).tolist()
        turns = len(right) // len(KINDS)
        for index in range(len(right)):
            hits[KINDS[index % len(KINDS)]].append(right[row_of(index, turns)])
    scores = {kind: 100 * sum(row) / len(row) for kind, row in hits.items()}
    return {**scores, "average": sum(scores.values()) / len(scores)}
