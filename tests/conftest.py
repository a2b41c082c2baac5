"""Session-wide settings, and tiny models and checkpoints that tests share (read only: copy one before changing it)."""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny matrices gain nothing from threads, and lose much when cores are shared
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels first: they take longest, and last of all would keep one process busy when the others have ended."""
    items.sort(key=lambda item: "kernels" not in item.path.parts)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(family, **options of build_tiny) -> folder of a random model, built once a session."""
    from tiny_models import build_tiny

    built: dict[str, Path] = {}

    def build(family: str, **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in built:
            built[key] = build_tiny(family, tmp_path_factory.mktemp(family), **options)
        return built[key]

    return build


@pytest.fixture(scope="session")
def quantized(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """quantized(family, scheme, **changes to SMALL or options of build_tiny, or scopes) -> its folder, made once a
    session."""
    from small_runs import SMALL, mixed_samples, small_samples

    from quant_experts import QuantizationConfig, quantize

    made: dict[str, Path] = {}

    def make(family: str = "qwen2_vl", scheme: str = "W4A6", **changes: Any) -> Path:
        key = f"{family} {scheme} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized") / family
            scopes = {name: value for name, value in changes.items() if name == "scopes"}
            recipe = {name: value for name, value in changes.items() if name in type(SMALL).model_fields}
            model = tiny(family, **{name: changes[name] for name in changes.keys() - recipe.keys() - scopes.keys()})
            config = QuantizationConfig.of(scheme, SMALL.model_copy(update=recipe), **scopes)
            samples = mixed_samples(family) if scopes else small_samples(family)
            quantize(model, samples, folder, config, device="cpu")
            made[key] = folder
        return made[key]

    return make


@pytest.fixture
def copied(quantized: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that the test may damage."""
    return Path(shutil.copytree(quantized(), tmp_path / "checkpoint"))


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 600 kB, where this process may mount one.

    Not below `tmp_path`: a run that is killed leaves the mount behind, and pytest, which deletes its old folders,
    would fail on it in every later run."""
    folder = Path(tempfile.mkdtemp(prefix="quant-experts-small-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    try:
        if shutil.which("mount") is None or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this process may not mount a file system")
        yield folder
        # Lazily: what a test that fails keeps alive may still map a file.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        folder.rmdir()
