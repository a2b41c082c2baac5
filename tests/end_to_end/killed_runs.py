"""Kills a quantization run (SIGKILL, by itself) just before each thing it does to the disk, then runs it again.

Arguments: model folder, samples file, an empty folder to work in. Prints a JSON list with one entry a kill. All is
imported once, by a first run; each further run is a forked child. There is one thread, so that forking is safe.
"""

import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from small_runs import SMALL, contents

from quant_experts import QuantizationConfig, pipeline

MODEL, SAMPLES, PLACE = (Path(argument) for argument in sys.argv[1:4])
OUTPUT = PLACE / "out"
CONFIG = QuantizationConfig.of("W4A6", SMALL.model_copy(update=dict(group_inputs=True, important_channels=4)))
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def changes_output(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is about to change something under the output's names."""
    if event == "open":
        return str(arguments[0]).startswith(str(OUTPUT)) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    relative = event in ("os.remove", "os.rmdir") and arguments[1] >= 0  # inside a folder that rmtree walks through
    return event in CHANGES and (relative or str(arguments[0]).startswith(str(OUTPUT)))


def kill_before(number: int, half: bool) -> list[str]:
    """Watch this process and kill it before its change `number` (-1: never) -> what it did, growing.

    half: leave a file that is about to be renamed half written.
    """
    log: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not changes_output(event, arguments):
            return
        log.append(f"{event} {Path(arguments[0]).name}")
        if len(log) == number + 1:
            if half:
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    return log


def quantize() -> dict[str, Any]:
    """One run -> which blocks it computed, which it took over."""
    computed: list[int] = []
    compute = pipeline._Run._quantize_block

    def counting(self: Any, stream: Any, block: Any, index: int, **options: Any) -> Any:
        computed.append(index)
        return compute(self, stream, block, index, **options)

    pipeline._Run._quantize_block = counting
    result = pipeline.quantize(MODEL, SAMPLES, OUTPUT, CONFIG, device="cpu")
    return dict(computed=computed, resumed=result.resumed_blocks)


def forked(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run in a child -> its result, with how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except BaseException as error:
            answer = dict(error=str(error), trace=traceback.format_exc())
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = json.loads(pipe.read() or b"{}")
    return answer | dict(killed=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL)


def attempt(number: int, half: bool, whole: dict[str, bytes]) -> dict[str, Any]:
    """Kill a run and run again -> what was there in between and in the end."""
    first = forked(lambda: dict(log=kill_before(number, half)) | quantize())
    finished = len(list(PLACE.glob("out*/block-*.safetensors")))
    existed = OUTPUT.exists()
    readable = not existed or {k: v for k, v in contents(OUTPUT).items() if not k.startswith(".run")} == whole
    again = forked(quantize)
    found = dict(equal=contents(OUTPUT) == whole, left=sorted(p.name for p in PLACE.iterdir()))
    shutil.rmtree(PLACE)
    PLACE.mkdir()
    return (
        dict(killed=first["killed"], finished=finished, existed=existed, whole_if_named=readable, again=again) | found
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    pipeline.quantize(MODEL, SAMPLES, OUTPUT, CONFIG, device="cpu")  # here, so that children find everything imported
    whole = contents(OUTPUT)
    shutil.rmtree(OUTPUT)
    log = forked(lambda: dict(log=kill_before(-1, False)) | quantize())["log"]
    shutil.rmtree(OUTPUT)
    attempts = []
    for number, event in enumerate(log):
        halves = (False, True) if event.startswith("os.rename") and event.endswith(".tmp") else (False,)
        attempts += [dict(event=event, half=half) | attempt(number, half, whole) for half in halves]
    print(json.dumps(attempts))
