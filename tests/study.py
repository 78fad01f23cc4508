"""What decides the quality of a mask, and how much of the gain is routing.

Run:  python tests/study.py recipe --calibration FILE [--seeds 3] [--only NAME,...]
      python tests/study.py mix FILE SOURCE SOURCE ...
      python tests/study.py controls RUN_FOLDER [--tasks-dir FOLDER] [--limit N]
Sets: recipe: one mask, trained in several ways from the same number of tokens, then swapped as
      static is; perplexity of the texts that choose recipes.
      mix: a calibration file with as many texts of each source (wikipedia, code, or a file), its
      name as the topic, so that `python igp.py --calibration FILE` clusters different domains.
      controls: what a finished run's masks do under other routings than the nearest centroid's, on
      its judging texts; with --tasks-dir also every mask by itself on the tasks (Fig. 1).
Every number is a perplexity unless said; training reads training texts only.
"""
import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT  # which also finds the modules below

import evaluate
import hub
import igp
import model as llm
import router as routing
from hardconcrete import prob_zero

CHOSEN, TOKENS = 60, 128  # texts that choose a recipe or a mask, and how much of each is read
# Each is a change of the default, igp.PRESETS["demo"] on one mask.
RECIPES = {
    "default": {},
    "no swap": {"swaps": 0},
    "2 rounds of swaps": {"swaps": 2},
    "mean of log_alpha over the second half": {"average": True},
    "8 texts a step": {"batch_size": 8},
    "2 texts of 96 tokens a step": {"batch_size": 2, "length": 96},
    "rate of log_alpha 0.1": {"lr": 0.1},
    "rate of log_alpha 0.3": {"lr": 0.3},
    "rate of lambda 0.3": {"lr_lambda": 0.3},
    "rate falls from the first step": {"constant": 0.0},
    "log_alpha from 2": {"start": 2.0},
    "Taylor start": {"taylor": True},
    "one u per step": {"shared_u": True},
    "t in closed form": {"closed": True},
    "louizos": {"gate": "louizos"},
    "louizos; t in closed form; from 2.5": {"gate": "louizos", "closed": True, "start": 2.5},
    "paper's gate; then louizos": {"then": "louizos"},
    "a quarter of the tokens": {"share": 0.25},  # what each of four masks gets without igp.SHARED
}


def opened(args: argparse.Namespace):
    """(model, training texts, choosing, judging) of a command line; a text has its "tokens"."""
    folder = hub.model_folder(hub.resolve(args.model))
    model = llm.load(folder, args.device, getattr(torch, args.dtype))
    tokenizer, texts = hub.load_tokenizer(folder), hub.calibration_texts(args.calibration, None)
    ids = [x.ids for x in tokenizer.encode_batch([x["text"] for x in texts])]
    for text, x in zip(texts, ids, strict=True):
        text["tokens"] = x
    return model, *hub.split([x for x in texts if len(x["tokens"]) > 1])


def losses(model: llm.Transformer, z: torch.Tensor, texts: list[list[int]]) -> np.ndarray:
    """-log P of each text after its first token under one z (B,)."""
    requests = [(x[:1], [x[1:]]) for x in texts]
    return -np.array(evaluate.loglikelihoods(model, requests, z.expand(len(texts), -1)))[:, 0]


def perplexity(model: llm.Transformer, z: torch.Tensor, texts: list[list[int]]) -> float:
    """Of all texts together, a token a vote."""
    n = np.array([len(x) - 1 for x in texts])
    return evaluate.perplexity(-losses(model, z, texts), n)


# ------------------------------------------------------------------ recipes


@contextlib.contextmanager
def changed(mask: dict, recipe: dict, gate: str):
    """igp.train_mask with one u for all texts of a step, or with Eq. 7's t in closed form."""
    sample_u, lagrangian = igp.sample_u, igp.lagrangian
    if recipe.get("shared_u"):
        igp.sample_u = lambda shape, generator: sample_u(shape[1:], generator).expand(shape)
    if recipe.get("closed"):
        igp.lagrangian = lambda _t, *rest: lagrangian(
            prob_zero(mask["log_alpha"], gate).mean(), *rest)
    try:
        yield
    finally:
        igp.sample_u, igp.lagrangian = sample_u, lagrangian


def taylor_start(model: llm.Transformer, mask: dict, texts: list[list[int]]) -> None:
    """log_alpha from -1 to 3 in the order of the loss's first-order rise when a block goes."""
    z = torch.ones(1, model.B, requires_grad=True)
    for x in texts:
        hidden = model(torch.tensor([x]), z)[0, :-1]
        _, gradient = igp.lm_loss(model, hidden, torch.tensor(x[1:]))
        hidden.backward(gradient)
    rank = (-z.grad[0]).argsort().argsort() / (model.B - 1)
    with torch.no_grad():
        mask["log_alpha"].copy_(4 * rank - 1)


def train(model: llm.Transformer, texts: list, args: argparse.Namespace, recipe: dict,
          seed: int) -> torch.Tensor:
    """The z of one mask under a recipe."""
    args = argparse.Namespace(**vars(args) | {k: v for k, v in recipe.items() if k in args})
    generator, weight = torch.Generator().manual_seed(seed), igp.gate_weights(model.config, args)
    mask = igp.new_mask(weight, args, f"seed {seed}")
    if "start" in recipe:
        mask["log_alpha"].data.fill_(recipe["start"])
    default = igp.PRESETS[args.preset]
    tokens = int(recipe.get("share", 1) * default["samples"] * default["clusters"]
                 * default["length"])
    batches = igp.draw(texts, tokens // args.length, args, generator)
    if recipe.get("taylor"):
        taylor_start(model, mask, sum(batches[-8:], []))
    constant, kept = recipe.get("constant", igp.SHARED[args.preset]), []
    steps = [(x, min(1.0, (1 - i / len(batches)) / (1 - constant)))
             for i, x in enumerate(batches)]
    for part in range(10):
        first, last = (len(steps) * p // 10 for p in (part, part + 1))
        args.gate = recipe.get("then", args.gate) if part >= 5 else args.gate
        with changed(mask, recipe, args.gate):
            igp.train_mask(model, mask, steps[first:last], args, generator)
        kept.append(mask["log_alpha"].detach().clone())

    def hard(log_alpha: torch.Tensor) -> torch.Tensor:
        """As igp.train_masks does it."""
        return igp.hard_z(log_alpha, weight, args)

    last = torch.stack(kept[5:]).mean(0) if recipe.get("average") else kept[-1]
    own = sum(batches, [])[-igp.SWAPPED * default["clusters"]:]
    for _ in range(recipe.get("swaps", 1)):
        last, _ = igp.swap(model, last, own, hard)
    return hard(last)


def recipe_table(argv: argparse.Namespace) -> None:
    """A line a recipe, printed as soon as it is there."""
    names = argv.only.split(",") if argv.only else list(RECIPES)
    for name in set(names) - set(RECIPES):
        raise ValueError(f"recipe {name} is unknown; expected of {', '.join(RECIPES)}")
    args = igp.parse(["--calibration", argv.calibration, "--sparsity", str(argv.sparsity)])
    model, texts, chosen, _ = opened(args)
    texts, chosen = [x["tokens"] for x in texts], [x["tokens"][:TOKENS] for x in chosen[:CHOSEN]]
    print(f"At most {igp.training_tokens(args)} tokens, {argv.sparsity} skipped; dense "
          f"{perplexity(model, torch.ones(model.B).bool(), chosen):.2f}\n")
    seeds = range(argv.seeds)
    print(evaluate.markdown(["recipe", *(f"seed {i}" for i in seeds), "mean", "spread"], []))
    for name in names:
        found = [perplexity(model, train(model, texts, args, RECIPES[name], i), chosen)
                 for i in seeds]
        mean = float(np.mean(found))
        print(f"| {name} | " + " | ".join(f"{x:.2f}" for x in [*found, mean])
              + f" | {(max(found) - min(found)) / mean:.1%} |", flush=True)


# ------------------------------------------------------------------ controls


def mix(argv: argparse.Namespace) -> None:
    """Writes a .jsonl with text and topic, as many texts of each source as the least has."""
    sources = {}
    for source in argv.sources:
        if source == "code":  # the standard library's own modules
            library = Path(json.__file__).parent.parent
            sources[source] = [path.read_text(encoding="utf-8", errors="ignore")
                               for path in sorted(library.glob("*.py"))]
        else:
            sources[Path(source).stem] = [
                x["text"] for x in hub.calibration_texts(source, None)]
    n = min(map(len, sources.values()))
    lines = [json.dumps({"text": text, "topic": name}) for name, texts in sources.items()
             for text in np.random.default_rng(0).permutation(texts)[:n].tolist()]
    Path(argv.file).write_text("\n".join(lines), encoding="utf-8")
    print(f"{n} texts of each of {', '.join(sources)}")


def controls(argv: argparse.Namespace) -> None:
    """Routings of a run's masks side by side, on the judging texts, cut to TOKENS."""
    results = json.loads((Path(argv.run) / "results.json").read_text())
    args = argparse.Namespace(**results["arguments"])
    router = routing.load(Path(argv.run) / "router.safetensors")
    model, _, chosen, judging = opened(args)
    static = Path(argv.run) / "static.safetensors"
    zs = torch.cat([router.z, *([routing.load(static).z] if static.exists() else [])])
    N = len(router.z)
    encoder = routing.open_encoder(hub.encoder_folder(), args.device, getattr(torch, args.dtype))

    first = [losses(model, z, [x["tokens"][:TOKENS] for x in chosen[:CHOSEN]]).sum()
             for z in router.z]
    best, cut = int(np.argmin(first)), [x["tokens"][:TOKENS] for x in judging]
    loss, n = np.array([losses(model, z, cut) for z in zs]), np.array([len(x) - 1 for x in cut])
    k = routing.route(router, routing.encode(encoder, [x["text"] for x in judging])).numpy()
    each = np.arange(len(n))
    ways = {"nearest centroid (Eq. 9)": loss[k, each], f"best single mask ({best})": loss[best],
            "random mask, in expectation": loss[:N].mean(0),
            "oracle: the best mask of each text": loss[:N].min(0)}
    if len(zs) > N:
        ways["static: N = 1, all tokens"] = loss[N]
    rows = []
    for name, values in ways.items():
        # of the mean loss's difference to the best single mask, over texts
        gap = (values - loss[best]) / n.mean()
        rows.append([name, f"{np.exp(values.sum() / n.sum()):.2f}",
                     f"{gap.mean():+.4f} ± {gap.std(ddof=1) / len(gap) ** 0.5:.4f}"])
    print(evaluate.markdown(["routing", "perplexity", "nats a token above the best single"], rows))
    matrix = [[evaluate.perplexity(-loss[j, k == i], n[k == i]) if (k == i).any() else None
               for j in range(N)] for i in range(N)]
    print("\n" + evaluate.matrix_report(matrix, np.bincount(k, minlength=N).tolist()))
    if argv.tasks_dir:
        print("\n" + fig_1(argv, args, model, zs, np.exp(loss.sum(1) / n.sum())))


def fig_1(argv: argparse.Namespace, args: argparse.Namespace, model: llm.Transformer,
          zs: torch.Tensor, perplexities: np.ndarray) -> str:
    """Fig. 1: perplexity of each mask beside its scores on the tasks, in percent."""
    args.tasks_dir, args.limit = argv.tasks_dir, argv.limit
    tokenizer = hub.load_tokenizer(hub.model_folder(hub.resolve(args.model)))
    rows = []
    for i, z in enumerate(zs):
        scores = []
        for task in evaluate.FIELDS:
            questions = igp.open_task(task, args)
            every = z.expand(len(questions), -1)
            found = evaluate.score(model, tokenizer, questions, every, "auto")
            got = evaluate.accuracy(questions, found)
            scores.append(100 * got["acc" if got["acc_norm"] is None else "acc_norm"])
        rows.append([i, f"{perplexities[i]:.2f}",
                     *(f"{x:.1f}" for x in [*scores, float(np.mean(scores))])])
    return evaluate.markdown(["mask", "perplexity", *evaluate.FIELDS, "average"], rows)


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sub = parser.add_subparsers(required=True)
    p = sub.add_parser("recipe")
    p.add_argument("--calibration", required=True, help="a file, or a name that igp.py knows")
    p.add_argument("--sparsity", type=float, default=0.2667, help="share of blocks, 0-1")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--only", help="comma-separated recipes")
    p.set_defaults(work=recipe_table)
    p = sub.add_parser("mix")
    p.add_argument("file")
    p.add_argument("sources", nargs="+")
    p.set_defaults(work=mix)
    p = sub.add_parser("controls")
    p.add_argument("run", help=f"a run folder of {ROOT.name}/igp.py")
    p.add_argument("--tasks-dir", help="folder with <task>.jsonl: each mask on the six tasks")
    p.add_argument("--limit", type=int, default=100, help="questions of a task")
    p.set_defaults(work=controls)
    argv = parser.parse_args()
    sys.exit(hub.guarded("study.py", lambda: argv.work(argv)))


if __name__ == "__main__":
    main()
