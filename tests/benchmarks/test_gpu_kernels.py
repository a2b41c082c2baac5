"""The benchmarks of GPU kernels without a GPU: one runs tiny in the interpreter, the other is given a profile."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kernels"


def test_weight_only_groups(tmp_path: Path) -> None:
    """In a process of its own: whether kernels are interpreted is chosen when they are imported."""
    program = [
        sys.executable,
        str(FOLDER / "gpu_weight_only.py"),
        "--device",
        "cpu",
        "--tiny",
        "--tokens",
        "1",
        "3",
        "--set",
        "MANY_TOKENS=3",
    ]
    run = subprocess.run(
        [*program, "--out", str(tmp_path)], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "gpu_weight_only.json").read_text())
    assert [row["tokens"] for row in result["rows"]] == [1, 3] and not result["about"]["problems"]
    for row in result["rows"]:
        timed = [value for value in row.values() if isinstance(value, dict)]
        assert len(timed) == 5 and all(0 < time["p10"] <= time["median"] <= time["p90"] for time in timed)
    assert (tmp_path / "gpu_weight_only.md").read_text().count("\n|") == 2 + 2


WITHOUT_A_GPU = """
import launch_times, gpu_copies, gpu_rates, torch
launch_times.ROUNDS, launch_times.CALLS, launch_times.SIZES = 2, 2, ((20, 256, 512),)
launch_times.main()
kernels = launch_times.compiled.compile_launches(90)
weights, tokens = [torch.zeros(2 * 512 * 64, dtype=torch.int8)], torch.zeros(20, 256, dtype=torch.int8)
for width in (64, 128):
    gpu_copies.copies(weights, tokens, 512, (128, 64), WIDTH=width, WEIGHTS=True, TOKENS=True)()
print(len(kernels), "kernels that copy")
for fp8, way in ((False, "unpacked"), (True, "unpacked"), (True, "shared")):
    sums = torch.zeros(1, dtype=torch.float32 if fp8 else torch.int32)
    tile = dict(FP8=fp8, ROWS=256, TOKENS=128, WAY=way)
    gpu_rates.kernel[(132,)](tokens, tokens, sums, 2, num_warps=8, **tile)
print(len(kernels) - 2, "that multiply")
"""


def test_launches_are_timed_and_copies_and_products_compile_without_a_gpu() -> None:
    """In a process of its own, whose driver is another one."""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_GPU],
        env=os.environ | {"PYTHONPATH": str(FOLDER), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 2 + 3 + 2 and lines[-2:] == ["2 kernels that copy", "3 that multiply"]
    cells = [line.split("|") for line in lines[2:5]]
    assert [int(row[3]) for row in cells] == [2, 3, 2]  # quantize and multiply; project values before
    assert all(int(cell) > 0 for row in cells for cell in row[4:7])


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("name", ["gpu_linear", "gpu_copies", "gpu_block", "gpu_rates"])
def test_no_gpu_is_said_in_a_sentence(name: str) -> None:
    run = subprocess.run([sys.executable, str(FOLDER / f"{name}.py")], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("There is no NVIDIA GPU") and len(run.stderr.splitlines()) == 1


def test_a_timeline_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replays of one block: of its four groups the first launches two kernels, the others one each."""
    monkeypatch.syspath_prepend(str(FOLDER))
    gpu_parts = import_module("gpu_parts")
    found = []
    for replay in range(2):
        for i, name in enumerate(("prepare", "linear", "linear", "linear", "linear")):
            found.append((name, 1000 * (100 * replay + 10 * i), 1000 * (7 + replay)))
    rows = gpu_parts.summary(found, [2, 1, 1, 1])
    assert [(row["group"], row["kernel"], row["start"], row["next_group"]) for row in rows] == [
        ("qkv", "prepare", 0, 20),
        ("qkv", "linear", 10, 20),
        ("o", "linear", 0, 10),
        ("gate+up", "linear", 0, 10),
        ("down", "linear", 0, 0),
    ]
    assert all(row["length"] == 7.5 for row in rows)
    assert gpu_parts.table([{"tokens": 1, "kind": "default"} | row for row in rows]).count("\n|") == 1 + len(rows)


def test_each_group_of_a_block_is_timed_on_cold_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies exceed the cache; each row holds its own kind's times, and tables go by tokens."""
    monkeypatch.syspath_prepend(str(FOLDER))
    gpu_groups = import_module("gpu_groups")
    for shapes in gpu_groups.SHAPES.values():
        for n, k in shapes:
            count = gpu_groups.copies(n, k)
            assert count >= 6 and count * n * k / 2 >= gpu_groups.COLD_BYTES
    made = {"without_experts": 100.0, "default": 1000.0}
    monkeypatch.setattr(gpu_groups, "layer", lambda n, k, bits, kind, seed: (kind, n))
    monkeypatch.setattr(gpu_groups.torch, "randn", lambda m, k, device: FakeTokens([m]))
    monkeypatch.setattr(gpu_groups, "each", lambda x, packed: made[packed[0][0]] * x[0] * len(packed))
    monkeypatch.setattr(gpu_groups, "median_time", lambda work: work)
    rows = gpu_groups.measure("Qwen2-VL-7B", [1, 2], list(made), 8)
    assert {(row["kind"], row["tokens"]): row["o"] for row in rows} == {
        (kind, m): made[kind] * m for kind in made for m in (1, 2)
    }
    lines = gpu_groups.table(rows).splitlines()
    assert lines[2] == "| 1 | no experts | 100.0 | 100.0 | 100.0 | 100.0 | 400.0 |" and len(lines) == 6


class FakeTokens(list[int]):
    def bfloat16(self) -> list[int]:
        return self


def test_what_is_timed_and_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks for every kind, more than the cache holds; factors of as many experts as tokens may use."""
    monkeypatch.syspath_prepend(str(FOLDER))
    gpu_linear = import_module("gpu_linear")
    for shapes in gpu_linear.SHAPES.values():
        for m in gpu_linear.TOKENS:
            count = gpu_linear.blocks(shapes, m)
            assert count * sum(n * k for n, k in shapes) / 2 >= gpu_linear.COLD_BYTES
            assert count >= (4 if m <= 128 else 1)
    assert gpu_linear.timed("bf16", 1) and gpu_linear.timed("default", 1) and gpu_linear.timed("reading", 128)
    assert not (gpu_linear.timed("reading", 512) or gpu_linear.timed("cublas_int8", 16))
    assert not gpu_linear.timed("fp8_default", 128) and gpu_linear.timed("fp8_default", 512)
    limits = {"copy_tb_per_s": 1.0, "matrix_top_per_s": 1e9}
    (n, k), one = (256, 128), gpu_linear.bound(((256, 128),), 1, limits)
    assert one == pytest.approx((n * k / 2 + 2 * 32 * 2 * (n + k) + 2 * 8 * k + 2 * (n + k)) * 1e-6)
    assert gpu_linear.bound(((n, k),), 64, limits) > gpu_linear.bound(((n, k),), 8, limits) > one
