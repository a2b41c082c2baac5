"""Reading a model folder: what is damaged, missing or out of place is named, and nothing else is read."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quant_experts.checkpoint.source import TensorFiles, check_inside, read_json, stored_names, weight_files
from quant_experts.errors import QuantExpertsError

INDEX = "model.safetensors.index.json"


def write_shards(folder: Path, shards: dict[str, dict[str, Tensor]], **weight_map: str) -> None:
    """A sharded folder; entries of `weight_map` replace those of the index."""
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    found = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": found | weight_map}))


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    shards = {
        "a.safetensors": {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(4, dtype=torch.bfloat16)},
        "b.safetensors": {"z": torch.arange(5, dtype=torch.int8), "flag": torch.tensor(True)},
    }
    write_shards(tmp_path, shards)
    return shards


def test_shards_are_read_tensor_by_tensor(tmp_path: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    files = TensorFiles(tmp_path)
    expected = {key: tensor for tensors in shards.values() for key, tensor in tensors.items()}
    assert set(files) == set(expected) and "x" in files and "w" not in files
    for key, tensor in expected.items():
        assert files.shapes[key] == tuple(tensor.shape)
        assert files.element_size(key) == tensor.element_size()
        for read in (files.read(key), files.read_finite(key)):
            assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_a_single_file_is_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert list(TensorFiles(tmp_path)) == ["x"]


def test_what_was_read_outlives_its_file(tmp_path: Path, shards: dict[str, dict[str, Tensor]]) -> None:
    tensor = TensorFiles(tmp_path).read("x")
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert torch.equal(tensor, shards["a.safetensors"]["x"])


@pytest.mark.parametrize(
    "name", ["../c.safetensors", "/etc/passwd", "a/../../c.safetensors", "..", r"C:\c", r"\\host\c"]
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"secret": torch.ones(1)}, tmp_path / "c.safetensors")
    write_shards(folder, {"a.safetensors": {"x": torch.ones(1)}}, secret=name)
    with pytest.raises(QuantExpertsError, match="outside the folder") as caught:
        TensorFiles(folder)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["a.safetensors", "deep/a.safetensors", "a..b.safetensors", "..a.safetensors"])
def test_names_inside_the_folder_pass(tmp_path: Path, name: str) -> None:
    assert check_inside(tmp_path, name) is None


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "hub" / "model.safetensors").symlink_to(tmp_path / "blob")
    assert torch.equal(TensorFiles(tmp_path / "hub").read("x"), torch.ones(2))


def test_a_missing_shard_is_named(tmp_path: Path, shards: dict) -> None:
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(QuantExpertsError, match=r"b\.safetensors.*missing"):
        TensorFiles(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {"a.safetensors": {"x": torch.ones(1)}}, y="a.safetensors")
    with pytest.raises(QuantExpertsError, match=r"'y' is missing"):
        TensorFiles(tmp_path).read("y")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantExpertsError, match=r"model\.safetensors"):
        TensorFiles(tmp_path)
    with pytest.raises(QuantExpertsError, match=r"model\.safetensors"):
        TensorFiles(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ['{"weight_map": {}}', '{"weight_map": []}', "{}", "[]", "{", ""])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(QuantExpertsError, match=r"model\.safetensors\.index\.json"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "short header", "huge header", "no header", "cut data"])
def test_a_damaged_file_is_named(tmp_path: Path, shards: dict, damage: str) -> None:
    path = tmp_path / "b.safetensors"
    whole = path.read_bytes()
    broken = {
        "empty": b"",
        "short header": whole[:12],
        "huge header": struct.pack("<Q", 2**63) + whole[8:],
        "no header": b"\xff" * len(whole),
        "cut data": whole[:-3],
    }
    path.write_bytes(broken[damage])
    with pytest.raises(QuantExpertsError, match=r"b\.safetensors.*damaged"):
        TensorFiles(tmp_path)


def test_a_file_that_is_damaged_after_it_was_opened_is_named(tmp_path: Path, shards: dict) -> None:
    files = TensorFiles(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "a.safetensors").unlink()
    for key, name in (("z", r"b\.safetensors"), ("x", r"a\.safetensors")):
        with pytest.raises(QuantExpertsError, match=rf"'{key}'.*{name}"):
            files.read(key)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_that_are_not_finite_are_named(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(3, 4, dtype=dtype)
    tensor[2, 1] = bad
    save_file({"layer.weight": tensor}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert files.read("layer.weight").shape == (3, 4)
    with pytest.raises(QuantExpertsError, match=r"'layer\.weight'.*NaN"):
        files.read_finite("layer.weight")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"x": torch.ones(3).to(dtype)}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert files.element_size("x") == 1
    assert files.read_finite("x").float().tolist() == [1, 1, 1]


@pytest.mark.parametrize("content", [b"[1]", b"3", b"{", b"", b"\xff\xfe{}"])
def test_json_that_is_no_object_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(QuantExpertsError, match=r"config\.json"):
        read_json(path)


def test_json_is_read_or_its_absence_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"é": 1}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"é": 1}
    for missing in (tmp_path / "b.json", tmp_path):
        with pytest.raises(QuantExpertsError, match=missing.name):
            read_json(missing)


def stored(*linears: str) -> list[str]:
    return [f"{linear}.{leaf}" for linear in linears for leaf in ("weight_shape", "weight_packed")]


@pytest.mark.parametrize(
    "files",
    [
        {"model.language_model": "model", "model.visual": "visual"},  # Qwen2-VL
        {"model.language_model": "language_model.model", "model.visual": "visual.tower"},  # LLaVA-OneVision
        {"model.language_model": "model.language_model", "model.visual": "model.visual"},
    ],
)
def test_linears_are_found_by_the_longest_common_ending(files: dict[str, str]) -> None:
    """Also where blocks of two parts of the model are called alike."""
    leaves = ("layers.0.up", "layers.1.up", "layers.11.up")
    expected = {f"{outer}.{leaf}": f"{other}.{leaf}" for outer, other in files.items() for leaf in leaves}
    expected["model.visual.encoder.layers.0.up"] = f"{files['model.visual']}.encoder.layers.0.up"
    assert stored_names(expected, [*stored(*expected.values()), "model.norm.weight"]) == expected


def test_no_choice_is_made_between_linears() -> None:
    """Other blocks are other linears; a name that fits two as well is nobody's; what others leave is free."""
    assert stored_names(["a.layers.1.up"], stored("b.layers.2.up")) == {}
    one, other = "model.visual.layers.0.up", "model.language_model.layers.0.up"
    assert stored_names([one, other], stored("model.layers.0.up", "vis.layers.0.up")) == {}
    assert stored_names([one], stored("a.layers.0.up", "b.layers.0.up")) == {}
    left = ["layers.0.up", "vision.layers.0.up"]
    files = ["text.layers.0.up", "the.vision.layers.0.up"]
    assert stored_names(left, stored(*files)) == dict(zip(left, files, strict=True))


def test_linears_that_files_do_not_hold_are_left_out() -> None:
    names = ["model.language_model.layers.0.up", "model.visual.layers.0.up"]
    assert stored_names(names, stored("visual.layers.0.up")) == {names[1]: "visual.layers.0.up"}
    assert stored_names(names, ["visual.layers.0.up.weight"]) == {} == stored_names([], stored("up"))
