"""The model's forward pass for training: equal-sized pictures in one batch, without the loops a general forward needs.

It runs the parameters and, for the language model, the modules of the transformers model itself; a test holds its
logits to those of the model's own forward. What differs: patches are embedded by one matrix product instead of a
convolution, and vision attention and positions are computed once for all pictures instead of picture by picture.
Shapes: B rows, of which the first P have a picture; T tokens; V vocabulary; E vision width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2VLForConditionalGeneration

from quant_experts.demo.architecture import IMAGE_TOKENS, MERGE, PATCH
from quant_experts.demo.rendering import SIDE

IMAGE_START = 7  # the tokens before the first image token: <|im_start|> u s e r \n <|vision_start|>
_GRID = SIDE // PATCH
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the image processor's defaults
_STD = (0.26862954, 0.26130258, 0.27577711)


def patches(images: Tensor) -> Tensor:
    """Normalized patches (P, 144, 588), in merge order, of images (P, SIDE, SIDE, 3) uint8."""
    mean = torch.tensor(_MEAN, device=images.device) * 255
    std = torch.tensor(_STD, device=images.device) * 255
    half = _GRID // MERGE
    tiles = ((images.float() - mean) / std).view(-1, half, MERGE, PATCH, half, MERGE, PATCH, 3)
    return tiles.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(len(images), _GRID**2, 3 * PATCH * PATCH)


def _vision_rotation(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (144, width) of the patches' rows and columns, in merge order."""
    grid = torch.arange(_GRID**2, device=device).view(_GRID // MERGE, MERGE, _GRID // MERGE, MERGE)
    order = grid.permute(0, 2, 1, 3).flatten()
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, device=device) / half)
    angles = torch.cat([(order // _GRID)[:, None] * frequencies, (order % _GRID)[:, None] * frequencies], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-high, low], dim=-1) * sines


def vision_block(block: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """One block of the vision tower on (P, 144, E), every picture attending to itself."""
    attention = block.attn
    rows, length, width = x.shape
    joint = attention.qkv(block.norm1(x)).view(rows, length, 3, attention.num_heads, -1)
    query, key, value = joint.permute(2, 0, 3, 1, 4)  # each (P, heads, 144, E / heads)
    query, key = _rotated(query, cosines, sines).to(value.dtype), _rotated(key, cosines, sines).to(value.dtype)
    mixed = functional.scaled_dot_product_attention(query, key, value)
    x = x + attention.proj(mixed.transpose(1, 2).reshape(rows, length, width))
    out: Tensor = x + block.mlp(block.norm2(x))
    return out


def positions(tokens: Tensor, pictures: int) -> Tensor:
    """Position ids (3, B, T) for time, row and column: text counts on, a picture has a time and a grid of its own."""
    rows, length = tokens.shape
    ids = torch.arange(length, device=tokens.device).repeat(3, rows, 1)
    side = _GRID // MERGE
    cell = torch.arange(IMAGE_TOKENS, device=tokens.device)
    end = IMAGE_START + IMAGE_TOKENS
    grid = torch.stack([torch.zeros_like(cell), cell // side, cell % side])
    ids[:, :pictures, IMAGE_START:end] = (IMAGE_START + grid)[:, None]
    ids[:, :pictures, end:] -= IMAGE_TOKENS - side
    return ids


class TrainingForward:
    """The forward pass of ``model`` on batches whose first rows have a picture right after the user's turn opens."""

    def __init__(self, model: Qwen2VLForConditionalGeneration, *, compiled: bool = False) -> None:
        """With ``compiled``, the repeated blocks are compiled, once for all layers."""
        self.model = model
        self._block = torch.compile(vision_block) if compiled else vision_block
        if compiled:
            for layer in model.model.language_model.layers:
                layer.compile()

    def image_features(self, images: Tensor) -> Tensor:
        """Image tokens (P, 36, hidden) of images (P, SIDE, SIDE, 3) uint8."""
        tower = self.model.model.visual
        # Both frames of a still picture are equal, so the convolution over time is a sum of its weights.
        kernel = tower.patch_embed.proj.weight.sum(dim=2).flatten(1)
        x = functional.linear(patches(images), kernel)
        heads = tower.blocks[0].attn.num_heads
        cosines, sines = _vision_rotation(x.shape[-1] // heads, x.device)
        for block in tower.blocks:
            x = self._block(block, x, cosines, sines)
        merged: Tensor = tower.merger(x)
        return merged.view(len(images), IMAGE_TOKENS, -1)

    def logits(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Logits (B, T, V) of right-padded tokens (B, T) and the pictures (P, SIDE, SIDE, 3) of the first P rows."""
        language = self.model.model.language_model
        embedded = language.embed_tokens(tokens)
        if len(images):
            features = self.image_features(images).to(embedded.dtype)
            end = IMAGE_START + IMAGE_TOKENS
            seen = embedded[: len(images)]
            seen = torch.cat([seen[:, :IMAGE_START], features, seen[:, end:]], dim=1)
            embedded = torch.cat([seen, embedded[len(images) :]])
        # Padding comes last and attention looks back only, so no mask is needed.
        hidden = language(inputs_embeds=embedded, position_ids=positions(tokens, len(images)), use_cache=False)
        logits: Tensor = self.model.lm_head(hidden.last_hidden_state)
        return logits
