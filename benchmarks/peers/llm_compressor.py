"""llm-compressor on the language model, by its sequential pipeline. Runs in its own environment; see `peer_main`.

Its tracing takes samples of one form only, and ours come with and without an image, so it is given the language model
with that model's own inputs: embeddings in which the vision tower, which nobody quantizes here, has put its features.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import forward_quantize
from exchange import LANGUAGE_MODEL, Grid, language_inputs, peer_main
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import default_mappings
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

SMOOTHED = [
    [["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"],
    [["re:.*gate_proj", "re:.*up_proj"], "re:.*post_attention_layernorm"],
]


def calibrate(model: Any, samples: list[dict[str, Tensor]], recipe: list[Any]) -> tuple[dict[str, Tensor], Grid]:
    """Run a recipe on all linears of the language model."""
    inputs: Any = language_inputs(model, samples)  # a list serves as a data set
    language_model = model.model.language_model
    language_model.config.name_or_path = model.name_or_path  # where it looks whether the model is quantized already
    oneshot(
        model=language_model,
        processor=AutoTokenizer.from_pretrained(model.name_or_path),  # asked for, and not used: samples are ready
        dataset=DataLoader(inputs, batch_size=1, collate_fn=lambda batch: batch[0]),
        recipe=recipe,
        num_calibration_samples=len(inputs),
        pipeline="sequential",
        sequential_targets=["Qwen2VLDecoderLayer"],
    )
    return dequantized(language_model)


def dequantized(language_model: Any) -> tuple[dict[str, Tensor], Grid]:
    """As the package's own forward pass uses them."""
    linears = {n: m for n, m in language_model.named_modules() if getattr(m, "quantization_scheme", None) is not None}
    weights = {
        LANGUAGE_MODEL + name: forward_quantize(m, m.weight.data, "weight", m.quantization_scheme.weights)
        for name, m in linears.items()
    }
    scheme = next(iter(linears.values())).quantization_scheme
    activations = scheme.input_activations
    if activations is not None and not (
        activations.dynamic and activations.symmetric and activations.strategy == "token"
    ):
        raise ValueError(f"activations are quantized otherwise than per token: {activations}")
    grid = Grid(
        weight_bits=scheme.weights.num_bits,
        group_size=scheme.weights.group_size if scheme.weights.strategy == "group" else None,
        symmetric=scheme.weights.symmetric,
        activation_bits=16 if activations is None else activations.num_bits,
    )
    return weights, grid


def gptq(model: Any, samples: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Grid]:
    """Its preset W4A16: symmetric in groups of 128; its default order of columns."""
    return calibrate(model, samples, [GPTQModifier(targets=["Linear"], scheme="W4A16")])


def awq(model: Any, samples: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Grid]:
    """Asymmetric in groups of 128, as in its examples of AWQ."""
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None  # 0.14.0.1 pins memory even where that is an error
    search = AWQModifier(mappings=default_mappings)
    return calibrate(model, samples, [search, QuantizationModifier(targets=["Linear"], scheme="W4A16_ASYM")])


def smoothquant_gptq(model: Any, samples: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], Grid]:
    """SmoothQuant of strength 0.8 and GPTQ, as in its example of W8A8."""
    smooth = SmoothQuantModifier(smoothing_strength=0.8, mappings=SMOOTHED)
    return calibrate(model, samples, [smooth, GPTQModifier(targets=["Linear"], scheme="W8A8")])


if __name__ == "__main__":
    peer_main({"gptq": gptq, "awq": awq, "smoothquant-gptq": smoothquant_gptq})
