"""Loads what turns text and images into a model's inputs, also where torchvision is not installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

import quant_experts.runtime.video_slot  # noqa: F401  (lets processors load without torchvision)
from quant_experts.errors import QuantExpertsError

_Auto: Any = AutoProcessor  # transformers is only partly typed


def load_processor(path: str | Path) -> Any:
    """The processor of a vision-language model, or the tokenizer of a text-only one, padding on the left as generation
    needs.

    Args:
        path: a model folder, or a name on the Hugging Face hub.

    Raises:
        QuantExpertsError: no such folder, or its processor or tokenizer files are missing, broken or of an unknown
            kind.
    """
    _refuse_missing_folder(path)
    try:
        processor = _Auto.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        # transformers reports damaged or incomplete files through all of these.
        reason = re.split(r"\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__
        raise QuantExpertsError(
            f"Cannot load a processor or tokenizer from '{path}' ({reason}): copy all tokenizer and processor files"
            " of the model into that folder."
        ) from error
    tokenizer = find_tokenizer(processor)
    if tokenizer is not None and len(tokenizer) <= len(tokenizer.added_tokens_encoder):
        # transformers makes an empty tokenizer when the vocabulary file is missing, which would turn every text into
        # nothing.
        raise QuantExpertsError(f"The tokenizer in '{path}' has no vocabulary: copy the model's tokenizer files there.")
    if tokenizer is None:
        raise QuantExpertsError(
            f"'{path}' has a {type(processor).__name__} but no tokenizer: copy the model's tokenizer files there."
        )
    tokenizer.padding_side = "left"
    return processor


def find_tokenizer(processor: Any) -> Any:
    """The tokenizer inside a processor, the tokenizer itself if it is one, else None."""
    return processor if hasattr(processor, "convert_tokens_to_ids") else getattr(processor, "tokenizer", None)


def takes_images(processor: Any) -> bool:
    """True for the processor of a vision-language model, False for a tokenizer."""
    return getattr(processor, "image_processor", None) is not None


def _refuse_missing_folder(path: str | Path) -> None:
    # Anything but 'owner/model' that is not a folder would end in a minute of retries and a puzzling message from the
    # hub client.
    is_hub_name = re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(path)) and not isinstance(path, Path)
    if not Path(path).is_dir() and (Path(path).exists() or not is_hub_name):
        raise QuantExpertsError(f"'{path}' is not a folder: give the folder that holds the model's config.json.")
