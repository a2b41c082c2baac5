"""What goes between this library's environment and a peer's: samples in, what the peer made of the model out.

Imported on both sides, so it needs nothing but torch and safetensors.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LANGUAGE_MODEL = "model.language_model."
CHECKED = 14
"""So many samples' last logits travel with the result, to check that both sides compute the same model: two of each
kind of question."""
BITS_OF_SCALE = BITS_OF_FACTOR = 16


@dataclass(frozen=True)
class Grid:
    """How a peer stores its quantized linears, all alike."""

    weight_bits: int
    group_size: int | None
    """None: one scale for each output channel."""
    symmetric: bool
    activation_bits: int
    """16: not quantized; else per token, symmetric, found anew for each token."""
    rank: int = 0
    """Of an adapter beside each linear, in half precision; 0 for none."""


def write_samples(batches: Sequence[Mapping[str, Tensor]], path: Path) -> None:
    """Each sample's model inputs, unpadded, in order."""
    tensors = {f"{i:05d}/{name}": value for i, batch in enumerate(batches) for name, value in batch.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def read_samples(path: Path) -> list[dict[str, Tensor]]:
    """As `write_samples` was given them."""
    samples: dict[str, dict[str, Tensor]] = {}
    for key, value in sorted(load_file(path).items()):
        number, name = key.split("/")
        samples.setdefault(number, {})[name] = value
    return list(samples.values())


@torch.no_grad()
def language_inputs(model: Any, samples: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What the language model inside is called with, for each sample: embeddings and positions, never padded.

    Positions are written out where a sample without an image leaves them to the language model: 0, 1, 2, ...
    """
    seen: list[dict[str, Tensor]] = []

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        embeddings, positions = kwargs["inputs_embeds"], kwargs["position_ids"]
        if positions is None:
            positions = torch.arange(embeddings.shape[1]).expand(3, 1, -1)
        seen.append(dict(inputs_embeds=embeddings.clone(), position_ids=positions.clone()))

    handle = model.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    for sample in samples:
        model(**sample, use_cache=False)
    handle.remove()
    return seen


@torch.inference_mode()
def last_logits(model: Any, samples: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """(samples, V) float32: logits at each sample's last token."""
    return torch.cat([model(**sample, use_cache=False).logits[:, -1].float() for sample in samples[:CHECKED]])


def stored_bits(weights: Sequence[Tensor], grid: Grid) -> float:
    """Bits per weight: packed codes, 16 bits for each scale and each number of an adapter, and a code's bits for each
    zero point."""
    numbers = sum(weight.numel() for weight in weights)
    scales = sum(weight.numel() // (grid.group_size or weight.shape[1]) for weight in weights)
    factors = grid.rank * sum(sum(weight.shape) for weight in weights)
    scale_bits = scales * (BITS_OF_SCALE + (0 if grid.symmetric else grid.weight_bits))
    return grid.weight_bits + (scale_bits + factors * BITS_OF_FACTOR) / numbers


def peer_main(methods: Mapping[str, Callable[[Any, list[dict[str, Tensor]]], tuple[dict[str, Tensor], Grid]]]) -> None:
    """The command line of a peer's script: METHOD MODEL SAMPLES OUTPUT.

    A method takes the model in float32 and the samples, quantizes in place, and returns each quantized linear's
    dequantized weight by module name, and the grid. Afterwards the model's own forward must be the quantized one.
    """
    from transformers import AutoModelForImageTextToText

    method, folder, file, output = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    samples = read_samples(file)
    names = [name for name, _ in model.named_parameters() if name.startswith(LANGUAGE_MODEL)]
    started = time.perf_counter()
    weights, grid = methods[method](model, samples)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    own = {name: model.get_parameter(name).detach() for name in names}  # and none that the peer added
    write_result(
        output, own, weights, grid, last_logits(model, samples), dict(seconds=seconds, process_peak_bytes=peak)
    )


def write_result(
    output: Path,
    own: dict[str, Tensor],
    weights: dict[str, Tensor],
    grid: Grid,
    logits: Tensor,
    facts: dict[str, Any],
) -> None:
    """The language model's parameters as they now are (norms included: methods fold scales into them), the quantized
    weights in place of their linears', logits, and the facts."""
    whole = own | {f"{name}.weight": weight for name, weight in weights.items()}
    output.mkdir(parents=True, exist_ok=True)
    save_file({n: tensor.float().contiguous().clone() for n, tensor in whole.items()}, output / "weights.safetensors")
    save_file({"logits": logits}, output / "logits.safetensors")
    facts = facts | dict(
        grid=asdict(grid), linears=sorted(weights), bits_per_weight=stored_bits(list(weights.values()), grid)
    )
    (output / "facts.json").write_text(json.dumps(facts))
