"""Teaches `transformers` to load and save our checkpoints through `from_pretrained` and `save_pretrained`.

Importing this module registers the quantizer (once); `runtime/autoload.py` does so whenever `transformers` is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quant_experts.checkpoint.schema import QUANT_METHOD, CheckpointConfig
from quant_experts.checkpoint.source import TensorFiles, check_inside, rename_keys
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.modules import QuantizedLinear, swap_linears


class QuantExpertsHfConfig(QuantizationConfigMixin):
    """`CheckpointConfig` in the clothes that `transformers` expects."""

    def __init__(self, **entries: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers types it as its own enum
        self.checkpoint = CheckpointConfig.read({**entries, "quant_method": QUANT_METHOD})

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> QuantExpertsHfConfig | tuple[QuantExpertsHfConfig, dict[str, Any]]:
        """Every key must be ours: unknown ones raise instead of being set as attributes."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` entry of `config.json`."""
        return self.checkpoint.to_json()

    def to_diff_dict(self) -> dict[str, Any]:
        """All entries: the format states its defaults."""
        return self.to_dict()


class QuantExpertsHfQuantizer(HfQuantizer):
    """Swaps quantized modules in before the weights are read, and checks them afterwards."""

    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to check: the reference backend runs wherever PyTorch does."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        assert isinstance(self.quantization_config, QuantExpertsHfConfig)
        config = self.quantization_config.checkpoint
        with torch.device("meta"):
            swapped = [swap_linears(model, group, config.scheme) for group in config.groups]
        modules = {name: module for group in swapped for name, module in group.items()}
        _mark_initialised(model, modules)
        if checkpoint_files:
            _check_files([Path(file) for file in checkpoint_files], model, modules)
        if config.groups:
            # The guard that stops a loader without our package is not ours to load (see docs/format.md).
            guard = re.escape(_guard_name(config)) + "$"
            model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), guard}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                module.finalize(name)
        return model

    def get_state_dict_and_metadata(
        self, model: Any, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `save_pretrained` writes: the model's tensors and the guard."""
        assert isinstance(self.quantization_config, QuantExpertsHfConfig)
        config = self.quantization_config.checkpoint
        guard = {_guard_name(config): torch.zeros(0)} if config.groups else {}
        return {**model.state_dict(), **guard}, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """`save_pretrained` works."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` with a static cache compiles the model's decode steps on a GPU, as it does for a plain model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Inference only."""
        return False


def _guard_name(config: CheckpointConfig) -> str:
    """The weight in whose place an empty tensor stops a loader without our package: its shape does not fit."""
    return f"{config.groups[0].linears[0]}.weight"


def _mark_initialised(model: Any, modules: dict[str, QuantizedLinear]) -> None:
    """Tell `transformers` of modules that hold quantized linears, and beside them only what files hold, that they need
    no initial values: some families' initialisers would look for the linears' weights (SigLIP's attention, Mamba's
    mixer)."""
    for name in modules:
        prefix = name.rpartition(".")[0]
        owner = model.get_submodule(prefix)
        own = [f"{prefix}.{local}" for local in (*owner._parameters, *owner._buffers)]
        if not owner._non_persistent_buffers_set and not any(_may_be_missing(model, tensor) for tensor in own):
            owner._is_hf_initialized = True


def _check_files(paths: list[Path], model: Any, modules: dict[str, QuantizedLinear]) -> None:
    """Compare file headers with what the modules need, before anything is read: `transformers` itself would only warn
    about a missing tensor and go on with random values.

    Raises `QuantExpertsError` that names the tensor and what is wrong.
    """
    folder = paths[0].parent
    named = Path(str(getattr(model.config, "name_or_path", "") or ""))
    if named.is_dir():
        folder = named
    for path in paths:
        check_inside(folder, os.path.relpath(path, folder))
    files = TensorFiles(folder)
    wanted = dict(model.state_dict())
    renamed = rename_keys(model, list(files), wanted)
    keys = {name: key for name, key, converted in renamed if not converted}
    ours = {f"{prefix}.{local}" for prefix, module in modules.items() for local in module.state_dict()}
    # Tied tensors are stored once. Where values are converted on the way in, names are not one to one: transformers
    # checks.
    optional = set(getattr(model, "all_tied_weights_keys", None) or ())
    optional |= wanted.keys() - ours if any(converted for _, _, converted in renamed) else set()
    for name, tensor in wanted.items():
        if name not in keys:
            if name in ours or (name not in optional and not _may_be_missing(model, name)):
                raise QuantExpertsError(f"Tensor '{name}' is missing from '{folder}': the checkpoint is incomplete.")
            continue
        shape, dtype = files.shapes[keys[name]], files.dtypes[keys[name]]
        if shape != tuple(tensor.shape):
            raise QuantExpertsError(
                f"Tensor '{name}' has shape {list(shape)}, config.json needs {list(tensor.shape)}: "
                "the checkpoint's files do not belong together."
            )
        if name in ours and not name.endswith(".bias") and dtype != _SAFETENSORS_NAMES[tensor.dtype]:
            raise QuantExpertsError(
                f"Tensor '{name}' has dtype {dtype}, the format needs {_SAFETENSORS_NAMES[tensor.dtype]}: quantize "
                f"again."
            )


def _may_be_missing(model: Any, name: str) -> bool:
    """Whether the model's class says that files need not hold a tensor."""
    patterns = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


_SAFETENSORS_NAMES = {
    torch.int32: "I32",
    torch.int8: "I8",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}

if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(QuantExpertsHfConfig)
    register_quantizer(QUANT_METHOD)(QuantExpertsHfQuantizer)
