"""Reads safetensors folders tensor by tensor, under the names that the model itself uses.

Files and modules do not always agree on names (Qwen2-VL's files say `model.layers.*`, its modules
`model.language_model.layers.*`); `transformers` knows the mapping and is asked for it. A file is opened for each read
and closed again: a mapping that stays open keeps every page that was touched in memory, which for a large model is the
whole model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant_experts.errors import QuantExpertsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `QuantExpertsError` if it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QuantExpertsError(f"'{path}' does not exist: give the folder of a Hugging Face model.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QuantExpertsError(f"'{path}' is not readable JSON ({error}).") from error
    if not isinstance(value, dict):
        raise QuantExpertsError(f"'{path}' must hold a JSON object.")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder. Raises `QuantExpertsError` if there are none or one is missing or
    outside."""
    if (folder / INDEX_NAME).is_file():
        weight_map = read_json(folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise QuantExpertsError(f"'{folder / INDEX_NAME}' has no weight_map.")
        names = sorted(set(map(str, weight_map.values())))
    elif (folder / SINGLE_NAME).is_file():
        names = [SINGLE_NAME]
    else:
        raise QuantExpertsError(
            f"'{folder}' holds no {SINGLE_NAME} and no {INDEX_NAME}: give a folder with safetensors weights."
        )
    for name in names:
        check_inside(folder, name)
        if not (folder / name).is_file():
            raise QuantExpertsError(f"Weight file '{name}' is missing from '{folder}': download the model again.")
    return [folder / name for name in names]


def check_inside(folder: Path, name: str) -> None:
    """Refuse a file name from an index that leaves the folder (hub caches link out of it, so links are not
    resolved)."""
    if Path(name).is_absolute() or ".." in Path(name).parts or re.match(r"[A-Za-z]:|\\", name):
        raise QuantExpertsError(
            f"The index of '{folder}' names '{name}', which is outside the folder: refusing to read it."
        )


def stored_names(linears: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """What files call quantized linears, by their module names; one that is not found is left out.

    Files may name the model's outer parts otherwise than its modules do. So names belong together that have the longest
    ending in common, from the number of a block on at least, and among several those that have most other parts in
    common: `model.language_model.layers.0.mlp.up_proj` and `language_model.model.layers.0.mlp.up_proj`, not
    `vision_tower.layers.0.mlp.up_proj`. Where that leaves a choice none is made.

    keys: the names of all tensors in the files.
    """
    suffix = ".weight_shape"  # of each quantized linear there is one
    stored = {key.removesuffix(suffix) for key in keys if key.endswith(suffix)}
    wanted, found = set(linears), dict[str, str]()
    for length in range(max((name.count(".") + 1 for name in wanted), default=0), 0, -1):
        pairs: dict[str, str] | None = None
        while pairs is None or pairs:  # what is found leaves less to choose from
            pairs = _only_choices(
                _by_ending((name for name in wanted if length >= _least_ending(name)), length),
                _by_ending(stored, length),
            )
            found |= pairs
            wanted -= pairs.keys()
            stored -= set(pairs.values())
    return found


def _only_choices(wanted: dict[str, list[str]], stored: dict[str, list[str]]) -> dict[str, str]:
    """Pairs of names with the same ending of which each is the other's best, alone."""
    pairs = {}
    for ending, linears in wanted.items():
        names = stored.get(ending, [])
        for linear in linears:
            name = _best(linear, names)
            if name is not None and _best(name, linears) == linear:
                pairs[linear] = name
    return pairs


def _best(name: str, others: list[str]) -> str | None:
    """Of other names the one with most parts in common, None if there is none or a choice."""
    ranked = sorted((len({*name.split(".")} & {*other.split(".")}), other) for other in others)
    return ranked[-1][1] if ranked and (len(ranked) == 1 or ranked[-1][0] > ranked[-2][0]) else None


def _least_ending(name: str) -> int:
    """How many parts of a name an ending must have to tell it from those of other blocks: from the first number on."""
    parts = name.split(".")
    return next((len(parts) - i for i, part in enumerate(parts) if part.isdigit()), 1)


def _by_ending(names: Iterable[str], length: int) -> dict[str, list[str]]:
    """Dotted names by their last parts."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(".".join(name.split(".")[-length:]), []).append(name)
    return found


def spot_check(path: Path, *, spots: int = 64, length: int = 1 << 14) -> str:
    """A digest of a file's size and of evenly spaced spots in it: tells a fine-tuned model from its origin without
    reading all."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for spot in range(spots):
            file.seek(max(0, size - length) * spot // (spots - 1))
            digest.update(file.read(length))
    return digest.hexdigest()


class TensorFiles:
    """All tensors of a model folder: their places, shapes and dtypes at once, their values one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118 (not a dict)
                        header = file.get_slice(key)
                        self._file_of[key] = path
                        self.shapes[key], self.dtypes[key] = tuple(header.get_shape()), header.get_dtype()
            except (SafetensorError, OSError) as error:
                raise QuantExpertsError(f"Weight file '{path}' is damaged ({error}): download it again.") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def read(self, key: str) -> Tensor:
        """One tensor, copied out of the file. Raises `QuantExpertsError` if it does not exist or cannot be read."""
        if key not in self._file_of:
            raise QuantExpertsError(f"Tensor '{key}' is missing from '{self.folder}': download the model again.")
        try:
            with safe_open(self._file_of[key], framework="pt") as file:
                tensor: Tensor = file.get_tensor(key).clone()
        except (SafetensorError, OSError) as error:
            raise QuantExpertsError(f"Tensor '{key}' in '{self._file_of[key]}' cannot be read ({error}).") from error
        return tensor

    def read_finite(self, key: str) -> Tensor:
        """As `read`, and raises `QuantExpertsError` if the tensor holds NaN or infinity."""
        tensor = self.read(key)
        # 8-bit floats have no isfinite of their own.
        if tensor.is_floating_point() and not (tensor if tensor.itemsize > 1 else tensor.half()).isfinite().all():
            raise QuantExpertsError(
                f"Tensor '{key}' in '{self._file_of[key]}' holds NaN or infinity: the model is damaged."
            )
        return tensor

    def element_size(self, key: str) -> int:
        """Bytes of one element."""
        bits = re.search(r"\d+", self.dtypes[key])
        return max(1, int(bits[0]) // 8) if bits else 1


def module_names(model: PreTrainedModel, keys: Iterable[str], wanted: dict[str, Any]) -> dict[str, str]:
    """Map the model's own tensor names to file keys; keys whose values would have to be converted are left out."""
    return {name: key for name, key, converted in rename_keys(model, keys, wanted) if not converted}


def rename_keys(model: PreTrainedModel, keys: Iterable[str], wanted: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(the model's own tensor name, file key, whether values are converted) as `transformers` does when it loads.

    wanted: a state dict on the meta device that holds every name the model could have. Values are converted, not only
    renamed, in some mixtures of experts.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    names: list[tuple[str, str, bool]] = []
    for key in keys:
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and key in wanted:
            name, converted = key, None
        names.append((name, key, converted is not None))
    return names
