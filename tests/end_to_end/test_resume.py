"""A run that is stopped anywhere goes on to the very bytes of an undisturbed one, and nobody else's run spoils it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import SMALL, contents, python, small_samples, write_samples

from quant_experts import QuantExpertsError, QuantizationConfig, quantize

Folders = Callable[..., Path]
LAYERS = 2


@pytest.fixture(scope="module")
def attempts(tiny: Folders, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One entry for each point at which a run was killed; see killed_runs.py."""
    place = tmp_path_factory.mktemp("killed")
    (place / "work").mkdir()
    samples = write_samples(place, small_samples("qwen2_vl", 2))
    script = Path(__file__).parent / "killed_runs.py"
    done = python(script, tiny("qwen2_vl", hidden_size=32, heads=2, kv_heads=1), samples, place / "work")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def failures(attempts: list[dict[str, Any]], ok: Callable[[dict[str, Any]], bool]) -> list[str]:
    return [f"{a['event']}{' (half written)' if a['half'] else ''}: {a}" for a in attempts if not ok(a)]


def test_every_change_of_the_disk_was_a_point(attempts: list[dict[str, Any]]) -> None:
    events = [a["event"] for a in attempts if not a["half"]]
    files = (
        "settings.json",
        "block-00000.json",
        "block-00000.safetensors",
        "block-00001.safetensors",
        "rest-00000.safetensors",
    )
    ends = ("tokenizer.json", "config.json", "model.safetensors.index.json", "quantization_report.json")
    assert {f"os.rename {name}.tmp" for name in (*files, *ends)} <= set(events)
    assert "os.rename out.partial" in events and events.count("os.remove settings.json") == 1
    assert not failures(attempts, lambda a: a["killed"])


def test_a_folder_with_the_final_name_is_whole(attempts: list[dict[str, Any]]) -> None:
    assert not failures(attempts, lambda a: a["whole_if_named"])
    assert not failures(attempts, lambda a: a["existed"] == (a["event"] in after_the_last_rename(attempts)))


def after_the_last_rename(attempts: list[dict[str, Any]]) -> set[str]:
    events = [a["event"] for a in attempts]
    return set(events[events.index("os.rename out.partial") + 1 :])


def test_running_again_gives_the_same_bytes(attempts: list[dict[str, Any]]) -> None:
    assert not failures(attempts, lambda a: a["equal"] and a["left"] == ["out"])


def test_finished_blocks_are_not_computed_again(attempts: list[dict[str, Any]]) -> None:
    def ok(a: dict[str, Any]) -> bool:
        if a["existed"]:  # finished: the repeated call is refused like any other whose output is there
            return "not empty" in a["again"]["error"]
        return (
            a["again"].get("computed") == list(range(a["finished"], LAYERS)) and a["again"]["resumed"] == a["finished"]
        )

    assert not failures(attempts, ok)
    assert {a["finished"] for a in attempts} == {0, 1, 2}


def stopping(done: int, *_: object) -> None:
    if done == 1:
        raise InterruptedError


@pytest.fixture
def stopped(tiny: Folders, tmp_path: Path) -> Path:
    """The output's name of a run that was stopped after one of two blocks."""
    with pytest.raises(InterruptedError):
        quantize(tiny("qwen2_vl"), small_samples("qwen2_vl"), tmp_path / "out", CONFIG, device="cpu", progress=stopping)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    return tmp_path / "out"


CONFIG = QuantizationConfig.of("W4A6", SMALL)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(config=QuantizationConfig.of("W4A8", SMALL)), "config"),
        (dict(config=QuantizationConfig.of("W4A6", SMALL, seed=1)), "config"),
        (dict(samples=small_samples("qwen2_vl", 3)), "samples"),
        (dict(model=dict(layers=3)), "model"),
        (dict(model=dict(seed=1)), "model"),  # the same names, shapes and sizes: a fine-tuned model, say
    ],
)
def test_another_run_does_not_take_over(tiny: Folders, stopped: Path, change: dict[str, Any], named: str) -> None:
    before = contents(stopped.with_name("out.partial"))
    model = tiny("qwen2_vl", **change.get("model", {}))
    with pytest.raises(QuantExpertsError, match=rf"other settings \({named}\).*delete"):
        quantize(
            model, change.get("samples", small_samples("qwen2_vl")), stopped, change.get("config", CONFIG), device="cpu"
        )
    assert contents(stopped.with_name("out.partial")) == before and not stopped.exists()


def test_a_stopped_run_goes_on_in_the_same_process(tiny: Folders, quantized: Folders, stopped: Path) -> None:
    result = quantize(tiny("qwen2_vl"), small_samples("qwen2_vl"), stopped, CONFIG, device="cpu")
    assert result.resumed_blocks == 1
    assert contents(stopped) == contents(quantized("qwen2_vl"))


def test_a_second_run_at_the_same_time_is_refused(tiny: Folders, tmp_path: Path, quantized: Folders) -> None:
    refusals = []

    def intrude(*_: object) -> None:
        with pytest.raises(QuantExpertsError, match="Another run is writing") as refusal:
            quantize(tiny("qwen2_vl"), small_samples("qwen2_vl"), tmp_path / "out", CONFIG, device="cpu")
        refusals.append(refusal)

    quantize(tiny("qwen2_vl"), small_samples("qwen2_vl"), tmp_path / "out", CONFIG, device="cpu", progress=intrude)
    assert len(refusals) == LAYERS + 1
    assert contents(tmp_path / "out") == contents(quantized("qwen2_vl"))
