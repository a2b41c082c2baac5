"""The model's forward pass for training, on batches whose first rows have a picture right after the user's turn opens.

It runs the parameters and, for the language model, the modules of the transformers model itself; a test holds its
logits to those of the model's own forward. What differs stands in `vision`.
Shapes: B rows, of which the first P have a picture; T tokens; V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from quant_experts.demo.architecture import IMAGE_TOKENS
from quant_experts.demo.vision import IMAGE_START, VISIONS


class TrainingForward:
    """The forward pass of ``model``, of any of the demo's architectures."""

    def __init__(self, model: Any, *, compiled: bool = False) -> None:
        """With ``compiled``, the repeated blocks are compiled, once for all layers."""
        self.model = model
        self.vision = VISIONS[model.config.model_type](model, compiled)
        if compiled:
            for layer in model.model.language_model.layers:
                layer.compile()

    def image_features(self, images: Tensor) -> Tensor:
        """Image tokens (P, 36, hidden) of images (P, SIDE, SIDE, 3) uint8."""
        return self.vision.features(images)

    def logits(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Logits (B, T, V) of right-padded tokens (B, T) and the image tokens (P, 36, hidden) of the first P rows."""
        language = self.model.model.language_model
        embedded = language.embed_tokens(tokens)
        pictures, end = len(features), IMAGE_START + IMAGE_TOKENS
        seen = embedded[:pictures]
        seen = torch.cat([seen[:, :IMAGE_START], features.to(embedded.dtype), seen[:, end:]], dim=1)
        embedded = torch.cat([seen, embedded[pictures:]])
        # Padding comes last and attention looks back only, so no mask is needed.
        positions = self.vision.positions(tokens, pictures)
        hidden = language(inputs_embeds=embedded, position_ids=positions, use_cache=False)
        logits: Tensor = self.model.lm_head(hidden.last_hidden_state)
        return logits
