"""A run's output is whole at every moment: whatever stops it, the same call goes on, and no other call spoils it."""

import errno
import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quant_experts.checkpoint import run_folder
from quant_experts.checkpoint.run_folder import REPORT_NAME, RunFolder
from quant_experts.checkpoint.schema import CheckpointConfig, GroupSpec
from quant_experts.checkpoint.source import INDEX_NAME, TensorFiles
from quant_experts.config import RECIPES, Scheme
from quant_experts.errors import QuantExpertsError

SETTINGS = {"config": {"seed": 1, "recipe": "paper"}, "threads": 2, "none": None}
CONFIG = CheckpointConfig(scheme=Scheme.parse("W4A6"), recipe=RECIPES["rtn"], groups=(GroupSpec(linears=("q",)),))
BLOCK = {"b.q": torch.arange(6, dtype=torch.int32).view(2, 3), "b.norm": torch.ones(3, dtype=torch.bfloat16)}
RECORD = {"groups": [{"linears": ["q"]}], "é": [1.5, None]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model folder: tensors, and small files of which some belong to a copy."""
    folder = tmp_path / "source"
    folder.mkdir()
    save_file({f"t{i}": torch.full((i + 1, 5), float(i)) for i in range(6)}, folder / "model.safetensors")
    for name in ("tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja", "code.py", "pytorch_model.bin"):
        (folder / name).write_text(name)
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "hidden_size": 8}))
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {f"t{i}": "model.safetensors" for i in range(6)}}))
    (folder / "nested.json").mkdir()
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def whole_run(source: Path, output: Path, settings: dict = SETTINGS) -> None:
    files = TensorFiles(source)
    with RunFolder(output, settings) as run:
        run.copy_rest(files, list(files))
        for index in range(2):
            if not run.has_block(index):
                run.write_block(index, {f"{index}.{key}": value for key, value in BLOCK.items()}, RECORD)
        run.finish(source, CONFIG, {"groups": []})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_whole_run_leaves_a_whole_checkpoint_and_nothing_else(source: Path, output: Path) -> None:
    whole_run(source, output)
    assert {p.name for p in output.iterdir()} == {
        "config.json", INDEX_NAME, REPORT_NAME, "tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja",
        "rest-00000.safetensors", "block-00000.safetensors", "block-00001.safetensors",
    }  # fmt: skip
    assert {p.name for p in output.parent.iterdir()} == {"source", "out"}
    config = json.loads((output / "config.json").read_text())
    assert config.pop("quantization_config") == CONFIG.to_json()
    assert config == {"model_type": "tiny", "hidden_size": 8}
    assert (output / "merges.txt").read_text() == "merges.txt"
    index = json.loads((output / INDEX_NAME).read_text())["weight_map"]
    found = {key: path.name for path in output.glob("*.safetensors") for key in load_file(path)}
    assert index == found and len(found) == 6 + 2 * len(BLOCK)
    assert list(TensorFiles(output))  # readable as a model folder


def test_blocks_are_read_back_bit_for_bit(output: Path) -> None:
    with RunFolder(output, SETTINGS) as run:
        assert not run.has_block(3)
        run.write_block(3, BLOCK, RECORD)
        assert run.has_block(3) and not run.has_block(2)
        tensors, record = run.read_block(3)
    assert record == RECORD and tensors.keys() == BLOCK.keys()
    assert all(tensors[key].dtype == value.dtype and torch.equal(tensors[key], value) for key, value in BLOCK.items())
    assert not output.exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, MemoryError])
def test_a_block_that_was_cut_off_does_not_count(output: Path, stop: type, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_written(tensors: dict, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise stop

    monkeypatch.setattr(run_folder, "save_file", half_written)
    with pytest.raises(stop), RunFolder(output, SETTINGS) as run:
        run.write_block(0, BLOCK, RECORD)
    assert not output.exists() and not list(run.partial.glob("*.safetensors"))
    monkeypatch.undo()
    with RunFolder(output, SETTINGS) as again:
        assert not again.has_block(0)
        again.write_block(0, BLOCK, RECORD)
        assert again.has_block(0)


def test_an_interrupted_run_goes_on_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    whole_run(source, tmp_path / "straight")
    output = tmp_path / "resumed"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), RunFolder(output, SETTINGS) as run:
            files = TensorFiles(source)
            run.copy_rest(files, list(files))
            if not run.has_block(0):
                run.write_block(0, {f"0.{key}": value for key, value in BLOCK.items()}, RECORD)
            kept = inodes(run.partial)
            raise KeyboardInterrupt
        assert not output.exists()
    whole_run(source, output)
    assert contents(output) == contents(tmp_path / "straight")
    assert kept.items() <= inodes(output).items() and len(kept) == 2


@pytest.mark.parametrize("at", [REPORT_NAME, INDEX_NAME, "config.json"])
def test_a_cut_off_end_can_be_repeated(source: Path, output: Path, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write = run_folder._write_json

    def stopping(path: Path, value: dict) -> None:
        if path.name == at:
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(run_folder, "_write_json", stopping)
    with pytest.raises(KeyboardInterrupt):
        whole_run(source, output)
    assert not output.exists()
    monkeypatch.undo()
    with RunFolder(output, SETTINGS) as run:
        assert run.has_block(0) and run.has_block(1)
    whole_run(source, output)
    assert json.loads((output / "config.json").read_text())["model_type"] == "tiny"


def test_an_end_that_cannot_take_its_name_keeps_its_blocks(source: Path, output: Path) -> None:
    """Something else puts a file into the empty output folder while the run goes on."""
    files = TensorFiles(source)
    with pytest.raises(QuantExpertsError), RunFolder(output, SETTINGS) as run:
        run.copy_rest(files, list(files))
        run.write_block(0, BLOCK, RECORD)
        output.mkdir()
        (output / "other").write_text("not ours")
        run.finish(source, CONFIG, {})
    assert (output / "other").read_text() == "not ours"
    shutil.rmtree(output)
    with RunFolder(output, SETTINGS) as again:
        assert again.has_block(0)


def test_an_end_without_its_final_name_is_not_taken_over_by_other_settings(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped just before the last rename: another model's tensors must not end up in this checkpoint."""
    replace = os.replace

    def stopping(old: Path, new: Path) -> None:
        if Path(new) == output:
            raise KeyboardInterrupt
        replace(old, new)

    monkeypatch.setattr(run_folder.os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        whole_run(source, output)
    monkeypatch.undo()
    with pytest.raises(QuantExpertsError, match="model"):
        whole_run(source, output, SETTINGS | {"model": "another"})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (SETTINGS | {"threads": 3}, "threads"),
        (SETTINGS | {"config": {"seed": 2, "recipe": "paper"}}, "config"),
        (SETTINGS | {"more": 1}, "more"),
        ({k: v for k, v in SETTINGS.items() if k != "threads"}, "threads"),
    ],
)
def test_other_settings_are_refused_and_change_nothing(output: Path, settings: dict, named: str) -> None:
    with RunFolder(output, SETTINGS) as run:
        run.write_block(0, BLOCK, RECORD)
    before = contents(run.partial)
    with pytest.raises(QuantExpertsError, match=rf"other settings \({named}\)"), RunFolder(output, settings):
        pass
    assert contents(run.partial) == before
    with RunFolder(output, SETTINGS) as again:  # the refused run holds no lock
        assert again.has_block(0)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_damaged_settings_are_named(output: Path, content: str) -> None:
    with RunFolder(output, SETTINGS) as run:
        pass
    (run.partial / ".run" / "settings.json").write_text(content)
    with pytest.raises(QuantExpertsError, match=r"settings\.json"), RunFolder(output, SETTINGS):
        pass


def test_a_damaged_block_is_named_when_a_run_goes_on(output: Path) -> None:
    with RunFolder(output, SETTINGS) as run:
        run.write_block(0, BLOCK, RECORD)
        run.block_file(0).write_bytes(run.block_file(0).read_bytes()[:-4])
        with pytest.raises(QuantExpertsError, match="block-00000"):
            run.read_block(0)


@pytest.mark.parametrize("kind", ["folder", "file", "hidden"])
def test_an_output_that_holds_something_is_refused(output: Path, kind: str) -> None:
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / (".git" if kind == "hidden" else "notes.txt")).write_text("mine")
    with pytest.raises(QuantExpertsError, match="not empty"), RunFolder(output, SETTINGS):
        pass
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_an_empty_output_is_replaced(source: Path, output: Path) -> None:
    output.mkdir()
    whole_run(source, output)
    assert (output / "config.json").is_file()


def test_a_run_in_another_process_is_not_disturbed(output: Path) -> None:
    code = (
        "import sys, pathlib; from filelock import FileLock;"
        "path = pathlib.Path(sys.argv[1]); path.mkdir(parents=True);"
        "lock = FileLock(path / 'lock'); lock.acquire(timeout=0); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(output.with_name("out.partial") / ".run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(QuantExpertsError, match="Another run"), RunFolder(output, SETTINGS):
            pass
        assert {p.name for p in output.with_name("out.partial").rglob("*")} == {".run", "lock"}
        other.communicate("")
    with RunFolder(output, SETTINGS) as run:  # the other has ended
        assert not run.has_block(0)


@pytest.mark.parametrize("limit", [1, 100, 150, 10_000])
def test_the_rest_is_cut_by_size(source: Path, output: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "SHARD_BYTES", limit)
    files = TensorFiles(source)
    keys = [f"t{i}" for i in (3, 0, 5, 1, 2)]  # t4 belongs to a block
    with RunFolder(output, SETTINGS) as run:
        run.copy_rest(files, keys)
        shards = [load_file(path) for path in sorted(run.partial.glob("rest-*.safetensors"))]
    names = [sorted(shard, key=keys.index) for shard in shards]
    assert [name for shard in names for name in shard] == keys
    size = {key: files.read(key).nbytes for key in keys}
    assert all(len(shard) == 1 or sum(size[key] for key in shard) <= limit for shard in names)
    for shard, following in pairwise(names):  # none is cut too early
        assert sum(size[key] for key in shard) + size[following[0]] > limit
    assert all(torch.equal(tensor, files.read(key)) for shard in shards for key, tensor in shard.items())


def test_no_rest_makes_no_file(source: Path, output: Path) -> None:
    with RunFolder(output, SETTINGS) as run:
        run.copy_rest(TensorFiles(source), [])
        assert not list(run.partial.glob("*.safetensors"))


def test_a_rest_that_is_not_finite_is_named_and_not_written(tmp_path: Path, output: Path) -> None:
    save_file({"fine": torch.ones(1), "bad.weight": torch.tensor([1.0, torch.nan])}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    with RunFolder(output, SETTINGS) as run, pytest.raises(QuantExpertsError, match=r"'bad\.weight'.*NaN"):
        run.copy_rest(files, list(files))
    assert not list(run.partial.glob("*.safetensors*"))


@pytest.mark.parametrize("call", ["save_file", "_write_json"])
def test_a_full_disk_is_said_and_resumable(output: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(output, SETTINGS) as run:
        run.write_block(0, BLOCK, RECORD)
        (run.partial / "left.tmp").write_text("of a write that was cut off")
        monkeypatch.setattr(run_folder, call, full_disk)
        with pytest.raises(QuantExpertsError, match=r"disk is full.*repeat"):
            run.write_block(1, BLOCK, RECORD)
        assert run.has_block(0) and not run.has_block(1) and not list(run.partial.rglob("*.tmp"))
        monkeypatch.undo()
        run.write_block(1, BLOCK, RECORD)
        assert run.has_block(1)


def test_a_really_full_disk(small_disk: Path, source: Path) -> None:
    large = {"large": torch.ones(500_000)}
    with RunFolder(small_disk / "out", SETTINGS) as run:
        run.write_block(0, BLOCK, RECORD)
        with pytest.raises(QuantExpertsError, match="disk is full"):
            run.write_block(1, large, RECORD)
        assert run.has_block(0) and not run.has_block(1) and not list(run.partial.rglob("*.tmp"))
    save_file(large, source / "model.safetensors")
    with RunFolder(small_disk / "out", SETTINGS) as run, pytest.raises(QuantExpertsError, match="disk is full"):
        run.copy_rest(TensorFiles(source), ["large"])
    (source / "tokenizer.json").write_text("x" * 2_000_000)
    with RunFolder(small_disk / "out", SETTINGS) as run, pytest.raises(QuantExpertsError, match="disk is full"):
        run.finish(source, CONFIG, {})
    assert not (small_disk / "out").exists()
    (source / "tokenizer.json").write_text("x")
    with RunFolder(small_disk / "out", SETTINGS) as run:
        assert run.has_block(0) and not list(run.partial.rglob("*.tmp"))
        run.finish(source, CONFIG, {})
    assert torch.equal(TensorFiles(small_disk / "out").read("b.q"), BLOCK["b.q"])


def test_an_output_where_nothing_may_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QuantExpertsError, match="Cannot write"), RunFolder(tmp_path / "file" / "out", SETTINGS):
        pass


def test_what_is_remembered_is_computed_once_and_gone_with_the_run(source: Path, output: Path) -> None:
    values = {"block.0": {"mlp": 0.1 + 0.2}}
    with RunFolder(output, SETTINGS) as run:
        assert run.remember("weights", lambda: values) == values
    with RunFolder(output, SETTINGS) as run:
        assert run.remember("weights", lambda: {"computed": "again"}) == values
        with pytest.raises(OSError, match="of its own"):
            run.remember("others", lambda: (_ for _ in ()).throw(OSError("of its own")))
    whole_run(source, output)
    assert not list(output.rglob("weights.json"))
