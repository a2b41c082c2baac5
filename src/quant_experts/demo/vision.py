"""Vision towers for training: equal-sized pictures in one batch, without the loops a general forward needs.

Patches are embedded by one matrix product instead of a convolution, and what depends on the picture's size alone is
computed once for all pictures instead of picture by picture.
Shapes: B rows, of which the first P have a picture; T tokens; E vision width.
"""

from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from quant_experts.demo.architecture import GRID, IMAGE_TOKENS, MERGE, PATCH

IMAGE_START = 7  # the tokens before the first image token: <|im_start|> u s e r \n <|vision_start|>
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the image processors' defaults
_STD = (0.26862954, 0.26130258, 0.27577711)


class Vision(Protocol):
    """What an architecture does with pictures."""

    def __init__(self, model: Any, compiled: bool) -> None: ...

    def features(self, images: Tensor) -> Tensor:
        """Image tokens (P, 36, hidden) of images (P, SIDE, SIDE, 3) uint8."""
        ...

    def projector(self) -> tuple[Any, Any, Any]:
        """Norm, first and second linear of what turns patches to image tokens."""
        ...

    def positions(self, tokens: Tensor, pictures: int) -> Tensor:
        """Position ids of tokens (B, T) of which the first ``pictures`` rows have a picture."""
        ...


def patches(images: Tensor, merge: int) -> Tensor:
    """Normalized patches (P, 144, 588) of images (P, SIDE, SIDE, 3) uint8, squares of ``merge`` x ``merge`` patches
    together."""
    mean = torch.tensor(_MEAN, device=images.device) * 255
    std = torch.tensor(_STD, device=images.device) * 255
    tiles = ((images.float() - mean) / std).view(-1, GRID // merge, merge, PATCH, GRID // merge, merge, PATCH, 3)
    return tiles.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(len(images), GRID**2, 3 * PATCH * PATCH)


def _rotation(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (144, width) of the patches' rows and columns, in merge order."""
    grid = torch.arange(GRID**2, device=device).view(GRID // MERGE, MERGE, GRID // MERGE, MERGE)
    order = grid.permute(0, 2, 1, 3).flatten()
    half = width // 2
    frequencies = 10000.0 ** -(torch.arange(0, half, 2, device=device) / half)
    angles = torch.cat([(order // GRID)[:, None] * frequencies, (order % GRID)[:, None] * frequencies], dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-high, low], dim=-1) * sines


def _qwen_block(block: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """One block of Qwen2-VL's tower on (P, 144, E), every picture attending to itself."""
    attention = block.attn
    rows, length, width = x.shape
    joint = attention.qkv(block.norm1(x)).view(rows, length, 3, attention.num_heads, -1)
    query, key, value = joint.permute(2, 0, 3, 1, 4)  # each (P, heads, 144, E / heads)
    query, key = _rotated(query, cosines, sines).to(value.dtype), _rotated(key, cosines, sines).to(value.dtype)
    mixed = functional.scaled_dot_product_attention(query, key, value)
    x = x + attention.proj(mixed.transpose(1, 2).reshape(rows, length, width))
    out: Tensor = x + block.mlp(block.norm2(x))
    return out


class Qwen2VLVision:
    """Patches in merge order with rotary positions; image tokens have a row and a column."""

    def __init__(self, model: Any, compiled: bool) -> None:
        self._tower = model.model.visual
        self._block = torch.compile(_qwen_block) if compiled else _qwen_block

    def features(self, images: Tensor) -> Tensor:
        """As in `Vision`."""
        # Both frames of a still picture are equal, so the convolution over time is a sum of its weights.
        kernel = self._tower.patch_embed.proj.weight.sum(dim=2).flatten(1)
        x = functional.linear(patches(images, MERGE), kernel)
        heads = self._tower.blocks[0].attn.num_heads
        cosines, sines = _rotation(x.shape[-1] // heads, x.device)
        for block in self._tower.blocks:
            x = self._block(block, x, cosines, sines)
        merged: Tensor = self._tower.merger(x)
        return merged.view(len(images), IMAGE_TOKENS, -1)

    def projector(self) -> tuple[Any, Any, Any]:
        """As in `Vision`."""
        merger = self._tower.merger
        return merger.ln_q, merger.mlp[0], merger.mlp[2]

    def positions(self, tokens: Tensor, pictures: int) -> Tensor:
        """Ids (3, B, T) for time, row and column: text counts on, a picture has a time and a grid of its own."""
        rows, length = tokens.shape
        ids = torch.arange(length, device=tokens.device).repeat(3, rows, 1)
        side = GRID // MERGE
        cell = torch.arange(IMAGE_TOKENS, device=tokens.device)
        end = IMAGE_START + IMAGE_TOKENS
        grid = torch.stack([torch.zeros_like(cell), cell // side, cell % side])
        ids[:, :pictures, IMAGE_START:end] = (IMAGE_START + grid)[:, None]
        ids[:, :pictures, end:] -= IMAGE_TOKENS - side
        return ids


class InternVLVision:
    """The model's own blocks on patches with learned positions and a class token; image tokens count on like text."""

    def __init__(self, model: Any, compiled: bool) -> None:
        self._model = model.model
        if compiled:
            for layer in self._model.vision_tower.encoder.layer:
                layer.compile()

    def features(self, images: Tensor) -> Tensor:
        """As in `Vision`."""
        tower = self._model.vision_tower
        projection = tower.embeddings.patch_embeddings.projection
        x = functional.linear(patches(images, 1), projection.weight.flatten(1), projection.bias)
        first = tower.embeddings.cls_token.expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1) + tower.embeddings.position_embeddings
        for layer in tower.encoder.layer:
            x = layer(x)
        grid = tower.layernorm(x)[:, 1:].reshape(len(images), GRID, GRID, -1)
        merged = self._model.pixel_shuffle(grid, scale_factor=1 / MERGE)
        tokens: Tensor = self._model.multi_modal_projector(merged.flatten(1, 2))
        return tokens

    def projector(self) -> tuple[Any, Any, Any]:
        """As in `Vision`."""
        projector = self._model.multi_modal_projector
        return projector.layer_norm, projector.linear_1, projector.linear_2

    def positions(self, tokens: Tensor, pictures: int) -> Tensor:
        """Ids (1, T)."""
        return torch.arange(tokens.shape[1], device=tokens.device)[None]


VISIONS: Final[dict[str, type[Vision]]] = {"qwen2_vl": Qwen2VLVision, "internvl": InternVLVision}
"""By the configuration's ``model_type``."""
