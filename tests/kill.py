"""Kills a small run with SIGKILL at random moments; the same command must then end the same.

Run:  python tests/kill.py [number of kills]    (20 if not given; under a minute)
Each time a fresh run folder: kill, run again to the end, and compare the routers byte by byte and
results.json value by value (but for times) with those of a run that nothing disturbed. The models
are tiny and made here.
"""
import contextlib
import json
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

from conftest import make_home

import hub
import igp

TIMES = ("seconds", "peak_memory_bytes", "training_tokens_per_second", "sha256", "out")


def child(cache: Path, argv: list[str]) -> None:
    """The command line in a process of its own, silent; exits with its status."""
    hub.CACHE = cache
    with open("/dev/null", "w") as null, contextlib.redirect_stdout(null), \
            contextlib.redirect_stderr(null):
        status = igp.main(argv)
    sys.exit(status)


def without_times(value):
    """value without what a clock measured."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def state(folder: Path) -> list:
    """What must not depend on kills."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("samples-*.jsonl")])
    results = json.loads((folder / "results.json").read_text())
    return [*((path.name, path.read_bytes()) for path in files), without_times(results)]


def main() -> int:
    """Prints a line a kill; returns 1 unless all runs end the same."""
    kills, rng = int((sys.argv[1:] or [20])[0]), random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["igp", "sentence_transformers"])
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        cache, same, landed = make_home(root), 0, 0

        def run(name: str, seconds: float | None) -> int:
            argv = ["--model", str(root / "model"), "--calibration", "wikipedia", "--preset",
                    "demo", "--clusters", "3", "--samples", "60", "--dtype", "float32",
                    "--method", "dense,static,igp,sleb,evopress", "--sparsity", "0.34",
                    "--tasks-dir", str(root / "tasks"), "--log-samples", "--out", str(root / name)]
            process = context.Process(target=child, args=(cache, argv))
            process.start()
            process.join(seconds)
            process.kill()
            process.join()
            return process.exitcode

        assert run("warm", None) == 0
        start = time.perf_counter()
        assert run("whole", None) == 0
        whole, wanted = time.perf_counter() - start, state(root / "whole")
        for i in range(kills):
            name = f"run{i}"
            while (moment := rng.uniform(0, whole)) and run(name, moment) == 0:
                name += "x"                                       # it had ended before the kill
            landed += 1
            files = sorted(path.name for path in (root / name).glob("*.*"))
            ended = run(name, None) == 0 and state(root / name) == wanted
            same += ended
            print(f"killed after {moment:4.1f} of {whole:.1f} s, left "
                  f"{len(files)} files: {'the same' if ended else 'NOT THE SAME'}",
                  flush=True)
    print(f"{same} of {landed} killed runs ended with identical routers and results")
    return int(same < kills)


if __name__ == "__main__":
    sys.exit(main())
