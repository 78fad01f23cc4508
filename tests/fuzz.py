"""Damages valid inputs, one at a time; each must be refused in one line or give a correct result.

Run:  python tests/fuzz.py [number of inputs]    (200 if not given; a minute or two)
Damaged are config.json, safetensors headers and data, the index, tokenizer.json, a router, the
files of a run folder, the rows of a task, calibration texts, and a wheel.
Refused: exit status 2, one line on stderr. Correct: exit status 0 and the perplexity that
transformers computes from the same damaged files; where it cannot read them, or where what was
damaged does not enter the perplexity, that of the undamaged run. A run folder's files hold what was
measured, so that not every damage to them shows: they are only removed, cut short, or overwritten
at the start, and every row must be that of the undamaged run. Every write outside the run folder
and the cache counts as a failure. The models are tiny and made here.
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
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import hub
import igp

COMMAND = ("--model {root}/model --calibration {root}/texts.jsonl --preset demo --clusters 2 "
           "--samples 8 --dtype float32 --method dense --out {root}/out ")
RUN = "--method dense,static,igp --tasks wiki_what --out {root}/run"
TARGETS = {  # kind -> what is damaged, and what more is on the command line
    "config": ("model/config.json", ""),
    "weights": ("model/*.safetensors", ""),
    "index": ("model/model.safetensors.index.json", ""),
    "tokenizer": ("model/tokenizer.json", ""),
    "texts": ("texts.jsonl", ""),
    "router": ("run/router.safetensors",
               "--method dense,igp --router {root}/run/router.safetensors"),
    "run folder": ("run/**/*.[js]*", RUN),
    "rows": ("tasks/*.jsonl", "--tasks-dir {root}/tasks"),
    "leads": ("cache/summaries_en-us.json", "--tasks wiki_what"),
    "wheel": ("some_data-1.0-py3-none-any.whl", "--tasks wiki_what"),
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")

# ---------------------------------------------------------------------------- damage

JUNK = json.loads(r"""[null, true, false, 0, -1, 1, 2, 7, 0.5, 1e-320, 1e308, 1000000000000, NaN,
 "", "x", "llama", "../../x", [], [1], {}, {"rope_type": "yarn"}, "\ud83d"]""")
LINES = ["", "{", "[]", "{}", "[" * 9999, '{"text": 3}', '{"text": ""}',
         r'{"text": "\ud800 w1 w2"}', '{"text": "w1 w2", "more": 1}']


def flip(data, rng, end):
    """A few bytes before `end` replaced, or the tail cut off."""
    if rng.random() < 0.2:
        return data[:rng.randrange(end)]
    flipped = bytearray(data)
    alphabet = rng.choice([b'0159.,"{}[]: wx', range(256)])
    for _ in range(rng.randint(1, 4)):
        flipped[rng.randrange(end)] = rng.choice(alphabet)
    return bytes(flipped)


def edit(value, rng):
    """A JSON value with one of its parts removed or replaced by junk."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    part = value[key]
    if isinstance(part, dict | list) and part and rng.random() < 0.6:
        edit(part, rng)
    elif rng.random() < 0.3:
        del value[key]
    else:
        value[key] = rng.choice(JUNK)
    return value


def damage(path, rng):
    """Rewrites an input."""
    data, dice = path.read_bytes(), rng.random()
    after = flip(data, rng, len(data))
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(data[:8], "little")
        if dice < 0.4:
            header = json.dumps(edit(json.loads(data[8:end]), rng)).encode()
            after = len(header).to_bytes(8, "little") + header + data[end:]
        elif dice < 0.6:
            after = flip(data, rng, end)
    elif path.suffix == ".json" and dice < 0.7:
        after = json.dumps(edit(json.loads(data), rng)).encode()
    elif path.suffix == ".jsonl" and dice < 0.5:
        lines = data.decode().splitlines()
        lines[rng.randrange(len(lines))] = rng.choice(LINES)
        after = "\n".join(lines).encode()
    path.write_bytes(after)


def spoil(path, rng):
    """Cuts a run's file short, or overwrites its first bytes."""
    data = path.read_bytes()
    n = rng.choice([0, data.find(b"\n") + 1, rng.randrange(len(data))])
    after = data[:n]
    if rng.random() < 0.5:
        n = 1 + n % 16
        after = rng.randbytes(n) + data[n:]
    path.write_bytes(after)


# ---------------------------------------------------------------------------- what is right


def perplexity(root, name):
    """transformers' own, on the judging fifth of the texts; of igp under the router's masks."""
    folder = root / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if type(config.get("rms_norm_eps")) is int:                   # transformers wants a float
        config["rms_norm_eps"] = float(config["rms_norm_eps"])
        path.write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    router = load_file(root / "run/router.safetensors") if name == "igp" else {}
    if router:
        encoder = SentenceTransformer(str(hub.encoder_folder()), device="cpu")
        z = torch.ones(router["z"].shape[1])
        hook_gates(model, z)
    texts = []
    for line in (root / "texts.jsonl").read_text(encoding="utf-8").split("\n"):
        if line.strip():
            texts.append(json.loads(line)["text"])
    loss = n = 0
    for text in hub.split([text for text in texts if text.strip()])[2]:
        ids = tokenizer.encode(text).ids[:model.config.max_position_embeddings]
        if router:
            e = encoder.encode([text], convert_to_tensor=True)
            k = torch.cdist(e, router["mu"]).argmin()
            z.copy_(router["z"][k])
        if len(ids) > 1:
            tokens = torch.tensor([ids])
            with torch.no_grad():
                loss += model(tokens, labels=tokens).loss.item() * (len(ids) - 1)
            n += len(ids) - 1
    return math.exp(loss / n)


def rows_of(out):
    """name -> row of a run's results.json, but for what a clock measured."""
    rows = json.loads((out / "results.json").read_text())["rows"]
    return {row["name"]: row | {"seconds": None} for row in rows}


def judge(kind, base, root):
    """Whether a run's result is right, and what was looked at."""
    if kind == "run folder":
        return rows_of(root / "run") == rows_of(base / "run"), "rows as before"
    rows = rows_of(root / "out")
    for name in rows.keys() & {"dense", "igp"}:
        try:
            wanted = perplexity(root, name)
        except BaseException:                                     # transformers cannot read it
            wanted = perplexity(base, name)
        found = rows[name]["ppl"]
        if not math.isclose(found, wanted, rel_tol=1e-4):
            return False, f"{name} {found:.6f}, expected {wanted:.6f}"
    return "dense" in rows, "perplexity as expected"


# ---------------------------------------------------------------------------- runs


def watch():
    """A list that grows by what the process opens for writing, makes, renames or removes."""
    paths = []

    def hook(event, given):
        """An audit event of Python's and its arguments."""
        writes = event == "open" and isinstance(given[0], str) and given[2] & WRITING
        if writes or event in CHANGES:
            paths.append(Path(given[0]).absolute())

    sys.addaudithook(hook)
    return paths


def call(root, more):
    """igp.main's exit status, or the traceback; and its stderr."""
    err = io.StringIO()
    argv = (COMMAND + more).format(root=root).split()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            status = igp.main(argv)
        except BaseException:  # a panic of a Rust library is not an Exception
            status = traceback.format_exc()
    return status, err.getvalue()


def one(kind, base, root, rng, written):
    """An outcome, and what happened, for one damaged copy of base in root; written: of `watch`."""
    shutil.copytree(base, root)
    hub.CACHE = root / "cache"
    pattern, more = TARGETS[kind]
    path = rng.choice(sorted(root.glob(pattern)))
    what = f"{kind}: {path.name}"
    if rng.random() < 0.08:
        path.unlink()
    elif kind == "run folder":
        spoil(path, rng)
    else:
        damage(path, rng)
    if kind == "wheel":                                           # put there by hand, not unpacked
        (hub.CACHE / "summaries_en-us.json").unlink()
        if path.exists():
            path.rename(hub.CACHE / path.name)
    written.clear()
    status, err = call(root, more)
    allowed = (root / "out", root / "run", hub.CACHE, Path(os.devnull))
    for path in written:
        if not any(path.is_relative_to(x) for x in allowed):
            return "FAILED", f"{what}: wrote {path}"
    if status == 2 and err.count("igp.py: error: ") == 1 and "Traceback" not in err:
        return "refused", what
    if status == 0:
        right, found = judge(kind, base, root)
        return "correct" if right else "FAILED", f"{what}: {found}"
    return "FAILED", f"{what}: {status} {err}"


def make_base(root):
    """Every input undamaged, a finished run, and a wheel with the leads, which hub.WHEELS names."""
    hub.CACHE = make_home(root)
    wheel = root / TARGETS["wheel"][0]
    with zipfile.ZipFile(wheel, "w") as z:
        z.write(hub.CACHE / "summaries_en-us.json", "data/leads.json")
    sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    hub.WHEELS["wikipedia"] = ("some-data", "1.0", sha256, "data/leads.json",
                               "summaries_en-us.json")
    status, err = call(root, RUN)
    assert status == 0, err


def main():
    """Prints every failure and a count by kind; returns 1 if there is a failure."""
    [n] = map(int, sys.argv[1:] or [200])
    written, counts = watch(), Counter()
    os.environ["PIP_NO_INDEX"] = "1"                              # a wheel that is gone stays so
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        base, copy = root / "base", root / "copy"
        make_base(copy)
        copy.rename(base)
        for i in range(n):
            kind = list(TARGETS)[i % len(TARGETS)]
            outcome, what = one(kind, base, copy, random.Random(i), written)
            shutil.rmtree(copy)
            counts.update([outcome, f"{kind}: {outcome}"])
            if outcome == "FAILED":
                print(f"{i} {outcome}: {what}", flush=True)
    for what, count in sorted(counts.items()):
        print(f"{count:5} {what}")
    good = n - counts["FAILED"]
    print(f"{good} of {n} damaged inputs were refused in one line or gave a correct result")
    return int(good < n)


if __name__ == "__main__":
    sys.exit(main())
