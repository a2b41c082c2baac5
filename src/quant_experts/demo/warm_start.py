"""Beginning a training run with what a trained model of another architecture knows.

The demo's architectures share the language model's parameters and the token ids, so a run can begin with the decoder
blocks, embeddings and head of a trained model, and let them read that model's image tokens while its own vision tower
learns to make them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from quant_experts.demo.channels import spread_channels
from quant_experts.demo.forward import TrainingForward

RECORD = "training.json"


def record_of(folder: Path) -> dict[str, Any]:
    """What a run wrote about itself; empty for a folder without a record."""
    file = folder / RECORD
    return dict(json.loads(file.read_text())) if file.exists() else {}


def as_trained(folder: Path) -> Any:
    """The stored model in float32, its channels as even as they were in training."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    record = record_of(folder)
    spread_channels(model, -record.get("channel_spread", 0.0), record.get("seed_of_weights", 0))
    return model


def adopt_language(model: Any, trained: Any) -> None:
    """Give ``model`` the embeddings, decoder blocks and head of ``trained``; they must be of one size."""
    model.model.language_model.load_state_dict(trained.model.language_model.state_dict())
    model.lm_head.load_state_dict(trained.lm_head.state_dict())


class Teacher:
    """A trained model whose image tokens another tower learns to make."""

    def __init__(self, trained: Any, *, compiled: bool = False) -> None:
        self._forward = TrainingForward(trained.eval(), compiled=compiled)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """As those of `TrainingForward`."""
        return self._forward.image_features(images)

    @torch.no_grad()
    def prepare(self, forward: TrainingForward, images: Tensor) -> None:
        """Let the projector of ``forward`` begin with image tokens of the mean and size of the teacher's.

        Trained image tokens are a hundred times larger than those of first weights: too far for the learning rate. Each
        of the projector's layers takes its share of the factor, found in a few rounds as the activation is not linear.
        """
        wanted = self.image_features(images)
        layers = forward.vision.projector()
        for _ in range(5):
            gain = (wanted.std(dim=(0, 1)).mean() / forward.image_features(images).std(dim=(0, 1)).mean()) ** (1 / 3)
            for layer in layers:
                layer.weight.mul_(gain)
        layers[-1].bias.add_((wanted - forward.image_features(images)).mean(dim=(0, 1)))


def relative_distance(features: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared distance of two sets of image tokens, channel by channel as a share of the wanted one's variance."""
    wanted = wanted.float()
    return ((features.float() - wanted).square().mean(dim=(0, 1)) / wanted.var(dim=(0, 1))).mean()
