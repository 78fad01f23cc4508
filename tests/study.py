"""What docs/results.md tells, from the first forward to the last figure, by one command.

Run:  python tests/study.py results --calibration FILE --tasks-dir FOLDER --out FOLDER
Sets: runs of igp.py on FILE (FineWeb-Edu's texts in docs/results.md) and on its own texts; masks of
      one kind of text each, judged on every kind; one mask trained in several ways; then, with
      nothing beside it, the speed; and docs/results.md from all of it (docs/document.py). Every
      piece is a file in --out, and a file that exists is not made again: stop it, start it again,
      start it in several shells or under torchrun.
"""
import argparse
import contextlib
import datetime
import functools
import io
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT
from filelock import FileLock, Timeout

import baselines
import evaluate
import hub
import igp
import model as llm
from hardconcrete import harden, lagrangian, prob_zero, sample_u, sample_z, whole_share
from run import once, parse, tokenized

DOCS = ROOT / "docs"
sys.path.append(str(DOCS))
import document  # noqa: E402

SEEDS = (0, 1, 2)
SIX = ",".join(evaluate.FIELDS)
RIVALS = ",".join(document.RIVALS)
SHARES = {"8": 0.1333, "16": 0.267, "22": 0.367}  # of 60 blocks
# run folder -> flags of igp.py besides --out and --seed; {texts}, {tasks}, {mixture} are places
RUNS = {
    "16": f"--calibration {{texts}} --sparsity 0.267 --tasks-dir {{tasks}} --tasks {SIX} "
          f"--method dense,static,igp,{RIVALS}",
    "16-flops": f"--calibration {{texts}} --sparsity 0.267 --tasks-dir {{tasks}} --tasks {SIX} "
                "--budget flops --method static,igp --no-matrix",
    "demo": "--method dense,static,igp",
    "demo-8": "--sparsity 0.1333 --method dense,static,igp --tasks=",
    "demo-22": "--sparsity 0.367 --method dense,static,igp --tasks=",
    "8": f"--calibration {{texts}} --sparsity 0.1333 --tasks= --method static,igp,{RIVALS}",
    "22": f"--calibration {{texts}} --sparsity 0.367 --tasks= --method static,igp,{RIVALS}",
    "mixture": "--calibration {mixture} --sparsity 0.267 --clusters 4 --tasks= "
               "--method dense,static,igp",
}
AGAIN = {                 # likewise, with other seeds
    "16": "--calibration {texts} --sparsity 0.267 --tasks= --method static,igp",
    "demo": RUNS["demo"],
}
KINDS = ("code", "Wikipedia", "FineWeb-Edu", "Alpaca")
EACH = 80              # held-out texts of a kind that judge
STREAMED = 5000        # texts of a hub source that are read
MIXED = 400            # texts of each kind in the mixture
SAMPLES = (640, 2560)  # texts of 48 tokens that train a mask of one kind

SWAPPED, WIDTH = 32, 4  # texts, and gates on either side of the threshold, that `swap` tries

# ------------------------------------------------------------------ a mask in several ways


@dataclass(frozen=True)
class Variant:
    """What a recipe changes of `python igp.py`'s way to train a mask."""

    closed: float | None = None  # the share of P(z = 0) in Eq. 7's t; None: it goes from 0 to 1
    gate: str = "paper"


RECIPES = {
    "moving": Variant(),
    "sampled": Variant(closed=0.0),
    "closed": Variant(closed=1.0),
    "louizos": Variant(gate="louizos"),
}


def train_mask(model, texts, recipe, variant, generator):
    """log_alpha (B,) of igp.train_mask, to the bit, but for the t of a variant; a line a step."""
    s_target, cost = recipe.s_target, recipe.cost
    start = math.log((1 - s_target) / s_target)
    log_alpha = torch.full_like(cost, start).requires_grad_()
    lambdas = torch.zeros(2, requires_grad=True)
    descends = {"params": log_alpha, "lr": recipe.lr}
    ascends = {"params": lambdas, "lr": recipe.lr_lambda, "maximize": True}
    adam = torch.optim.Adam([descends, ascends])
    starts = range(0, len(texts), recipe.batch_size)
    trace = []
    for step, first in enumerate(starts):
        batch = texts[first:first + recipe.batch_size]
        done = step / len(starts)
        u = sample_u((len(batch), len(cost)), generator)          # (b, B)  Eq. 3
        z = sample_z(log_alpha, u, recipe.gate)                   # (b, B)  Eq. 4-6
        away = 1 - (z @ cost).mean()
        zero = prob_zero(log_alpha, recipe.gate) @ cost
        p = done if variant.closed is None else variant.closed
        t = (1 - p) * away + p * zero
        L_s = lagrangian(t, s_target, *lambdas)                   # Eq. 7
        L_lm, gradient = igp.lm_gradient(model, batch, z, recipe.micro_batch)
        adam.zero_grad()
        torch.autograd.backward([z, L_s], [gradient, None])       # the gradient of Eq. 8
        falling = (1 - done) / (1 - igp.FLAT)
        adam.param_groups[0]["lr"] = recipe.lr * min(1, falling)
        adam.step()
        closed = int((z == 0).all(0).sum())
        trace.append([L_lm, t.item(), lambdas[0].item(), closed])
    return log_alpha.detach(), trace


def swap(model, log_alpha, cost, share, texts):
    """z (B,) of `harden`, or the same with one gate moved over the threshold if texts favour it.

    Tried is each of the WIDTH kept gates nearest to the threshold, and of as many skipped ones;
    the share is then met by what is nearest to the threshold on the other side. The lowest loss
    wins, the first of equal ones. This is no part of the paper, which has no local search: which
    of two almost equal gates ends on which side of the threshold is noise there.
    """
    z = harden(log_alpha, cost, share)
    order = log_alpha.argsort(stable=True)
    kept = order[z[order]]
    skipped = order[~z[order]]
    zs = [z]
    for i in (*kept[:WIDTH], *skipped[-WIDTH:]):
        moved = log_alpha.clone()
        moved[i] = -math.inf if z[i] else math.inf
        zs.append(harden(moved, cost, share))
    losses = [baselines.loss(model, z, texts) for z in zs]
    return zs[np.argmin(losses)]


def train(model, texts, args, variant, seed):
    """z (B,) of one mask under a variant, the same after a `swap`, and the steps.

    texts: lists of token ids.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = igp.draw(texts, args.samples, generator)
    cost = igp.gate_costs(model.config, "blocks", "block", args.length)
    recipe = igp.Recipe(args.sparsity, cost, variant.gate, args.lr,
                        args.lr_lambda, args.batch_size, args.batch_size)
    log_alpha, trace = train_mask(model, ids, recipe, variant, generator)
    share = whole_share(args.sparsity, model.B)
    z = harden(log_alpha, cost, share)
    return z, swap(model, log_alpha, cost, share, ids[-SWAPPED:]), trace


# ------------------------------------------------------------------ what is run


def flags_of(given, name, flags, seed=0):
    """The argument list of igp.py for a run in --out/name."""
    places = {
        "texts": given.calibration,
        "tasks": given.tasks_dir,
        "mixture": given.out / "mixture.jsonl",
    }
    words = [word.format(**places) for word in flags.split()]
    return [*words, "--preset=demo", f"--seed={seed}", f"--out={given.out / name}"]


def igp_run(flags):
    """What `python igp.py` prints with these flags, a list of lines."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        igp.work(parse(flags))
    return shown.getvalue().splitlines()


@functools.cache
def opened():
    """The demo's settings, model and tokenizer."""
    args = parse([])
    folder = hub.model_folder(args.model)
    model = llm.load(folder, args.device, getattr(torch, args.dtype))
    return args, model, hub.load_tokenizer(folder)


@functools.cache
def kinds(calibration, alpaca):
    """kind of text -> (texts that train, EACH that judge), by the rule of hub.split."""
    both = hub.calibration_texts("wikipedia+code", None)
    sources = {
        "code": [x for x in both if x["topic"] == "code"],
        "Wikipedia": hub.calibration_texts("wikipedia", None),
        "FineWeb-Edu": hub.calibration_texts(calibration, STREAMED),
        "Alpaca": hub.calibration_texts(alpaca, STREAMED),
    }
    found = {}
    for kind, texts in sources.items():
        train, _, judging = hub.split(texts, len(texts) == STREAMED)
        found[kind] = train, judging[:EACH]
    return found


def mixture(given):
    """As many texts of each kind, the kind as the topic."""
    lines = []
    for kind, (train, _) in kinds(given.calibration, given.alpaca).items():
        for x in train[:MIXED]:
            lines.append({"text": x["text"], "topic": kind})
    return lines


def losses(given, z, names):
    """kind -> -log P in nats of each of its judging texts under one z (B,), and their tokens."""
    args, model, tokenizer = opened()
    found = {}
    for kind in names:
        _, judging = kinds(given.calibration, given.alpaca)[kind]
        ids = [x["tokens"] for x in tokenized(tokenizer, judging, args.judged)]
        loglik = evaluate.judge(model, ids, z.expand(len(ids), -1))
        found[kind] = {"loss": (-loglik).tolist(), "tokens": [len(x) - 1 for x in ids]}
    return found


def dense(given):
    """`losses` of the whole model."""
    _, model, _ = opened()
    return [losses(given, torch.ones(model.B, dtype=torch.bool), KINDS)]


def trained(given, kind, name, samples, seed):
    """A mask of a kind of text by one of RECIPES and its `losses`; swapped, and its own loss."""
    args, model, tokenizer = opened()
    texts, _ = kinds(given.calibration, given.alpaca)[kind]
    texts = [x["tokens"] for x in tokenized(tokenizer, texts, args.length)]
    args = parse([f"--sparsity={SHARES['16']}", f"--samples={samples}"])
    z, swapped, trace = train(model, texts, args, RECIPES[name], seed)
    return [
        {"z": z.int().tolist(), "losses": losses(given, z, KINDS)},
        {"z": swapped.int().tolist(), "losses": losses(given, swapped, [kind])},
        trace,
    ]


def stamp():
    """Of which program, where and when the pieces are; of the first one, if they took days."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    cpu = re.findall("model name\\s*: (.*)", llm.read_text(Path("/proc/cpuinfo")))
    return [{
        "commit": commit.stdout.strip(),
        "machine": f"{len(cpu)} cores, {cpu[0]}",
        "dtype": parse([]).dtype,
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
    }]


def pieces(given):
    """file -> what makes it, of all that can run beside others, in the order of their use."""
    out = given.out
    found = {out / "stamp.json": stamp}
    found[out / "mixture.jsonl"] = partial(mixture, given)
    for name, flags in RUNS.items():
        found[out / f"{name}.json"] = partial(igp_run, flags_of(given, name, flags))
    for name, flags in AGAIN.items():
        for seed in SEEDS[1:]:
            again = f"{name}-seed-{seed}"
            found[out / f"{again}.json"] = partial(igp_run, flags_of(given, again, flags, seed))
    found[out / "dense.json"] = partial(dense, given)
    for samples in SAMPLES:
        for kind in KINDS:
            for seed in SEEDS:
                path = out / f"{kind}-{samples}-{seed}.json"
                found[path] = partial(trained, given, kind, "moving", samples, seed)
    for name in list(RECIPES)[1:]:
        for seed in SEEDS:
            path = out / f"{name}-{seed}.json"
            found[path] = partial(trained, given, "FineWeb-Edu", name, SAMPLES[0], seed)
    return found


def later(given):
    """Pieces that need others: the six tasks at 8 and 22 blocks, of the best three methods."""
    found = {}
    for name in ("8", "22"):
        ppl = {method: document.row(given.out, name, method)["ppl"] for method in document.NAMES}
        best = ",".join(sorted(ppl, key=ppl.get)[:3])
        flags = RUNS[name].split("--tasks=")[0]
        flags += f"--tasks-dir {{tasks}} --tasks {SIX} --method {best}"
        found[given.out / f"{name}-tasks.json"] = partial(igp_run, flags_of(given, name, flags))
    return found


def timed(command):
    """What a command prints, and the seconds it took; with all cores."""
    all_cores = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *command], env=all_cores, check=True,
                          capture_output=True, encoding="utf-8")
    return [time.perf_counter() - start, *done.stdout.splitlines()]


def alone(given):
    """Pieces beside which nothing may run: what is timed."""
    demo = [ROOT / "igp.py", "--out", given.out / "timed"]
    bench = [ROOT / "tests/bench.py"]
    scoring = [*bench, "scoring", "--tasks-dir", given.tasks_dir]
    return {
        given.out / "timed.json": partial(timed, demo),
        given.out / "bench.json": partial(timed, bench),
        given.out / "scoring.json": partial(timed, scoring),
    }


def make(parts):
    """Makes each file that is missing, unless another process is at it; then waits for those."""
    missing = [path for path in parts if not path.exists()]
    print(f"{len(missing)} of {len(parts)} pieces to make: {', '.join(x.stem for x in missing)}",
          file=sys.stderr)
    for patience in (0, -1):
        for path in missing:
            with contextlib.suppress(Timeout), FileLock(f"{path}.lock", timeout=patience):
                once(path, parts[path])


def results(given):
    """Makes what is missing, then docs/."""
    os.environ.pop("TORCHELASTIC_RUN_ID", None)                   # files share the work, not igp.py
    given.out = given.out.resolve()
    make(pieces(given))
    make(later(given))
    make(alone(given))
    document.write(given.out, sys.modules[__name__], DOCS)


def main():
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p = parser.add_subparsers(required=True).add_parser("results")
    p.add_argument("--calibration", required=True, help="FineWeb-Edu's texts, or its hub name")
    p.add_argument("--alpaca", default="alpaca", help="Alpaca's texts; if not given, from the hub")
    p.add_argument("--tasks-dir", required=True, help="folder with <task>.jsonl")
    p.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    return hub.guarded("study.py", partial(results, given))


if __name__ == "__main__":
    sys.exit(main())
