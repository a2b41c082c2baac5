"""GPTQModel on the whole model: its GPTQ, and its EoRA adapter on what that leaves. Runs in its own environment; see
`peer_main`."""

from __future__ import annotations

import os
from functools import partial
from threading import Lock
from typing import Any

import torch
from exchange import LANGUAGE_MODEL, Grid, peer_main
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.adapter.adapter import Lora
from gptqmodel.looper.gptq_processor import GPTQProcessor
from gptqmodel.models.definitions.qwen2_vl import Qwen2VLQModel
from torch import Tensor, nn

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
"""On a machine of two cores its default is 1, which its own loader of models refuses."""

ROUNDING = 2**-7
"""bfloat16's, with some to spare."""
pack_linear, one_at_a_time = GPTQProcessor.submodule_finalize, Lock()
fitted_to: dict[str, Tensor] = {}
"""Each linear's quantized weight, as its adapter saw it."""


def pack_alone(processor: Any, linear: Any, *arguments: Any, **options: Any) -> None:
    """Its packing of one linear. Where an adapter is made, two at once take the processor's lock and that of the
    linear's parent in both orders, and may wait for each other for ever (7.7.0)."""
    with one_at_a_time:
        fitted_to[linear.full_name] = linear.state["wq"].float()
        pack_linear(processor, linear, *arguments, **options)


GPTQProcessor.submodule_finalize = pack_alone


def eora(model: Any, samples: list[dict[str, Tensor]], rank: int) -> tuple[dict[str, Tensor], Grid]:
    """Symmetric in groups of 128, as is its default, in bfloat16: its EoRA refuses float32, and the bundled weights are
    bfloat16.

    Its adapters reach its own kernels only through files, so the given model gets the dequantized weights with each
    adapter added: the model's own forward pass then is transformers'. What is checked instead is that packed weights
    are those that adapters were fitted to; raises ValueError if not.
    """
    # The default format stores zero points less one, which its dequantization adds back only after a file was read.
    config = QuantizeConfig(bits=4, group_size=128, format="gptq_v2", device="cpu", offload_to_disk=False)
    Qwen2VLQModel.require_load_processor = False  # it wants torchvision, and samples are ready
    quantizer = GPTQModel.load(model.name_or_path, config, dtype=torch.bfloat16)
    quantizer.prepare_dataset = lambda calibration_dataset, **_: calibration_dataset
    quantizer.quantize(samples, adapter=Lora(rank=rank))
    weights = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith(LANGUAGE_MODEL):
            base = quantizer.model.get_submodule(name).dequantize_weight().T.float()
            if (base - fitted_to[name]).norm() > ROUNDING * base.norm():
                raise ValueError(f"the packed weight of {name} is not the one that its adapter was fitted to")
            adapter = quantizer.lora_results[name]
            weights[name] = base + adapter.lora_B.float() @ adapter.lora_A.float()
            linear.weight.data.copy_(weights[name])
    return weights, Grid(config.bits, config.group_size, config.sym, activation_bits=16, rank=rank)


if __name__ == "__main__":
    peer_main({f"eora-{rank}": partial(eora, rank=rank) for rank in (8, 16)})
