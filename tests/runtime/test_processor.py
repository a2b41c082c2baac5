"""Processors load where torchvision is missing, nothing is changed where it is not, and bad folders are named."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_runs import python
from tiny_models import VISION_FAMILIES, build_tiny, tiny_image
from transformers import ProcessorMixin, Qwen2VLProcessor

from quant_experts.errors import QuantExpertsError
from quant_experts.runtime import video_slot
from quant_experts.runtime.processor import find_tokenizer, load_processor, takes_images

# The InternVL processor of transformers 5.17 gives NumPy a tensor.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny("qwen2_vl", tmp_path / "model")


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_loads_saves_and_reloads(family: str, tmp_path: Path) -> None:
    first = load_processor(build_tiny(family, tmp_path / "model"))
    assert takes_images(first) and find_tokenizer(first).padding_side == "left"
    first.save_pretrained(tmp_path / "saved")
    # Saving drops the video section; config.json is what tells the reloading which family it is.
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "saved")
    second = load_processor(tmp_path / "saved")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    one, two = (
        each(images=[tiny_image()], text=[each.apply_chat_template(prompt)], return_tensors="pt")
        for each in (first, second)
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert "image_processor" in repr(first)


def test_plain_transformers_loads_it_too(folder: Path) -> None:
    """In a program that never names this package."""
    load = "from transformers import AutoProcessor\nprint(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)"
    done = python(f"import sys\n{load}", folder, PYTHONPATH="")
    assert done.stdout.split() == ["Qwen2VLProcessor"], done.stderr


@pytest.mark.parametrize("installed", [True, False])
def test_the_video_slot_stays_where_torchvision_is(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    before = video_slot._all_attributes
    monkeypatch.setattr(ProcessorMixin, "get_attributes", before)
    monkeypatch.setattr("transformers.utils.import_utils.is_torchvision_available", lambda: installed)
    monkeypatch.delitem(sys.modules, video_slot.__name__)
    importlib.import_module(video_slot.__name__)
    assert (ProcessorMixin.__dict__["get_attributes"] is before) is installed
    assert ("video_processor" in Qwen2VLProcessor.get_attributes()) is installed


def test_text_only_model_gives_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_processor(build_tiny("qwen2", tmp_path))
    assert find_tokenizer(tokenizer) is tokenizer and not takes_images(tokenizer)
    assert tokenizer.padding_side == "left" and tokenizer.decode(tokenizer("häß 1")["input_ids"]) == "häß 1"


@pytest.mark.parametrize("declared", ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast"])
def test_image_processor_types_of_published_checkpoints(folder: Path, declared: str) -> None:
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    config["image_processor"]["image_processor_type"] = declared
    path.write_text(json.dumps(config))
    assert takes_images(load_processor(folder))


def _keep_only(*names: str):
    def edit(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (_keep_only(), "Cannot load a processor"),
        (_keep_only("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"), "Cannot load"),
        (_keep_only("config.json", "processor_config.json", "chat_template.jinja"), "no vocabulary"),
        (lambda folder: (folder / "processor_config.json").write_text("{"), "not a valid JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "Cannot load a processor"),
    ],
)
def test_broken_folder_is_named(folder: Path, edit, message: str) -> None:
    edit(folder)
    with pytest.raises(QuantExpertsError, match=message) as caught:
        load_processor(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["no-such-folder", "./no/such", "a/b/c", Path("owner/name"), __file__])
def test_path_that_is_no_folder(path: str | Path) -> None:
    with pytest.raises(QuantExpertsError, match="is not a folder"):
        load_processor(path)
