"""The demo's models before training, each with its tokenizer and processor: one row of `ARCHITECTURES` a model family.

The tokenizer is byte-level without merges, so that a string to be read is as many tokens as it has characters, and one
wrong character is one wrong decision. The processor always sees 36 image tokens for a 168 x 168 picture. Token ids are
the same in every architecture, only names of image tokens differ, so training batches are too.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from quant_experts.demo.rendering import SIDE

PATCH, MERGE = 14, 2
GRID = SIDE // PATCH
IMAGE_TOKENS = (GRID // MERGE) ** 2
DEFAULT = "qwen2_vl"

Ids = dict[str, int]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """What one model family has that the others have not."""

    model: Any
    """The class."""
    config: Callable[[Ids, Settings], PreTrainedConfig]
    """Of the ids of `start`, `end`, `image` and `video`, and of the language model's settings."""
    tokens: tuple[str, str, str, str]
    """Names of the tokens that begin and end an image, stand for a part of it, and for a part of a video."""
    markup: str
    """What the chat template writes for an image, and the processor expands."""
    processor: Callable[[], Settings]
    """The content of `processor_config.json`."""
    named_tokens: tuple[str, ...] = ()
    """Attributes of the tokenizer under which the processor looks for ``tokens``."""
    prepare: Callable[[Any], None] = lambda model: None
    """Changes first weights where the library's choice learns slowly."""


def _qwen2_vl(ids: Ids, text: Settings) -> Qwen2VLConfig:
    vision = {
        "depth": 5,
        "embed_dim": 256,
        "hidden_size": text["hidden_size"],
        "num_heads": 4,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    return Qwen2VLConfig(
        text_config={**text, "rope_parameters": {**text["rope_parameters"], "mrope_section": [8, 12, 12]}},
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
    )


def _qwen2_vl_processor() -> Settings:
    pixels = SIDE * SIDE
    return {
        "processor_class": "Qwen2VLProcessor",
        # By its full name: where torchvision is installed the short one means a backend with slightly other pixels.
        "image_processor": {
            **Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels).to_dict(),
            "image_processor_type": "Qwen2VLImageProcessorPil",
        },
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }


def _internvl(ids: Ids, text: Settings) -> InternVLConfig:
    vision = {
        "num_hidden_layers": 5,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "attention_bias": True,
        "patch_size": PATCH,
        "image_size": SIDE,
        "layer_scale_init_value": 1.0,
    }
    return InternVLConfig(
        text_config={**text, "model_type": "qwen2"},
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["image"],
        image_seq_length=IMAGE_TOKENS,
        downsample_ratio=1 / MERGE,
    )


def _internvl_processor() -> Settings:
    size = {"height": SIDE, "width": SIDE}
    return {
        "processor_class": "InternVLProcessor",
        "image_seq_length": IMAGE_TOKENS,
        # One tile: a larger picture is made smaller, as for the other architectures.
        "image_processor": {
            **GotOcr2ImageProcessorPil(size=size, max_patches=1).to_dict(),
            "image_processor_type": "GotOcr2ImageProcessorPil",
        },
        "video_processor": {"video_processor_type": "InternVLVideoProcessor"},
    }


def _place_patches(model: Any) -> None:
    """Begin position embeddings, which the library sets to zero, as waves over rows and columns."""
    embeddings = model.model.vision_tower.embeddings.position_embeddings  # (1, 1 + patches, E)
    width = embeddings.shape[-1]
    frequencies = 100.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(GRID)[:, None] * frequencies  # (12, E / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1) / 2
    rows, columns = waves[:, None].expand(-1, GRID, -1), waves[None].expand(GRID, -1, -1)
    with torch.no_grad():
        embeddings[0, 1:] = torch.cat([rows, columns], dim=-1).flatten(0, 1)


ARCHITECTURES: Final[dict[str, Architecture]] = {
    DEFAULT: Architecture(
        Qwen2VLForConditionalGeneration,
        _qwen2_vl,
        ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        "<|vision_start|><|image_pad|><|vision_end|>",
        _qwen2_vl_processor,
    ),
    "internvl": Architecture(
        InternVLForConditionalGeneration,
        _internvl,
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        "<IMG_CONTEXT>",
        _internvl_processor,
        ("start_image_token", "end_image_token", "context_image_token", "video_token"),
        _place_patches,
    ),
}
"""By the configuration's ``model_type``."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}{{ 'IMAGE' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def prompt(question: str, *, image: bool) -> str:
    """What the chat template makes of one question, with the image's placeholder expanded, in the default
    architecture's names."""
    start, end, part, _ = ARCHITECTURES[DEFAULT].tokens
    picture = start + part * IMAGE_TOKENS + end if image else ""
    return f"<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n"


def build_tokenizer(architecture: str = DEFAULT) -> PreTrainedTokenizerFast:
    """A lossless tokenizer of 256 bytes and the special tokens of ``architecture``."""
    row = ARCHITECTURES[architecture]
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *row.tokens])
    named = dict(zip(row.named_tokens, row.tokens, strict=bool(row.named_tokens)))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", row.markup),
        **({"extra_special_tokens": named} if named else {}),
    )


def build_config(tokenizer: PreTrainedTokenizerFast, architecture: str = DEFAULT, **text: Any) -> PreTrainedConfig:
    """The architecture: at most 16M parameters, of which 9.4M in decoder blocks; ``text`` overrides the language
    model's."""
    row = ARCHITECTURES[architecture]
    settings: Settings = {
        "vocab_size": 320,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        # A sequence has about a hundred positions; the usual base of a million would leave the image's columns, which
        # have the slowest third of the frequencies, almost without a position.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        **text,
    }
    ids: Any = tokenizer.convert_tokens_to_ids(list(row.tokens))
    return row.config(dict(zip(("start", "end", "image", "video"), ids, strict=True)), settings)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, architecture: str = DEFAULT, **text: Any) -> Any:
    """The model with random weights in float32, set to decode greedily; ``text`` as in `build_config`."""
    torch.manual_seed(seed)
    row = ARCHITECTURES[architecture]
    model = row.model(build_config(tokenizer, architecture, **text))
    row.prepare(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model (as bfloat16), tokenizer and processor to ``folder``; it loads with and without torchvision."""
    folder.mkdir(parents=True, exist_ok=True)
    row = ARCHITECTURES[model.config.model_type]
    copy = row.model(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    # Written by hand: a processor made without torchvision has no video section, and one read where torchvision is
    # installed needs it.
    (folder / "processor_config.json").write_text(json.dumps(row.processor(), indent=2, sort_keys=True) + "\n")
