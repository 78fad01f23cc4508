"""A run's inputs, opened and checked before anything expensive starts, and its files.

Left out: the method. igp.py tells what is made from these inputs; here it is one word, make.
What is dear to make is a file, and a file that exists is not made again (a half-trained mask starts
over): that is how a stopped run goes on, how --method joins a finished run, and how several
processes share one.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

import baselines
import evaluate
import hub
import model as llm
import router as routing
from hardconcrete import GATES, whole_share
from model import UserError

# ------------------------------------------------------------------ the command line

TRAINED = ("static", "igp")
METHODS = ("dense", *TRAINED, *baselines.RIVALS)
TASKS = ("wiki_what", *evaluate.FIELDS)
# flag: value under --preset demo, under --preset paper, meaning, and the choices if they are few.
# "paper": Table 5. "demo": sized for minutes on two CPU cores. Masks and scores are made from
# these, and from files: a run folder holds one value of each.
# Silent: the paper's M, epochs, batch size, and on how much of a held-out text it judges.
# Deviates: the demo doubles the rate of log_alpha, as its training is short.
SETTINGS = {
    "sparsity": (0.25, 0.25, "share of blocks (see --budget) to skip, 0-1"),
    "clusters": (2, 16, "N, the number of clusters and masks"),
    "texts": (1200, 50_000, "M, the number of texts to cluster"),
    "samples": (640, 1000, "texts that train a mask"),
    "length": (48, 512, "of a training text, in tokens"),
    "epochs": (1, 1, "passes over a mask's samples"),
    "batch_size": (4, 4, "b, texts in a training step"),
    "lr": (0.2, 0.1, "Adam's rate for log_alpha"),
    "lr_lambda": (0.1, 0.1, "Adam's rate for lambda_1 and lambda_2"),
    "gate": ("paper", "paper", "which reading of Eq. 4", *GATES),
    "budget": ("blocks", "blocks", "what --sparsity is a share of", "blocks", "flops"),
    "granularity": ("block", "block", "of igp, static, evopress; other rivals skip layers",
                    "block", "layer"),
    "judged": (128, 512, "of a held-out text, in tokens"),
    "seed": (0, 0, "of k-means, gates and the order of texts"),
    "dtype": ("auto", "auto", "of the model; auto is bfloat16 where the hardware multiplies it",
              "auto", "float32", "bfloat16"),
}
FLAGS = {  # likewise; `begin` compares contents instead, or a run folder may see several values
    "model": (hub.EMBEDDED, hub.EMBEDDED, "a known name, a hub id, or a folder with config.json, "
              "tokenizer.json and *.safetensors"),
    "preset": ("demo", "paper", "if not given, paper for another --model", "demo", "paper"),
    "calibration": ("wikipedia+code", "fineweb-edu",
                    "texts of Stage 1: a file, one of these, wikipedia, wikitext2 or alpaca"),
    "method": ("dense,igp", "dense,igp", f"of {', '.join(METHODS)}, comma-separated; or all"),
    "matrix": (True, False, "judge every held-out text under every mask, too"),
    "micro_batch": (0, 0, "texts of a step that run at a time; 0: what fits"),
    "router": (None, None, "apply this router.safetensors, train nothing"),
    "prompt": (None, None, "answer this text, or - for standard input, under its own mask"),
    "tasks": (None, None, f"of {', '.join(TASKS)}, comma-separated; '' for none"),
    "tasks_dir": (None, None, "folder with <task>.jsonl in the hub's schema, else the hub"),
    "limit": (10**6, 10**6, "ask only the first so many questions of a task"),
    "bos": ("auto", "auto", "begin a question with BOS: as the tokenizer does by itself, always, "
            "or never", "auto", "on", "off"),
    "device": (None, None, "cpu, cuda or mps; if not given, a GPU where there is one"),
    "out": (None, None, "run folder; if not given, runs/<model>-<sparsity>-<preset>"),
}
LEAST = {"length": 2, "judged": 2}
LEAST |= dict.fromkeys(("sparsity", "lr", "lr_lambda", "seed", "micro_batch"), 0)  # others: 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, under the preset they ask for, checked as far as no file is needed."""
    p = argparse.ArgumentParser("igp.py", description="IG-Pruning: a mask per kind of input.")
    p.error = lambda message: p.exit(2, f"igp.py: error: {message}; --help lists the flags\n")
    flags = SETTINGS | FLAGS
    for flag, (demo, paper, meaning, *choices) in flags.items():
        kind = str if demo is None else type(demo)
        more = {"type": kind, "choices": choices or None}
        if kind is bool:
            more = {"action": argparse.BooleanOptionalAction}
        values = "" if demo is None else f" (demo: {demo}, paper: {paper})"
        p.add_argument(f"--{flag.replace('_', '-')}", help=meaning + values, **more)
    args = p.parse_args(argv)
    demo = args.preset == "demo" or not args.preset and args.model in (None, hub.EMBEDDED)
    for flag, values in flags.items():
        given, least = getattr(args, flag), LEAST.get(flag, 1)
        if given is None:
            setattr(args, flag, values[not demo])
        elif type(given) in (int, float) and not least <= given < 2**31:
            p.error(f"--{flag.replace('_', '-')} {given} is not a number from {least} up")
    for key in ("calibration", "router", "tasks_dir", "out"):
        path = getattr(args, key)
        if path is not None:
            setattr(args, key, os.path.expanduser(path))
            if not path or not path.isprintable():
                p.error(f"--{key.replace('_', '-')} {path!r} is no path")
    check(args, p.error)
    return args


def check(args: argparse.Namespace, error) -> None:
    """Fills in what depends on other flags; calls error(message) for what makes no sense."""
    out = args.out or f"runs/{Path(args.model).resolve().name}-{args.sparsity}-{args.preset}"
    args.out = Path(out)
    if args.prompt is not None:
        args.prompt = hub.argument_text(args.prompt, "--prompt")
        args.method, args.tasks = "igp", ""
    if args.tasks is None:
        six = args.tasks_dir or args.calibration in hub.HUB_TEXTS
        leads = args.calibration in ("wikipedia", "wikipedia+code")
        args.tasks = "wiki_what" if leads else ""
        args.tasks = ",".join(evaluate.FIELDS) if six else args.tasks
    for key, known in (("method", METHODS), ("tasks", TASKS)):
        names = set(filter(None, getattr(args, key).split(",")))
        if not names <= {*known, "all"}:
            error(f"--{key} {getattr(args, key)} is not of {', '.join(known)}")
        setattr(args, key, [name for name in known if names & {name, "all"}])
    if not args.method or args.router and set(args.method) - {"dense", "igp"}:
        error("--method names none, or one that --router cannot serve (dense, igp)")
    if not 0 < args.sparsity < 1 and (args.sparsity, args.method) != (0, ["dense"]):
        error(f"--sparsity {args.sparsity} is not between 0 and 1; for 0 use --method dense")
    args.device = args.device or str(torch.accelerator.current_accelerator() or "cpu")
    if args.device == "cuda":                                    # each process its own
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        on_cpu = torch.empty(0, device=args.device).is_cpu
    except (RuntimeError, AssertionError, ImportError):
        error(f"--device {args.device} is not here; use --device cpu")
    args.device = "cpu" if on_cpu else args.device               # not cpu:0
    if args.dtype == "auto":                                     # CPUs: where they multiply it
        able = not on_cpu or "bf16': True" in str(torch.cpu.get_capabilities())
        args.dtype = "bfloat16" if able else "float32"


# ------------------------------------------------------------------ files


def once(path: Path, make=None):
    """The content of a run's file. If it is not there, make() makes it, and it appears whole.

    This is all of resuming: a run that was stopped makes what is missing. *.safetensors holds a
    dict of tensors, to which the seconds that it took are added; all else a list, an item a line.
    """
    tensors = path.suffix == ".safetensors"
    if not path.exists():
        print(f"making {path}", file=sys.stderr)
        start = time.perf_counter()
        content = make()
        if tensors:
            seconds = torch.tensor(time.perf_counter() - start)
            data = to_bytes(content | {"seconds": seconds})
        else:
            try:
                lines = [json.dumps(x, allow_nan=False) + "\n" for x in content]
            except ValueError:
                raise UserError(f"{path} would hold what is no number; check the model's weights, "
                                "or try --dtype float32") from None
            data = "".join(lines).encode()
        path.parent.mkdir(exist_ok=True)
        llm.write(path, data)
    try:
        if tensors:
            return load_file(path)
        return [json.loads(line) for line in llm.read_text(path).splitlines() or [""]]
    except (SafetensorError, json.JSONDecodeError) as e:         # [""]: an empty file is damaged
        raise UserError(f"{path} is damaged ({e}); delete it, and it is made again") from None


def rank() -> int:
    """Which of torchrun's processes this one is."""
    return dist.get_rank() if dist.is_initialized() else 0


def once_each(jobs: dict) -> list:
    """`once` of each path: make. Under torchrun, process r of W makes jobs r, r + W, ..."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    for path in list(jobs)[rank()::world]:
        once(path, jobs[path])
    if world > 1:
        dist.barrier()
    return [once(path, make) for path, make in jobs.items()]


@contextlib.contextmanager
def locked(folder: Path):
    """One run at a time in `folder`, which is made; a killed process unlocks it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another process is at work in {folder}: wait for it, or choose another "
                        "--out") from None


def digest(values) -> str:
    """Tells one list from another: 16 hexadecimal digits of the SHA-256 of its items' reprs."""
    total = hashlib.sha256()
    for value in values:
        total.update(repr(value).encode())
    return total.hexdigest()[:16]


# ------------------------------------------------------------------ inputs


@dataclass
class Run:
    """What a run reads. igp.py adds the model's weights."""

    args: argparse.Namespace
    folder: Path             # of the model
    config: llm.Config
    identity: dict           # of the model, see routing.Router
    tokenizer: object
    encoder: object          # the sentence encoder
    train: list[dict]        # texts of Stage 1, each with "text"
    held_out: list[dict]     # texts that judge, each with "text" and "tokens"
    questions: dict          # task -> list of evaluate.Question
    router: routing.Router | None  # of --router
    model: llm.Transformer | None = None


def open_run(args: argparse.Namespace) -> Run:
    """Every input but the weights, cheap checks first; UserError for what does not fit."""
    name, no_texts = hub.resolve(args.model), args.prompt and args.router
    from_hub = [] if args.tasks_dir else [task for task in args.tasks if task in hub.HUB_TASKS]
    hub.check_access(name, "wikipedia" if no_texts else args.calibration, from_hub)
    train, held_out = ([], []) if no_texts else read_texts(args)
    questions = {task: read_task(task, args) for task in args.tasks}
    folder = hub.model_folder(name)
    config = llm.check_weights(folder).config
    check_sparsity(config, args)
    tokenizer = hub.load_tokenizer(folder)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        raise UserError(f"{folder}/tokenizer.json has ids up to {largest}, but vocab_size is "
                        f"{config.vocab_size}: they belong to different models")
    if args.bos == "on":
        args.bos = config.bos_token_id
        if args.bos not in range(config.vocab_size):
            raise UserError(f"--bos on: bos_token_id of {folder}/config.json is {args.bos!r}; use "
                            "--bos auto or off")
    longest = config.max_position_embeddings
    if args.prompt is not None:
        n = len(evaluate.encode(tokenizer, args.prompt, args.bos))
        if not 0 < n <= longest:
            raise UserError(f"--prompt has {n} tokens; give it a text of 1 to {longest}")
    for question in itertools.chain(*questions.values()):
        evaluate.choice_ids(question, tokenizer, args.bos)       # raises where there is no token
    args.length, args.judged = min(args.length, longest), min(args.judged, longest)
    held_out = tokenized(tokenizer, held_out, args.judged)
    if not (held_out or no_texts):
        raise UserError(f"no held-out text of {args.calibration} has two tokens by {folder}")
    encoder_at = hub.encoder_folder()
    identity = {"model": str(name), "files": fingerprints(folder, encoder_at)}
    encoder = routing.open_encoder(encoder_at, args.device, getattr(torch, args.dtype))
    router = given_router(args, identity, config) if args.router else None
    return Run(args, folder, config, identity, tokenizer, encoder, train, held_out, questions,
               router)


def fingerprints(folder: Path, encoder: Path) -> dict[str, str]:
    """What tells one model and encoder from others: the SHA-256 of each file that they are."""
    read = [folder / "config.json", folder / "tokenizer.json", *folder.glob("*.safetensors*")]
    files = {path.name: hub.fingerprint(path) for path in read}
    for path in encoder.rglob("*.safetensors"):
        files[f"encoder's {path.name}"] = hub.fingerprint(path)
    return files


def read_texts(args: argparse.Namespace) -> tuple[list, list]:
    """The texts of --calibration that train, at most --texts, and those that are held out."""
    streamed = args.calibration in hub.HUB_TEXTS
    texts = hub.calibration_texts(args.calibration, args.texts + 2 * hub.JUDGING)
    train, _, held_out = hub.split(texts, streamed)
    train = train[:args.texts]
    if args.clusters > len(train) and "igp" in args.method and not args.router:
        raise UserError(f"--clusters {args.clusters} is more than the {len(train)} texts")
    return train, held_out


def tokenized(tokenizer, texts: list[dict], length: int | None) -> list[dict]:
    """Each text of at least two tokens, with "tokens": their ids, cut to `length`.

    Silent: BOS. Here it is the tokenizer's own habit.
    """
    found = [x | {"tokens": tokenizer.encode(x["text"]).ids[:length]} for x in texts]
    return [x for x in found if len(x["tokens"]) > 1]


def read_task(task: str, args: argparse.Namespace) -> list[evaluate.Question]:
    """The questions of a task; UserError with file, line and field for a row that is none."""
    if task == "wiki_what":
        articles = hub.calibration_texts("wikipedia", None)
        _, _, held_out = hub.split(articles)
        return evaluate.wiki_what(articles, held_out, np.random.default_rng(0))[:args.limit]
    questions = []
    for where, row in hub.task_rows(task, args.tasks_dir, args.limit):
        try:
            questions.append(evaluate.read_row(task, row))
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
    return questions


def check_sparsity(config: llm.Config, args: argparse.Namespace) -> None:
    """UserError where a method cannot skip as much as --sparsity says."""
    spared = [baselines.RIVALS[name][1] for name in args.method if name in baselines.RIVALS]
    n, unit = 2 * config.num_hidden_layers, "blocks"
    if spared or args.granularity == "layer" or args.budget == "flops":
        n, unit = config.num_hidden_layers, "layers"
    most = n - max(spared, default=1)
    skipped = round(n * whole_share(args.sparsity, n))
    if args.method != ["dense"] and not 0 < skipped <= most:
        raise UserError(f"--sparsity {args.sparsity} skips {skipped} of {n} {unit}; 1 to {most} "
                        f"can be skipped by {', '.join(args.method)} (for 0: --method dense)")


def given_router(args: argparse.Namespace, identity: dict, config: llm.Config):
    """The router of --router, if it was made for this model; one made by hand may not say so."""
    router = routing.load(args.router)
    same = router.identity.get("files", identity["files"]) == identity["files"]
    if not same or router.z.shape[1] != 2 * config.num_hidden_layers:
        raise UserError(f"{args.router} was made for {router.identity.get('model')}, and --model "
                        f"{args.model}, or the encoder, is another; give the --model that it was "
                        "made for")
    return router


def begin(run: Run) -> None:
    """Writes arguments.json, or compares with it: UserError where --out holds another run."""
    args = run.args
    now = {key: getattr(args, key) for key in SETTINGS} | run.identity["files"]
    now["what is read"] = digest(run.train + run.held_out)
    now["router"] = args.router and hub.fingerprint(Path(args.router))
    path = args.out / "arguments.json"
    if not path.exists() and (args.out / "masks").exists():
        raise UserError(f"{args.out} holds masks, but no arguments.json that tells of which run; "
                        "choose another --out")
    [[held]] = once_each({path: lambda: [now]})
    for key in held | now:
        if held.get(key) != now.get(key):
            raise UserError(f"{args.out} holds a run with another {key}: {held.get(key)}, now "
                            f"{now.get(key)}; choose another --out, or delete that folder")
