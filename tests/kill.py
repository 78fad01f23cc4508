"""Kills a small run with SIGKILL, early and late; the same command must then end the same.

Run:  OMP_NUM_THREADS=1 python tests/kill.py [number of kills] [processes]
      (20 kills of one process if not given; not on Windows)
Each time a fresh run folder: kill, run again to the end, and compare every file (but for what a
clock measured) with those of a run that nothing disturbed. The models are tiny and made here. Of
several processes, which torchrun starts, one is killed; undisturbed is a run of one process.
"""
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, make_home
from safetensors.torch import load_file

import hub
import igp

TIMES = ("seconds", "out")
COMMAND = ("--model {root}/model --tasks-dir {root}/tasks --calibration wikipedia --clusters 3 "
           "--samples 60 --dtype float32 --sparsity 0.34 --method dense,static,igp,sleb,evopress "
           "--out {out}")


def child(out):
    """The command line in a process of its own, silent; exits with its status."""
    hub.CACHE = out.parent / "cache"
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.exit(igp.main(COMMAND.format(root=out.parent, out=out).split()))


def run(out, seconds=None):
    """Whether a run ends well, killed after so many seconds if it still runs; None: never."""
    process = multiprocessing.Process(target=child, args=(out,))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode == 0


def run_several(out, processes, seconds=None, which="-o"):
    """The same of torchrun's processes, of which the oldest (-o) or the newest (-n) is killed."""
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node={processes}".split()
    words = COMMAND.format(root=out.parent, out=out).split()
    cache = os.environ | {"XDG_CACHE_HOME": str(out.parent)}
    command = [sys.executable, *torchrun, ROOT / "igp.py", *words]
    process = subprocess.Popen(command, env=cache, stdout=-3, stderr=-3)  # to nowhere
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        subprocess.run(["pkill", "-KILL", which, "-P", str(process.pid)], check=False)
    return process.wait() == 0


def untimed(fields):
    """fields without what a clock measured."""
    return {key: value for key, value in fields.items() if key not in TIMES}


def content(path):
    """What must not depend on kills: a file's bytes; its values where one of them is a time."""
    if path.suffix == ".json":
        return json.loads(path.read_bytes(), object_hook=untimed)
    if path.parent.name == "masks" or path.stem == "clusters":
        return {name: x.tolist() for name, x in untimed(load_file(path)).items()}
    return path.read_bytes()


def state(folder):
    """Name -> content of every file of a run; all names of files have a dot, no folder's has."""
    return {path.relative_to(folder): content(path) for path in folder.rglob("*.*")}


def main():
    """Prints a line a kill; returns the exit status: True (1) unless all runs end the same."""
    [kills, *more], same = map(int, sys.argv[1:] or [20]), 0
    processes = sum(more) or 1
    multiprocessing.set_start_method("forkserver")
    multiprocessing.set_forkserver_preload(["igp", "sentence_transformers"])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_home(root)
        run(root / "warm")
        start = time.perf_counter()
        assert run(root / "whole")
        wanted = state(root / "whole")
        if processes > 1:                                         # these import everything anew
            (root / "ig-pruning").symlink_to(root / "cache")
            start = time.perf_counter()
            assert run_several(root / "several", processes)
        whole = time.perf_counter() - start
        for i in range(kills):
            out, share = root / f"run{i}", (i + 0.5) / kills
            moment = whole * (1 + share) / 2 if processes > 1 else whole * share  # after imports
            if processes > 1:
                ended = run_several(out, processes, moment, ["-o", "-n"][i % 2])
                done = run_several(out, processes)
            else:
                ended = run(out, moment)
                done = run(out)
            same += done and state(out) == wanted
            what = "too late" if ended else "killed"
            print(f"{what} after {moment:4.1f} of {whole:.1f} s; {same} of {i + 1} ended the same")
    return same < kills


if __name__ == "__main__":
    sys.exit(main())
