"""What decides the quality of a mask, and how much of the gain is routing.

Run:  python tests/study.py recipe [--seeds 3] [--only NAME ...] [flags of igp.py]
      python tests/study.py controls RUN_FOLDER
      python tests/study.py mix FILE SOURCE SOURCE ...
Sets: recipe: one mask, trained in several ways by the texts of --calibration; perplexity of the
      texts that choose recipes, which are neither trained on nor judged in the end.
      controls: what the masks of a finished run (with --matrix) give under other routings than the
      nearest centroid's, on its held-out texts.
      mix: a calibration file of several sources, the source as the topic, so that
      `python igp.py --calibration FILE` clusters different domains.
"""
import argparse
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import conftest  # noqa: F401  it finds the modules below
import numpy as np
import torch

import evaluate
import hub
import igp
import model as llm
from hardconcrete import harden, lagrangian, prob_zero, sample_u, sample_z, whole_share
from model import UserError
from run import SETTINGS, parse, tokenized

CHOSEN, TOKENS = 60, 128  # texts that choose a recipe, and how much of each is read
SWAPPED, WIDTH = 32, 4    # texts, and gates on either side of the threshold, that `swap` tries
MIXED = 10_000            # texts of a hub's source that a mix takes from

# ------------------------------------------------------------------ recipes


@dataclass(frozen=True)
class Variant:
    """What a recipe changes of `python igp.py`'s way to train a mask."""

    closed: float | None = None  # the share of P(z = 0) in Eq. 7's t; None: it goes from 0 to 1
    one_u: bool = False          # one u for all texts of a step
    swap: bool = False           # `swap` when the training is over
    samples: float = 1.0         # times --samples
    gate: str = "paper"
    lr: float = SETTINGS["lr"][0]


RECIPES = {
    "default": Variant(),
    "t = 1 - mean(z) throughout": Variant(closed=0.0),
    "t = P(z = 0) throughout": Variant(closed=1.0),
    "one swap": Variant(swap=True),
    "one u per step": Variant(one_u=True),
    "louizos": Variant(gate="louizos"),
    "rate of log_alpha 0.1": Variant(lr=0.1),
    "a quarter of the tokens": Variant(samples=0.25),
}


def train_mask(model, texts, recipe, variant, generator):
    """log_alpha (B,) of igp.train_mask, to the bit, but for the t and the u of a variant."""
    s_target, cost = recipe.s_target, recipe.cost
    start = math.log((1 - s_target) / s_target)
    log_alpha = torch.full_like(cost, start).requires_grad_()
    lambdas = torch.zeros(2, requires_grad=True)
    descends = {"params": log_alpha, "lr": recipe.lr}
    ascends = {"params": lambdas, "lr": recipe.lr_lambda, "maximize": True}
    adam = torch.optim.Adam([descends, ascends])
    starts = range(0, len(texts), recipe.batch_size)
    for step, first in enumerate(starts):
        batch = texts[first:first + recipe.batch_size]
        done = step / len(starts)
        rows = 1 if variant.one_u else len(batch)
        u = sample_u((rows, len(cost)), generator)                # (b or 1, B)  Eq. 3
        u = u.expand(len(batch), -1)
        z = sample_z(log_alpha, u, recipe.gate)                   # (b, B)  Eq. 4-6
        away = 1 - (z @ cost).mean()
        zero = prob_zero(log_alpha, recipe.gate) @ cost
        p = done if variant.closed is None else variant.closed
        t = (1 - p) * away + p * zero
        L_s = lagrangian(t, s_target, *lambdas)                   # Eq. 7
        _, gradient = igp.lm_gradient(model, batch, z, recipe.micro_batch)
        adam.zero_grad()
        torch.autograd.backward([z, L_s], [gradient, None])       # the gradient of Eq. 8
        falling = (1 - done) / (1 - igp.FLAT)
        adam.param_groups[0]["lr"] = recipe.lr * min(1, falling)
        adam.step()
    return log_alpha.detach()


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
    losses = [evaluate.loss(model, z, texts) for z in zs]
    return zs[np.argmin(losses)]


def train(model, texts, args, variant, seed):
    """The z (B,) of one mask under a variant; texts: lists of token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = igp.draw(texts, int(args.samples * variant.samples), generator)
    cost = igp.gate_costs(model.config, "blocks", "block", args.length)
    recipe = igp.Recipe(args.sparsity, cost, variant.gate, variant.lr,
                        args.lr_lambda, args.batch_size, args.micro_batch or args.batch_size)
    log_alpha = train_mask(model, ids, recipe, variant, generator)
    share = whole_share(args.sparsity, model.B)
    if variant.swap:
        return swap(model, log_alpha, cost, share, ids[-SWAPPED:])
    return harden(log_alpha, cost, share)


def recipe_table(given, flags):
    """Prints a line a recipe as soon as it is there: the perplexity of each seed, and the mean."""
    args = parse(flags)
    folder = hub.model_folder(hub.resolve(args.model))
    model = llm.load(folder, args.device, getattr(torch, args.dtype))
    tokenizer = hub.load_tokenizer(folder)
    texts = hub.calibration_texts(args.calibration, args.texts + 2 * hub.JUDGING)
    texts, chosen, _ = hub.split(texts, args.calibration in hub.HUB_TEXTS)
    ids = [x["tokens"] for x in tokenized(tokenizer, texts[:args.texts], args.length)]
    chosen = [x["tokens"] for x in tokenized(tokenizer, chosen[:CHOSEN], TOKENS)]
    for name in given.only:
        found = []
        for seed in range(given.seeds):
            z = train(model, ids, args, RECIPES[name], seed)
            found.append(math.exp(evaluate.loss(model, z, chosen)))
        print(f"{name:28}", np.round(found, 2), f"mean {np.mean(found):.2f}", flush=True)


# ------------------------------------------------------------------ controls


def controls(given, _):
    """Routings of a run's masks side by side: perplexity, and how far above the best single mask.

    Best is here the mask whose perplexity is the lowest on these very texts, so that routing has
    no easier rival. The difference is in nats a token, the mean over texts ± its standard error.
    """
    rows = llm.read_json(Path(given.run) / "results.json")["rows"]
    loss = {row["name"]: -np.array(row["loglikelihood"]) for row in rows}
    masks = [x for name, x in loss.items() if name.startswith("igp-mask-")]
    if not masks:
        raise UserError(f"{given.run} has no masks by themselves: run igp.py --matrix there first")
    n = np.array(rows[0]["tokens"])
    best = min(masks, key=np.sum)
    ways = {
        "nearest centroid (Eq. 9)": loss["igp"],
        "best single mask": best,
        "random mask, in expectation": np.mean(masks, 0),
        "oracle: the best mask of each text": np.min(masks, 0),
    }
    if "static" in loss:
        ways["static: N = 1, all tokens"] = loss["static"]
    table = []
    for name, values in ways.items():
        gap = (values - best) / n.mean()
        error = gap.std(ddof=1) / math.sqrt(len(gap))
        table.append({
            "routing": name,
            "perplexity": f"{evaluate.perplexity(-values, n):.2f}",
            "above the best single": f"{gap.mean():+.4f} ± {error:.4f}",
        })
    print(evaluate.markdown(table))


def mix(given, _):
    """Writes a .jsonl with text and topic, as many texts of each source as the least has."""
    sources = {Path(name).stem: hub.calibration_texts(name, MIXED) for name in given.sources}
    n = min(map(len, sources.values()))
    generator, lines = np.random.default_rng(0), []
    for name, texts in sources.items():
        for i in generator.permutation(len(texts))[:n]:
            lines.append(json.dumps({"text": texts[i]["text"], "topic": name}))
    llm.write(given.file, "\n".join(lines).encode())
    print(f"{n} texts of each of {', '.join(sources)}")


def main():
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    sub = parser.add_subparsers(required=True, dest="work")
    p = sub.add_parser("recipe")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES)
    sub.add_parser("controls").add_argument("run")
    p = sub.add_parser("mix")
    p.add_argument("file")
    p.add_argument("sources", nargs="+")
    given, flags = parser.parse_known_args()
    work = {"recipe": recipe_table, "controls": controls, "mix": mix}[given.work]
    return hub.guarded("study.py", partial(work, given, flags))


if __name__ == "__main__":
    sys.exit(main())
