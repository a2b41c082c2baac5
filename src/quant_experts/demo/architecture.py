"""The demo model before training: a small ``Qwen2VLForConditionalGeneration`` with its tokenizer and processor.

The tokenizer is byte-level without merges, so that a string to be read is as many tokens as it has characters, and one
wrong character is one wrong decision. The processor always sees 36 image tokens for a 168 x 168 picture.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from quant_experts.demo.rendering import SIDE

PATCH, MERGE = 14, 2
IMAGE_TOKENS = (SIDE // PATCH // MERGE) ** 2

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] in ('image', 'image_url') -%}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def prompt(question: str, *, image: bool) -> str:
    """What the chat template makes of one question, with the image's placeholder expanded."""
    picture = f"<|vision_start|>{'<|image_pad|>' * IMAGE_TOKENS}<|vision_end|>" if image else ""
    return f"<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lossless tokenizer of 256 bytes and the special tokens of Qwen2-VL."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, **text: Any) -> Qwen2VLConfig:
    """The architecture: 15M parameters, of which 9.4M in decoder blocks; ``text`` overrides the language model's."""
    ids: dict[str, Any] = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text_config: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        # A sequence has about a hundred positions; the usual base of a million would leave the image's columns, which
        # have the slowest third of the frequencies, almost without a position.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 12, 12]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
        **text,
    }
    vision_config = {
        "depth": 5,
        "embed_dim": 256,
        "hidden_size": text_config["hidden_size"],
        "num_heads": 4,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    return Qwen2VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, **text: Any) -> Qwen2VLForConditionalGeneration:
    """The model with random weights in float32, set to decode greedily; ``text`` as in `build_config`."""
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(build_config(tokenizer, **text))
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=32,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def save(model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model (as bfloat16), tokenizer and processor to ``folder``; it loads with and without torchvision."""
    folder.mkdir(parents=True, exist_ok=True)
    copy: Any = Qwen2VLForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    pixels = SIDE * SIDE
    image_processor = Qwen2VLImageProcessorPil(min_pixels=pixels, max_pixels=pixels)
    # Written by hand: a processor made without torchvision has no video section, and one read where torchvision is
    # installed needs it.
    settings = {
        "processor_class": "Qwen2VLProcessor",
        # By its full name: where torchvision is installed the short one means a backend with slightly other pixels.
        "image_processor": {**image_processor.to_dict(), "image_processor_type": "Qwen2VLImageProcessorPil"},
        "video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
