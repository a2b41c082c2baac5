"""Tiny random models of every supported family, complete with tokenizer, chat template and processor, made without a
network.

`build_tiny(family, folder)` writes what a model's download would hold; it loads with and without torchvision. Text
becomes one token per byte, so any string survives the round trip and counting tokens by hand is easy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
    *("<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<image>"),
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

VISION_WIDTH = 64
SIDE = 56
"""Tile side, in pixels, of the families with square tiles: 4 x 4 patches."""
PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


@dataclass(frozen=True)
class Family:
    """One row of the table: what a family has that the others do not."""

    model: str
    config: Callable[[dict[str, Any], Callable[[str], int]], transformers.PreTrainedConfig]
    """(text config, token -> id) -> config of the model."""
    image_markup: str = ""
    processor: str | None = None
    image_processor: Callable[[], Any] | None = None
    video_processor: str | None = None
    processor_options: dict[str, Any] = field(default_factory=dict)
    published: tuple[str, str] = ("", "")
    """How tensors' names begin as `transformers` saves them, and as in the published files, where these differ."""


def _qwen_vl(config_class: str, **vision: Any) -> Callable[..., transformers.PreTrainedConfig]:
    def config(text: dict[str, Any], token_id: Callable[[str], int]) -> transformers.PreTrainedConfig:
        head = text["head_dim"]
        rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[head // 8, head * 3 // 16, head * 3 // 16])
        if config_class == "Qwen3VLConfig":
            rope["mrope_interleaved"] = True
        else:
            text = {key: value for key, value in text.items() if key != "head_dim"}
        out = "hidden_size" if config_class == "Qwen2VLConfig" else "out_hidden_size"
        return getattr(transformers, config_class)(
            text_config=dict(text, rope_parameters=rope),
            vision_config=dict(depth=2, num_heads=4) | vision | {out: text["hidden_size"]},
            image_token_id=token_id("<|image_pad|>"),
            video_token_id=token_id("<|video_pad|>"),
            vision_start_token_id=token_id("<|vision_start|>"),
            vision_end_token_id=token_id("<|vision_end|>"),
        )

    return config


def _internvl(text: dict[str, Any], token_id: Callable[[str], int]) -> transformers.PreTrainedConfig:
    return transformers.InternVLConfig(
        text_config=dict(text, model_type="qwen2"),
        vision_config=_tile_encoder(),
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=4,
    )


def _llava_onevision(text: dict[str, Any], token_id: Callable[[str], int]) -> transformers.PreTrainedConfig:
    return transformers.LlavaOnevisionConfig(
        text_config=dict(text, model_type="qwen2"),
        vision_config=_tile_encoder(model_type="siglip_vision_model", vision_use_head=False),
        image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"),
        image_grid_pinpoints=PINPOINTS,
    )


def _tile_encoder(**options: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=VISION_WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    return dict(sizes, image_size=SIDE, patch_size=14, **options)


def _qwen_images(patch: int) -> Callable[[], Any]:
    pixels = (2 * patch) ** 2  # one image token stands for 2 x 2 patches
    return lambda: transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=4 * pixels, max_pixels=64 * pixels, size=None
    )


_QWEN_MARKUP = "<|vision_start|><|image_pad|><|vision_end|>"
_SIZE = dict(height=SIDE, width=SIDE)

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        _qwen_vl("Qwen2VLConfig", embed_dim=VISION_WIDTH, mlp_ratio=2),
        _QWEN_MARKUP,
        "Qwen2VLProcessor",
        _qwen_images(14),
        "Qwen2VLVideoProcessor",
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        _qwen_vl("Qwen2_5_VLConfig", hidden_size=VISION_WIDTH, intermediate_size=128, fullatt_block_indexes=[1]),
        _QWEN_MARKUP,
        "Qwen2_5_VLProcessor",
        _qwen_images(14),
        "Qwen2VLVideoProcessor",
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        _qwen_vl(
            "Qwen3VLConfig",
            hidden_size=VISION_WIDTH,
            intermediate_size=128,
            num_position_embeddings=256,
            deepstack_visual_indexes=[0],
        ),
        _QWEN_MARKUP,
        "Qwen3VLProcessor",
        _qwen_images(16),
        "Qwen3VLVideoProcessor",
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        _internvl,
        "<IMG_CONTEXT>\n",
        "InternVLProcessor",
        lambda: transformers.GotOcr2ImageProcessorPil(size=_SIZE, crop_to_patches=True, max_patches=4),
        "InternVLVideoProcessor",
        dict(image_seq_length=4),
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        _llava_onevision,
        "<image>",
        "LlavaOnevisionProcessor",
        lambda: transformers.LlavaOnevisionImageProcessorPil(size=_SIZE, image_grid_pinpoints=PINPOINTS),
        "LlavaOnevisionVideoProcessor",
        dict(num_image_tokens=16, vision_feature_select_strategy="full"),
        ("vision_tower.", "vision_tower.vision_model."),
    ),
    "qwen2": Family("Qwen2ForCausalLM", lambda text, token_id: transformers.Qwen2Config(**text)),
    "cohere": Family("CohereForCausalLM", lambda text, token_id: transformers.CohereConfig(**text, logit_scale=1.0)),
}
VISION_FAMILIES = tuple(name for name, family in FAMILIES.items() if family.processor)


def tiny_tokenizer(family: str) -> transformers.PreTrainedTokenizerFast:
    """256 byte tokens and the special tokens, in one vocabulary for all families."""
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    named = dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", FAMILIES[family].image_markup),
        **({"extra_special_tokens": named} if family == "internvl" else {}),
    )


def build_tiny(
    family: str,
    folder: str | Path,
    *,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    intermediate_size: int = 128,
    tie_embeddings: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    weight_std: float | None = None,
) -> Path:
    """Write a random model of `family` with everything that its download would hold; the same seed gives the same
    files. weight_std: of all matrices; the models' own are so small that single linears hardly count.

    `hidden_size / heads` must be a multiple of 16 (three rotary sections); the vision tower's size is fixed.
    """
    folder, row = Path(folder), FAMILIES[family]
    tokenizer = tiny_tokenizer(family)
    text = dict(
        vocab_size=64 * -(-len(tokenizer) // 64),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        tie_word_embeddings=tie_embeddings,
    )
    config = row.config(text, tokenizer.convert_tokens_to_ids)
    config.tie_word_embeddings = tie_embeddings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, row.model)(config).to(dtype).eval()
        for parameter in model.parameters() if weight_std else ():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=weight_std)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    saved, published = row.published
    if saved:
        tensors = load_file(folder / "model.safetensors")
        renamed = {
            published + key.removeprefix(saved) if key.startswith(saved) else key: tensors[key] for key in tensors
        }
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    if row.image_processor is not None:
        # Written by hand: no processor object can be made without torchvision, and one saved without its video section
        # does not load where torchvision is installed.
        sections = dict(
            image_processor=row.image_processor().to_dict(),
            video_processor=dict(video_processor_type=row.video_processor),
            processor_class=row.processor,
        )
        (folder / "processor_config.json").write_text(json.dumps(sections | row.processor_options, indent=1))
    return folder


def tiny_image(width: int = 112, height: int = 84, seed: int = 0) -> Image.Image:
    """Noise in RGB."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
