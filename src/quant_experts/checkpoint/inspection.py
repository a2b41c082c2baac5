"""What a checkpoint holds, read from headers and its report; every declared tensor is looked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant_experts.checkpoint.run_folder import REPORT_NAME
from quant_experts.checkpoint.schema import (
    GROUP_CHILD,
    CheckpointConfig,
    GroupSpec,
    group_stored_bits,
    group_tensors,
    linear_tensors,
)
from quant_experts.checkpoint.source import TensorFiles, read_json, stored_names
from quant_experts.config import Scheme
from quant_experts.errors import QuantExpertsError


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Scheme, recipe, groups with shapes and stored bits, and calibration errors where the report has them.

    Raises `QuantExpertsError` if the folder is no checkpoint of ours, or a file or tensor is missing or damaged.
    """
    raw = read_json(folder / "config.json").get("quantization_config")
    if not isinstance(raw, dict) or raw.get("quant_method") != "quant_experts":
        raise QuantExpertsError(f"'{folder}' is not quantized by quant-experts: give a folder that `quantize` wrote.")
    config = CheckpointConfig.read(raw)
    files = TensorFiles(folder)
    stored = stored_names((name for spec in config.groups for name in spec.linears), files)
    records = _records(folder)
    groups = []
    for spec in config.groups:
        names = [stored.get(name, name) for name in spec.linears]
        shapes = [_weight_shape(files, name) for name in names]
        rows, width = tuple(shape[0] for shape in shapes), shapes[0][1]
        _check_headers(files, spec, config.scheme, names, rows, width)
        bits = group_stored_bits(spec, config.scheme, rows, width)
        record = records.get(spec.linears[0], {})
        groups.append(
            spec.to_json()
            | dict(
                shape=[sum(rows), width],
                stored_bits=bits,
                bits=bits / (sum(rows) * width),
                error=record.get("error", {}).get("all"),
                rtn_error=record.get("rtn_error", {}).get("all"),
            )
        )
    weights = sum(g["shape"][0] * g["shape"][1] for g in groups)
    return dict(
        scheme=str(config.scheme),
        recipe=config.recipe.name,
        seed=config.seed,
        format_version=config.format_version,
        library_version=config.library_version,
        bits_per_weight=sum(g["stored_bits"] for g in groups) / max(1, weights),
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        groups=groups,
        ignore=list(config.ignore),
    )


def read_report(folder: Path) -> dict[str, Any]:
    """What the run wrote about itself: config, samples, tokens, `groups` (as `GroupRecord`) and `events`."""
    report = read_json(folder / REPORT_NAME)
    if not isinstance(report.get("groups"), list) or not isinstance(report.get("events"), list):
        raise QuantExpertsError(f"'{folder / REPORT_NAME}' is damaged: quantize again.")
    return report


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    """The report's groups by their first linear's name; empty if there is no report."""
    groups = read_report(folder)["groups"] if (folder / REPORT_NAME).is_file() else []
    return {group["linears"][0]: group for group in groups}


def _check_headers(
    files: TensorFiles, spec: GroupSpec, scheme: Scheme, names: list[str], rows: tuple[int, ...], width: int
) -> None:
    """Raises `QuantExpertsError` if a tensor of the group is missing, or of another shape than the format says."""
    wanted = {f"{names[0]}.{GROUP_CHILD}.{key}": value for key, value in group_tensors(spec, width).items()}
    for name, count in zip(names, rows, strict=True):
        wanted |= {f"{name}.{key}": value for key, value in linear_tensors(spec, scheme, count, width).items()}
    for key, (shape, _) in wanted.items():
        if key not in files:
            raise QuantExpertsError(f"Tensor '{key}' is missing from '{files.folder}': the checkpoint is incomplete.")
        if files.shapes[key] != shape:
            raise QuantExpertsError(
                f"Tensor '{key}' has shape {list(files.shapes[key])}, the format needs {list(shape)}: quantize again."
            )


def _weight_shape(files: TensorFiles, stored_name: str) -> tuple[int, int]:
    """(N, K) of a linear. Raises `QuantExpertsError` if it is missing or cannot be one."""
    if f"{stored_name}.weight_shape" not in files:
        raise QuantExpertsError(
            f"Tensor '{stored_name}.weight_shape' is missing from '{files.folder}': the checkpoint is incomplete."
        )
    shape = files.read(f"{stored_name}.weight_shape").tolist()
    if not (isinstance(shape, list) and len(shape) == 2 and min(shape) > 0):
        raise QuantExpertsError(f"Tensor '{stored_name}.weight_shape' says {shape}: the checkpoint is damaged.")
    return int(shape[0]), int(shape[1])
