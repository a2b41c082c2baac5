"""A run's output on disk: whole at every moment, resumable, and never half a checkpoint under the final name.

While a run goes on, everything lies in `OUT.partial`: finished files under their final names, and in `.run` what only
the run needs (its settings, a lock, one record a block). Each file is written under a temporary name and renamed. When
all is there, the folder itself is renamed to `OUT`, and only then `.run` is removed: until the rename the run can go
on, and nobody else's can.
A run that was killed leaves `OUT.partial`; the same call goes on where it stopped.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant_experts.checkpoint.schema import CheckpointConfig
from quant_experts.checkpoint.source import INDEX_NAME, TensorFiles, read_json
from quant_experts.errors import QuantExpertsError

REPORT_NAME = "quantization_report.json"
_RUN = ".run"
SHARD_BYTES = 1 << 30
_COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
_NOT_COPIED = {"config.json", INDEX_NAME, REPORT_NAME}


class RunFolder:
    """The partial output of one run. Use as a context manager: it holds the lock."""

    def __init__(self, output: Path, fingerprint: dict[str, Any]) -> None:
        """Raises `QuantExpertsError` if `output` holds something, or a partial run of other settings is in the way."""
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self._run = self.partial / _RUN
        self._fingerprint = fingerprint

    def __enter__(self) -> RunFolder:
        if (self.output / REPORT_NAME).is_file():  # a run that was stopped right after its last rename
            shutil.rmtree(self.output / _RUN, ignore_errors=True)
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise QuantExpertsError(f"Output '{self.output}' is not empty: choose another folder.")
        with _disk_errors(self.partial):
            self._run.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self._run / "lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise QuantExpertsError(f"Another run is writing '{self.partial}': wait for it, or stop it.") from error
            settings = self._run / "settings.json"
            if not settings.exists():
                _write_json(settings, self._fingerprint)
        found = read_json(settings)
        differing = sorted(k for k in {*found, *self._fingerprint} if found.get(k) != self._fingerprint.get(k))
        if differing:
            self._lock.release()
            raise QuantExpertsError(
                f"'{self.partial}' holds an unfinished run with other settings ({', '.join(differing)}): "
                "delete it, or repeat that run's call to finish it."
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A run that was refused before it had written anything leaves nothing."""
        if kind is not None and issubclass(kind, QuantExpertsError) and not any(self.partial.glob("*.safetensors")):
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.release()

    def block_file(self, index: int) -> Path:
        """Where a block's tensors are written."""
        return self.partial / f"block-{index:05d}.safetensors"

    def has_block(self, index: int) -> bool:
        """True once the block and its record are complete."""
        return self.block_file(index).exists() and self._record_file(index).exists()

    def write_block(self, index: int, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Write a finished block; the tensors come last, so their presence means that both are there."""
        with _disk_errors(self.partial):
            _write_json(self._record_file(index), record)
            _write_tensors(self.block_file(index), tensors)

    def read_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `write_block` wrote. Raises `QuantExpertsError` if it was damaged since."""
        path = self.block_file(index)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise QuantExpertsError(
                f"'{path}' of an unfinished run is damaged ({error}): delete '{self.partial}'."
            ) from error
        return tensors, read_json(self._record_file(index))

    def remember(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` gave when this run, interrupted or not, first asked for it: a JSON object."""
        path = self._run / f"{name}.json"
        if not path.exists():
            value = compute()
            with _disk_errors(self.partial):
                _write_json(path, value)
        return read_json(path)

    def _record_file(self, index: int) -> Path:
        return self._run / f"block-{index:05d}.json"

    def copy_rest(self, files: TensorFiles, keys: Sequence[str]) -> None:
        """Copy tensors that no block owns, unchanged, in shards of at most 1 GiB (or one tensor); finished shards are
        kept.

        Raises `QuantExpertsError` for a tensor that holds NaN or infinity.
        """
        for number, shard in enumerate(_shards(files, keys)):
            path = self.partial / f"rest-{number:05d}.safetensors"
            if not path.exists():
                tensors = {key: files.read_finite(key) for key in shard}
                with _disk_errors(self.partial):
                    _write_tensors(path, tensors)

    def finish(self, source: Path, config: CheckpointConfig, report: dict[str, Any]) -> None:
        """Write the index and the small files, then give the folder its final name."""
        with _disk_errors(self.partial):
            for path in sorted(source.iterdir()):
                if path.is_file() and path.suffix in _COPIED_SUFFIXES and path.name not in _NOT_COPIED:
                    _copy(path, self.partial / path.name)
            model_config = read_json(source / "config.json") | {"quantization_config": config.to_json()}
            _write_json(self.partial / REPORT_NAME, report)
            _write_json(self.partial / INDEX_NAME, _index(sorted(self.partial.glob("*.safetensors"))))
            _write_json(self.partial / "config.json", model_config)
            if self.output.exists():
                self.output.rmdir()  # empty, checked at the start
            os.replace(self.partial, self.output)
            self._lock.release()
            shutil.rmtree(self.output / _RUN)


def _shards(files: TensorFiles, keys: Sequence[str]) -> Iterator[list[str]]:
    """Cut the keys, in order, into lists of at most SHARD_BYTES."""
    shard: list[str] = []
    size = 0
    for key in keys:
        count = 1
        for length in files.shapes[key]:
            count *= length
        bytes_ = count * files.element_size(key)
        if shard and size + bytes_ > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(key)
        size += bytes_
    if shard:
        yield shard


def _index(paths: Sequence[Path]) -> dict[str, Any]:
    """The weight map of a sharded checkpoint."""
    weight_map: dict[str, str] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            weight_map |= dict.fromkeys(sorted(file.keys()), path.name)
    total = sum(path.stat().st_size for path in paths)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, target)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system says of a full or forbidden disk into one sentence; what was finished stays
    resumable."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        for temporary in folder.glob("**/*.tmp") if folder.is_dir() else ():
            temporary.unlink(missing_ok=True)
        if full:
            raise QuantExpertsError(
                f"The disk is full: free space for '{folder}' and repeat the call, which goes on where it stopped."
            ) from error
        raise QuantExpertsError(f"Cannot write '{folder}': {error}.") from error
