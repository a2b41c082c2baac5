"""Whatever a user gets wrong ends with one sentence on stderr, exit code 2 and nothing under the output's name."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import SMALL, python, small_samples, write_samples
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from quant_experts import QuantExpertsError, QuantizationConfig, Recipe, cli, load, quantize

INDEX = "model.safetensors.index.json"
BLOCK = "model.layers.0"
"""What the files of the tiny Qwen2-VL call their first block."""


class Place(NamedTuple):
    """What a test may damage, and where its run writes."""

    model: Path
    samples: Path
    output: Path
    checkpoint: Path


@pytest.fixture
def place(tiny: Callable[..., Path], copied: Path, tmp_path: Path) -> Place:
    model = Path(shutil.copytree(tiny("qwen2_vl"), tmp_path / "model"))
    (tmp_path / "samples").mkdir()
    samples = write_samples(tmp_path / "samples", small_samples("qwen2_vl", 2))
    return Place(model, samples, tmp_path / "out", copied)


class Ended(NamedTuple):
    code: int
    out: str
    err: list[str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """command(*arguments) -> exit code, stdout and the lines of stderr of the `quant-experts` command."""

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr("sys.argv", ["quant-experts", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Ended(code, out, [line for line in err.splitlines() if line.strip()])

    return call


def check_refusal(ended: Ended, sentence: str) -> None:
    """One line, one sentence, with cause and cure; the memory estimate may stand before it."""
    lines = [line for line in ended.err if not line.startswith("Estimated peak memory")]
    assert ended.code == 2, ended
    assert len(lines) == 1 and lines[0].startswith("Error: "), ended.err
    assert re.search(sentence, lines[0]), f"{lines[0]!r} does not say {sentence!r}"
    assert lines[0].endswith(".") and "Traceback" not in lines[0] and len(lines[0]) < 600


# --- damage ---


def edit_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def weights(key: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Place], None]:
    """Replace a tensor of the original model, or with None take it out."""
    return lambda place: edit_tensors(place.model / "model.safetensors", lambda t: replace(t, key, change))


def stored(
    key: str, change: Callable[[Tensor], Tensor | None], file: str = "block-00000.safetensors"
) -> Callable[[Place], None]:
    """The same of a quantized checkpoint."""
    return lambda place: edit_tensors(place.checkpoint / file, lambda t: replace(t, key, change))


def replace(tensors: dict[str, Tensor], key: str, change: Callable[[Tensor], Tensor | None]) -> None:
    value = change(tensors.pop(key).clone())
    if value is not None:
        tensors[key] = value.contiguous()


def first_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def cut(path: Callable[[Place], Path], share: float = 0.5) -> Callable[[Place], None]:
    return lambda place: os.truncate(path(place), int(path(place).stat().st_size * share))


def model_config(**entries: Any) -> Callable[[Place], None]:
    return lambda place: edit_json(place.model / "config.json", **entries)


def quantization_config(**entries: Any) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        config = json.loads((place.checkpoint / "config.json").read_text())
        edit_json(place.checkpoint / "config.json", quantization_config=config["quantization_config"] | entries)

    return change


def reindex(folder: Callable[[Place], Path], target: str) -> Callable[[Place], None]:
    """An index that sends one tensor to another file, which exists."""

    def change(place: Place) -> None:
        where = folder(place)
        shard = next(iter(sorted(where.glob("*.safetensors"))))
        keys = {key: path.name for path in sorted(where.glob("*.safetensors")) for key in load_file(path)}
        shutil.copy(shard, where.parent / "outside.safetensors")
        (where / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": keys | {next(iter(keys)): target}}))

    return change


def shard(place: Place) -> Path:
    return place.checkpoint / "block-00001.safetensors"


def the_model(place: Place) -> Path:
    return place.model


def the_checkpoint(place: Place) -> Path:
    return place.checkpoint


def write(name: str, content: bytes) -> Callable[[Place], None]:
    return lambda place: (place.samples.parent / name).write_bytes(content) and None


def no_weights(place: Place) -> None:
    (place.model / "model.safetensors").unlink()


def no_config(place: Place) -> None:
    (place.model / "config.json").unlink()


def huge_norm(place: Place) -> None:
    weights(f"{BLOCK}.input_layernorm.weight", lambda t: torch.full_like(t, 3e38))(place)


def broken_config(place: Place) -> None:
    (place.model / "config.json").write_text('{"model_type": ')


def output_file(place: Place) -> None:
    place.output.write_text("mine")


def output_folder(place: Place) -> None:
    place.output.mkdir()
    (place.output / ".run").mkdir()  # the name that our runs use too
    (place.output / ".run" / "notes.txt").write_text("mine")


def output_under_a_file(place: Place) -> None:
    (place.output.parent / "file").write_text("mine")


def no_tokenizer(place: Place) -> None:
    (place.model / "tokenizer.json").unlink()


def wide_and_flat(place: Place) -> None:
    Image.new("RGB", (4000, 2)).save(place.samples.parent / "0.png")


NOTHING = lambda _: None  # noqa: E731
Q = f"{BLOCK}.self_attn.q_proj"
QUANTIZE: dict[str, tuple[Callable[[Place], None], list[str], str]] = {
    "no such folder": (NOTHING, ["{place.output}-nowhere", "{place.samples}"], "is not a folder: give"),
    "no such hub name": (NOTHING, ["nobody/nothing", "{place.samples}"], "neither a folder nor downloadable"),
    "a file as the model": (NOTHING, ["{place.samples}", "{place.samples}"], "is not a folder: give"),
    "unknown model type": (model_config(model_type="nonsense"), [], "cannot read .*'nonsense'"),
    "no model type": (model_config(model_type=None), [], "cannot read .*None"),
    "a model of another kind": (model_config(model_type="vit"), [], "'vit' neither answers"),
    "config that is no JSON": (broken_config, [], r"config\.json' is not readable JSON"),
    "no config": (no_config, [], r"config\.json' does not exist: give"),
    "unknown scheme bits": (NOTHING, ["--scheme", "W4A99"], "activation_bits is 99; it must be 4 to 8"),
    "too few weight bits": (NOTHING, ["--scheme", "W1A6"], "weight_bits"),
    "too many weight bits for fp8": (NOTHING, ["--scheme", "W8Afp8"], "weight_bits is 8; with fp8 activations .* 4"),
    "unknown scheme": (NOTHING, ["--scheme", "int4"], "Unknown scheme 'int4': write"),
    "unknown recipe": (NOTHING, ["--recipe", "magic"], "Unknown recipe 'magic': choose one of rtn"),
    "no samples asked for": (NOTHING, ["--limit", "0"], "samples"),
    "a seed of too many bits": (NOTHING, ["--seed", "4294967296"], "seed: Input should be less than 4294967296"),
    "the model as the output": (
        NOTHING,
        ["{place.model}", "{place.samples}", "{place.model}"],
        "choose another folder.$",
    ),
    "unknown scope": (NOTHING, ["--scopes", "language, vison"], "scopes"),
    "unknown device": (NOTHING, ["--device", "abacus"], "Device 'abacus' is not available here: choose"),
    "no weights": (no_weights, [], r"no model\.safetensors .*: give a folder"),
    "no tokenizer": (no_tokenizer, [], "tokenizer"),
    "truncated weights": (
        cut(lambda p: p.model / "model.safetensors"),
        [],
        r"model\.safetensors' is damaged .*: download",
    ),
    "empty weights": (
        cut(lambda p: p.model / "model.safetensors", 0),
        [],
        r"model\.safetensors' is damaged .*: download",
    ),
    "missing shard": (reindex(the_model, "gone.safetensors"), [], r"'gone\.safetensors' is missing .*: download"),
    "index leaves the folder": (reindex(the_model, "../outside.safetensors"), [], "outside the folder: refusing"),
    "missing tensor": (weights(f"{Q}.weight", lambda t: None), [], "q_proj.weight' is not in the files as the model"),
    "missing tensor outside blocks": (weights("visual.merger.mlp.0.weight", lambda t: None), [], "merger.mlp.0.weight"),
    "wrong shape": (weights(f"{Q}.weight", lambda t: t[:-1]), [], r"shape \[63, 64\], the model needs \[64, 64\]"),
    "wrong shape outside blocks": (weights("visual.merger.mlp.0.weight", lambda t: t[:-1]), [], "merger.mlp.0.weight"),
    "NaN in a weight": (weights(f"{Q}.weight", first_value(torch.nan)), [], f"{Q}.weight'.* holds NaN or infinity"),
    "NaN in a bias": (weights(f"{Q}.bias", first_value(torch.nan)), [], f"{Q}.bias'.* holds NaN or infinity"),
    "infinity outside blocks": (
        weights("visual.merger.mlp.0.bias", first_value(torch.inf)),
        [],
        "holds NaN or infinity",
    ),
    "activations overflow": (huge_norm, [], "Activations of calibration sample 1 are NaN or infinite in block 0 at"),
    "truncated image": (cut(lambda p: p.samples.parent / "0.png"), [], r"line 1: image .*0\.png' is damaged"),
    "missing image": (lambda p: (p.samples.parent / "1.png").unlink(), [], r"line 2: image .*1\.png' does not exist"),
    "not an image": (write("0.png", b"hello"), [], r"0\.png' is not an image"),
    "image of an impossible form": (
        wide_and_flat,
        [],
        r"samples\.jsonl line 1 is refused by the model's processor .*aspect ratio",
    ),
    "no samples": (write("samples.jsonl", b""), [], r"samples\.jsonl' has no samples: give"),
    "no samples in JSON": (
        write("empty.json", b"[]"),
        ["{place.model}", "{place.samples.parent}/empty.json"],
        "no samples",
    ),
    "samples that are no JSON": (write("samples.jsonl", b"{]"), [], r"line 1 is not JSON"),
    "samples of no known form": (write("samples.jsonl", b'{"a": 1}'), [], "none of the accepted forms"),
    "samples not found": (NOTHING, ["{place.model}", "{place.output}.json"], "does not exist"),
    "no sample fits": (NOTHING, ["--max-tokens", "5"], "None of 2 samples fits into 5 tokens: allow more"),
    "output not empty": (output_folder, [], "out' is not empty: choose another"),
    "output is a file": (output_file, [], "out' is not empty: choose another"),
    "output under a file": (
        output_under_a_file,
        ["{place.model}", "{place.samples}", "{place.output.parent}/file/out"],
        "Cannot",
    ),
    "quantized already": (NOTHING, ["{place.checkpoint}", "{place.samples}"], "quantized already: give the original"),
}


@pytest.mark.parametrize("case", QUANTIZE)
def test_quantize_refuses(case: str, place: Place, command: Callable[..., Ended]) -> None:
    damage, given, sentence = QUANTIZE[case]
    damage(place)
    before = [path.name for path in place.output.parent.iterdir()]
    texts = [text.format(place=place) for text in given]
    options = texts if texts and texts[0].startswith("--") else []
    positional = [] if options else texts
    defaults = [place.model, place.samples, place.output]
    default_recipe = [] if "--recipe" in options else ["--recipe", "rtn"]
    ended = command("quantize", *positional, *defaults[len(positional) :], *options, *default_recipe)
    check_refusal(ended, sentence)
    assert not ended.out
    after = {path.name for path in place.output.parent.iterdir()} - set(before)
    assert after <= {"out.partial"}, "something was left under the output's name"
    assert not after or list((place.output.parent / "out.partial").glob("*.safetensors")), "a run that wrote nothing"
    assert damage is not output_folder or (place.output / ".run" / "notes.txt").read_text() == "mine"


LOAD: dict[str, tuple[Callable[[Place], None], str]] = {
    "unknown key": (quantization_config(colour="red"), "colour"),
    "unknown key in the scheme": (
        quantization_config(scheme=dict(weight_bits=4, activation_bits=6, x=1)),
        r"scheme\.x",
    ),
    "newer format": (quantization_config(format_version=3), "format version 3.* upgrade quant-experts"),
    "fp8 activations in format 1": (
        quantization_config(scheme=dict(weight_bits=4, activation_bits=8, activation_format="fp8"), format_version=1),
        "format_version is 1; W4Afp8 needs 2",
    ),
    "no format": (quantization_config(format_version="one"), "format_version"),
    "a linear that is none": (
        quantization_config(groups=[{"linears": ["model.norm"]}]),
        "'model.norm', which is not a linear",
    ),
    "truncated shard": (cut(shard), r"block-00001\.safetensors' is damaged"),
    "garbled shard": (lambda p: shard(p).write_bytes(b"\xff" * 4096) and None, r"block-00001\.safetensors' is damaged"),
    "missing shard": (lambda p: shard(p).unlink(), r"block-00001\.safetensors' is missing"),
    "index leaves the folder": (reindex(the_checkpoint, "../outside.safetensors"), "outside the folder: refusing"),
    "missing tensor": (stored(f"{Q}.weight_scale", lambda t: None), "q_proj.weight_scale' is missing"),
    "missing expert": (stored(f"{Q}.input_group.routed_down", lambda t: None), "routed_down' is missing"),
    "missing bias": (stored(f"{Q}.bias", lambda t: None), "q_proj.bias' is missing"),
    "missing norm": (stored(f"{BLOCK}.input_layernorm.weight", lambda t: None), "input_layernorm.weight"),
    "missing embedding": (
        stored("model.embed_tokens.weight", lambda t: None, "rest-00000.safetensors"),
        "embed_tokens.weight",
    ),
    "wrong shape": (
        stored(f"{Q}.weight_packed", lambda t: t[:, :-1]),
        r"weight_packed' has shape \[64, 7\].* needs \[64, 8\]",
    ),
    "wrong shape of a norm": (stored(f"{BLOCK}.input_layernorm.weight", lambda t: t[:-1]), "input_layernorm.weight"),
    "wrong dtype": (
        stored(f"{Q}.weight_scale", lambda t: t.half()),
        "weight_scale' has dtype F16, the format needs F32",
    ),
    "wrong weight_shape": (stored(f"{Q}.weight_shape", lambda t: t + 1), r"weight_shape' says \[65, 65\]"),
    "NaN in a scale": (stored(f"{Q}.weight_scale", first_value(torch.nan)), "weight_scale' holds NaN or infinity"),
    "NaN in an expert": (stored(f"{Q}.shared_up", first_value(torch.nan)), "shared_up' holds NaN or infinity"),
    "NaN in a router": (stored(f"{Q}.input_group.router_weight", first_value(torch.nan)), "router_weight' holds NaN"),
}


@pytest.mark.parametrize("case", LOAD)
def test_loading_refuses(case: str, place: Place, command: Callable[..., Ended]) -> None:
    damage, sentence = LOAD[case]
    damage(place)
    ended = command("ask", place.checkpoint, "What?", "--max-new-tokens", "1", "--device", "cpu")
    check_refusal(ended, sentence)
    assert not ended.out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["ask", "{place.checkpoint}", "What?", "--max-new-tokens", "0"], "max_new_tokens is 0: it must be at least 1"),
        (
            ["eval", "{place.checkpoint}", "{place.samples}", "--limit", "0"],
            "questions is limited to 0: ask",
        ),
        (["demo", "--questions", "0"], "0 questions do not cover the"),
        (["compare", "demo", "--limit", "0"], "0 questions do not cover the"),
    ],
)
def test_none_of_something(
    options: list[str], sentence: str, place: Place, command: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.output.parent)
    check_refusal(command(*(option.format(place=place) for option in options)), sentence)


SEEN_IN_HEADERS = [
    "unknown key",
    "newer format",
    "no format",
    "truncated shard",
    "garbled shard",
    "missing shard",
    "index leaves the folder",
    "missing tensor",
]


@pytest.mark.parametrize("case", SEEN_IN_HEADERS)
def test_inspecting_refuses(case: str, place: Place, command: Callable[..., Ended]) -> None:
    damage, sentence = LOAD[case]
    damage(place)
    check_refusal(command("inspect", place.checkpoint), sentence)


@pytest.mark.parametrize(
    "case",
    [
        *(
            "missing tensor",
            "missing norm",
            "missing embedding",
            "wrong shape of a norm",
            "wrong dtype",
            "NaN in a scale",
        ),
        *("newer format", "index leaves the folder"),
    ],
)
def test_from_pretrained_refuses(case: str, place: Place) -> None:
    """Without our `load` around it."""
    from transformers import AutoModelForImageTextToText

    damage, sentence = LOAD[case]
    damage(place)
    with pytest.raises(QuantExpertsError, match=sentence):
        AutoModelForImageTextToText.from_pretrained(place.checkpoint, dtype=torch.float32)


@pytest.mark.parametrize("key", ["shared_rank", "routed_rank"])
def test_layers_smaller_than_a_rank_stay_as_they_are(place: Place, key: str) -> None:
    recipe = Recipe(name="mine", group_inputs=False, **{key: 33})
    result = quantize(place.model, place.samples, place.output, QuantizationConfig.of("W4A6", recipe))
    layers = [f"model.language_model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("k_proj", "v_proj")]
    said = {event.where for event in result.events if event.what.startswith("32 x 64, smaller than the rank of its")}
    assert said == set(layers) and said <= set(result.config.ignore)
    assert said.isdisjoint(name for group in result.config.groups for name in group.linears)
    model = load(place.output)
    assert type(model.get_submodule(layers[0])).__name__ == "Linear"
    recipe = recipe.model_copy(update={key: 65})
    with pytest.raises(
        QuantExpertsError, match=r"Rank 65 is larger than every layer of block .*, of 64 x 64, say: choose"
    ):
        quantize(place.model, place.samples, place.output.with_name("other"), QuantizationConfig.of("W4A6", recipe))


def test_a_failed_run_can_be_repeated_once_its_cause_is_gone(place: Place, command: Callable[..., Ended]) -> None:
    whole = (place.model / "model.safetensors").read_bytes()
    QUANTIZE["NaN in a weight"][0](place)
    arguments = ["quantize", place.model, place.samples, place.output, "--recipe", "rtn"]
    assert command(*arguments).code == 2
    (place.model / "model.safetensors").write_bytes(whole)
    ended = command(*arguments)
    if ended.code:  # the model is another one now, so the unfinished run is not taken over silently
        check_refusal(ended, r"other settings \(model\): delete")
        shutil.rmtree(place.output.with_name("out.partial"))
        ended = command(*arguments)
    assert ended.code == 0 and load(place.output)


# --- what is unusual but works, and is said ---


def one_sample(place: Place) -> None:
    write_samples(place.samples.parent, small_samples("qwen2_vl", 1))


def text_only(place: Place) -> None:
    write_samples(place.samples.parent, small_samples("qwen2", 2))


def tiny_picture(place: Place) -> None:
    Image.new("RGB", (1, 1)).save(place.samples.parent / "0.png")


UNUSUAL: dict[str, tuple[Callable[[Place], None], list[str], str | None]] = {
    "text only": (text_only, [], "none has an image although the model takes images"),
    "one sample": (one_sample, [], "one sample only"),
    "long sample": (NOTHING, ["--max-tokens", "62"], r"samples\.jsonl line 2: cut from 64 tokens to the limit of 62"),
    "picture of one pixel": (tiny_picture, [], None),
    "large picture": (NOTHING, ["--max-pixels", "5000"], "scaled down"),
    "empty output folder": (lambda place: place.output.mkdir(), [], None),
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_quantize_notes(case: str, place: Place, command: Callable[..., Ended]) -> None:
    prepare, options, note = UNUSUAL[case]
    prepare(place)
    ended = command("quantize", place.model, place.samples, place.output, "--recipe", "rtn", *options)
    assert ended.code == 0, ended.err
    assert "Wrote" in ended.out and load(place.output)
    notes = [line for line in ended.err if line.startswith("Note: ")]
    assert len(notes) == (note is not None) and all(re.search(note or "", line) for line in notes), ended.err


@pytest.mark.parametrize(
    ("important", "note"), [(60, "only 4 token-dependent channels"), (64, "only 0 token-dependent channels")]
)
def test_layers_with_few_channels_left_have_fewer_experts(place: Place, important: int, note: str) -> None:
    """Where every channel is exempt there is nothing to route by; `strict` makes an error of it."""
    recipe = SMALL.model_copy(update=dict(important_channels=important, num_experts=8))
    config = QuantizationConfig.of("W4A6", recipe)
    result = quantize(place.model, place.samples, place.output, config)
    assert any(note in event.what for event in result.events)
    with torch.inference_mode():
        assert load(place.output)(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    with pytest.raises(QuantExpertsError, match=rf"{note}.*\(strict run\)"):
        quantize(place.model, place.samples, place.output.with_name("strict"), config, strict=True)
    assert not place.output.with_name("strict").exists()


def test_a_model_of_one_block(tiny: Callable[..., Path], place: Place, command: Callable[..., Ended]) -> None:
    ended = command("quantize", tiny("qwen2_vl", layers=1), place.samples, place.output, "--recipe", "rtn", "--json")
    assert ended.code == 0 and json.loads(ended.out)["resumed_blocks"] == 0
    with torch.inference_mode():
        assert load(place.output)(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_images_for_a_model_that_takes_none(
    tiny: Callable[..., Path], place: Place, command: Callable[..., Ended]
) -> None:
    check_refusal(
        command("quantize", tiny("qwen2"), place.samples, place.output), "takes text only: use samples without"
    )


SCOPES: dict[str, tuple[str, Callable[[Place], None], str]] = {
    "no image": ("vision,language", lambda place: text_only(place), "No image would run through vision: none of 2"),
    "unknown": ("head", NOTHING, r"scopes\.0: Input should be 'vision', 'merger' or 'language'"),
}


@pytest.mark.parametrize("case", SCOPES)
def test_scopes_are_refused(case: str, place: Place, command: Callable[..., Ended]) -> None:
    scopes, prepare, sentence = SCOPES[case]
    prepare(place)
    check_refusal(command("quantize", place.model, place.samples, place.output, "--scopes", scopes), sentence)
    assert not place.output.exists() and not place.output.with_name("out.partial").exists()


@pytest.mark.parametrize("scope", ["vision", "merger"])
def test_scopes_of_a_model_that_takes_text_only(
    tiny: Callable[..., Path], place: Place, command: Callable[..., Ended], scope: str
) -> None:
    text_only(place)
    ended = command("quantize", tiny("qwen2"), place.samples, place.output, "--scopes", f"language,{scope}")
    check_refusal(ended, f"has no vision encoder that transformers names: leave the scope '{scope}' out")
    assert not place.output.exists()


def test_a_full_disk(small_disk: Path, place: Place, command: Callable[..., Ended]) -> None:
    arguments = ["quantize", place.model, place.samples, small_disk / "out", "--recipe", "rtn"]
    check_refusal(command(*arguments), "disk is full: free space .* repeat the call")
    assert not list(small_disk.iterdir()), "nothing was finished, and nothing takes room"
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert command(*arguments).code == 0 and load(small_disk / "out")


def test_a_real_process_says_the_same(place: Place) -> None:
    """Not in this process, where the test runner could hide a library's noise: stderr is the sentence alone."""
    main = "from quant_experts.cli import main; main()"
    cut(lambda p: p.samples.parent / "0.png")(place)
    done = python(main, "quantize", place.model, place.samples, place.output, PYTHONPATH="")
    check_refusal(Ended(done.returncode, done.stdout, done.stderr.splitlines()), r"0\.png' is damaged")
    stored(f"{Q}.weight_scale", first_value(torch.nan))(place)
    done = python(main, "ask", place.checkpoint, "What?", PYTHONPATH="")
    check_refusal(Ended(done.returncode, done.stdout, done.stderr.splitlines()), "holds NaN or infinity")


def test_a_model_whose_blocks_have_no_linears(
    tiny: Callable[..., Path], tmp_path: Path, command: Callable[..., Ended]
) -> None:
    """GPT-2's layers are of a class of their own."""
    model = Path(shutil.copytree(tiny("qwen2"), tmp_path / "model"))
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "config.json").unlink()
    config = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=1, n_head=2, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(model)
    samples = write_samples(tmp_path, small_samples("qwen2", 2))
    ended = command("quantize", model, samples, tmp_path / "out", "--scheme", "W4A6")
    check_refusal(ended, "runs no linear layer.*nothing to quantize")
    assert not (tmp_path / "out").exists()


def test_the_current_folder_is_an_output_like_any_other(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = QuantizationConfig.of("W4A6", SMALL)
    result = quantize(place.model, place.samples, ".", config, device="cpu")
    assert result.folder == tmp_path / "here" and (tmp_path / "here" / "config.json").is_file()


def test_the_demo_notices_a_missing_extra_before_its_work(tmp_path: Path) -> None:
    """In a process of its own: this one may have the library loaded."""
    code = (
        "import sys\nsys.modules['matplotlib'] = None\n"
        "sys.argv = ['quant-experts', 'demo', '--output', sys.argv[1]]\n"
        "from quant_experts import cli\ncli.main()\n"
    )
    done = python(code, tmp_path / "out")
    assert done.returncode == 2 and "install quant-experts[report]" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
