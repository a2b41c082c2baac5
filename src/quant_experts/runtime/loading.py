"""`load`: a quantized (or plain) model from a folder, with the right class, checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from quant_experts.checkpoint.source import read_json, weight_files
from quant_experts.errors import QuantExpertsError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def read_config(folder: Path) -> PretrainedConfig:
    """The model's configuration. Raises `QuantExpertsError` for a folder that is no model or a model type nobody
    knows."""
    from transformers import AutoConfig

    raw = read_json(folder / "config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise QuantExpertsError(
            f"transformers cannot read '{folder}' (model type {raw.get('model_type')!r}): {_first_sentence(error)}"
        ) from error
    return config


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class with a language head for a configuration: image-text-to-text if there is one, else causal.

    Raises `QuantExpertsError` if the model type has neither.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            return cast("type[PreTrainedModel]", auto._model_mapping[type(config)])
    raise QuantExpertsError(
        f"Model type '{config.model_type}' neither answers questions about images nor generates text: choose such a "
        f"model."
    )


def resolve(model: str | Path) -> Path:
    """A local folder for a path or a Hugging Face name (downloaded once). Raises `QuantExpertsError` if there is
    neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = str(model)
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise QuantExpertsError(
            f"'{model}' is not a folder: give a model's folder or its Hugging Face name (owner/name)."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name, ignore_patterns=["*.bin", "*.pth", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "consolidated*"]
            )
        )
    except Exception as error:  # the hub's client raises many unrelated types
        raise QuantExpertsError(
            f"Model '{name}' is neither a folder nor downloadable: {_first_sentence(error)}"
        ) from error


def default_dtype(device: str) -> torch.dtype:
    """float32 on a CPU, where bfloat16 products are several times slower; bfloat16 elsewhere."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def check_device(device: str) -> torch.device:
    """The device of a name. Raises `QuantExpertsError` if there is none here."""
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise QuantExpertsError(f"Device '{device}' is not available here: choose cpu, or cuda where there is a GPU.")
    return found


def load_weights(model_class: Any, folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """`from_pretrained` that leaves nothing to chance.

    Where `transformers` only warns of a tensor that is missing, and goes on with random values, this raises
    `QuantExpertsError`, as it does for any file that cannot be read.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    model: PreTrainedModel
    info: dict[str, Any]
    try:
        model, info = model_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise QuantExpertsError(f"'{folder}' cannot be loaded: {_first_sentence(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    if info["mismatched_keys"]:
        name, found, needed = min(info["mismatched_keys"])
        raise QuantExpertsError(
            f"Tensor '{name}' in '{folder}' has shape {list(found)}, the model needs {list(needed)}: "
            "its files do not belong together."
        )
    if info["missing_keys"]:
        raise QuantExpertsError(
            f"Tensor '{min(info['missing_keys'])}' is missing from '{folder}': download or quantize the model again."
        )
    _cast_parameters(model, dtype)
    return model


def _cast_parameters(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring parameters to the compute dtype: transformers 5.17 leaves those that it renames in the files' dtype.

    Buffers stay: a quantized layer's scales and factors have dtypes of their own.
    """
    kept = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def load(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    backend: str | None = None,
) -> PreTrainedModel:
    """Load a quantized checkpoint, or a plain model, ready for `generate`.

    Args:
        model: a folder or a Hugging Face name.
        dtype: compute dtype; float32 on a CPU and bfloat16 on a GPU by default.
        device_map: as in `from_pretrained`, for example "auto" or "cuda"; the CPU by default.
        backend: name of the backend for quantized layers; chosen by device by default.

    Raises:
        QuantExpertsError: no such model, missing, damaged or mismatched files, or a backend that does not apply.
    """
    import quant_experts.runtime.transformers_hook  # noqa: F401  (registers the quantizer)

    folder = resolve(model)
    weight_files(folder)
    config = read_config(folder)
    if isinstance(device_map, str) and device_map not in ("auto", "balanced", "balanced_low_0", "sequential"):
        check_device(device_map)
    dtype = dtype or default_dtype("cpu" if device_map in (None, "cpu") or not torch.cuda.is_available() else "cuda")
    loaded = load_weights(model_class(config), folder, dtype, device_map=device_map)
    loaded.eval()
    if backend is not None:
        force_backend(loaded, backend)
    return loaded


def force_backend(model: torch.nn.Module, backend: str | None) -> None:
    """Make every quantized layer use one backend, or (None) the table's choice again. Raises `QuantExpertsError` at use
    if it does not apply."""
    from quant_experts.runtime.modules import InputGroup

    for module in model.modules():
        if isinstance(module, InputGroup):
            module.backend = backend


def _first_sentence(error: BaseException) -> str:
    """The first line of a library's message, which is the one that names the problem."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."
