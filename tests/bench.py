"""Speed against peers: both sides interleaved in one run, on one machine, in one dtype.

Run:  python tests/bench.py [forward training kmeans encoding prefill decode router] [--json FILE]
      python tests/bench.py prefill-1b decode-1b          (minutes; 5 GB of weights alone)
      python tests/bench.py scoring --tasks-dir FOLDER    (needs lm-eval==0.4.13 and accelerate)
Sets: forward and training on a random model of SmolLM2-135M's shape against transformers;
      kmeans against scikit-learn; encoding in bf16 against float32 on the embedded default;
      prefill and decode: the embedded default, or a random model of Llama-3.2-1B's shape, dense
      against transformers, and under masks against the same model built without those blocks;
      router: encoding a prompt, as a share of the embedded default's dense prefill of it;
      scoring, 200 rows of each of the six tasks on the embedded default, against
      lm-evaluation-harness at the best of four batch sizes.
Ratio is the median of ours / peer over the interleaved turns; spread is the range of the middle
half of those ratios. Run nothing beside it.
"""
import argparse
import functools
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from conftest import hook_gates  # which also finds the modules below
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import hub
import igp
import kmeans
import model as llm
import router as routing
from hardconcrete import lagrangian, sample_u, sample_z

SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
           "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
           "head_dim": 64, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
           "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
LLAMA_1B = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0,
                                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                "original_max_position_embeddings": 8192}}
LLAMA_8B = llm.Config("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, 5e5, None, False,
                      ())
PROMPTS = (32, 128, 512)                # tokens
SKIPPED = ((6, 2), (12, 4), (15, 7))    # of 30 and 30 attention and FFN blocks: 8, 16, 22 of 60
STEPS = 16                              # tokens decoded in one measurement
b, w = 8, 96  # sequences and tokens of a forward and of a training step
REPEATS = 15


def interleaved(runs: list, repeats: int) -> np.ndarray:
    """Seconds (repeats, n) of n callables in turn, every other time in reverse."""
    seconds = np.zeros((repeats + 2, len(runs)))
    for i in range(len(seconds)):
        for j in list(range(len(runs)))[::1 if i % 2 else -1]:
            start = time.perf_counter()
            runs[j]()
            seconds[i, j] = time.perf_counter() - start
    return seconds[2:]                                            # the first two warm up


def compared(ours: np.ndarray, peer: np.ndarray) -> tuple[float, float, float, float]:
    """Median seconds of ours and peer, median and spread of ours / peer in the same turn."""
    ratio = ours / peer
    low, high = np.quantile(ratio, (0.25, 0.75))
    return (float(np.median(ours)), float(np.median(peer)), float(np.median(ratio)),
            float(high - low))


def paired(ours, peer, repeats: int = REPEATS) -> tuple[float, float, float, float]:
    """`compared` of two callables."""
    return compared(*interleaved([ours, peer], repeats).T)


def row(name: str, unit: str, goal: float | None, measured: tuple, better: str = "less") -> dict:
    """One line of the table and of --json; measured is (ours, peer) or what `paired` returns."""
    ours, peer, ratio, spread = measured if len(measured) == 4 else (
        *measured, measured[0] / measured[1], 0.0)
    return {"name": name, "ours": float(ours), "peer": float(peer), "unit": unit,
            "ratio": float(ratio), "spread": float(spread), "goal": goal, "better": better}


def both_models(dtype: torch.dtype, sizes: dict = SMOLLM2):
    """(ours, transformers' with sdpa), with the same random weights, in memory once."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=True, attn_implementation="sdpa")
    reference = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        config.save_pretrained(folder)
        ours = llm.Transformer(llm.read_config(folder))
    names = ours.state_dict()
    ours.load_state_dict({k: x for k, x in reference.state_dict().items() if k in names},
                         assign=True)
    return ours.eval().requires_grad_(False), reference


def embedded_models(dtype: torch.dtype):
    """(ours, transformers' with sdpa) of the embedded default."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    folder = hub.model_folder(hub.EMBEDDED)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return llm.load(folder, "cpu", dtype), reference.eval().requires_grad_(False)


def z_of(L: int, attention: int, ffn: int) -> torch.Tensor:
    """A z that skips so many blocks of 30 and 30, scaled to L layers, spread over the depth."""
    z = torch.ones(L, 2, dtype=torch.bool)
    for column, n in enumerate((attention, ffn)):
        n = round(n * L / 30)
        z[(torch.arange(n) + 0.5).mul(L / n).long(), column] = False
    return z.flatten()


def built_without(model: llm.Transformer, z: torch.Tensor, longest: int):
    """The same weights as a chain of the kept blocks alone: run(tokens, start) -> logits (v,)."""
    chain = []
    for i, layer in enumerate(model.model.layers):
        if z[2 * i]:
            shape = (2, 1, model.config.num_key_value_heads, longest, model.config.head_dim)
            kv = torch.empty(shape, dtype=llm.score_dtype(model.head_weight))
            chain.append((layer.input_layernorm, layer.self_attn, kv))
        if z[2 * i + 1]:
            chain.append((layer.post_attention_layernorm, layer.mlp, None))

    @torch.inference_mode()
    def run(tokens: torch.Tensor, start: int) -> torch.Tensor:
        x = model.model.embed_tokens(tokens)
        rope = llm.rope_angles(model.config, torch.arange(start, start + tokens.shape[1]))
        for norm, block, kv in chain:
            x = x + (block(norm(x)) if kv is None else block(norm(x), rope, None, kv, start))
        return model.head(model.model.norm(x)[0, -1])

    return run


def cached(model: llm.Transformer, z: torch.Tensor | None, longest: int):
    """Our forward: run(tokens, start) -> logits (v,) of the last; start tokens are in the cache."""
    cache = model.new_cache(1, longest, z)

    @torch.inference_mode()
    def run(tokens: torch.Tensor, start: int) -> torch.Tensor:
        cache.length = start
        return model.head(model(tokens, z, cache)[0, -1])

    return run


def cached_by_transformers(reference):
    """The same with transformers' DynamicCache, as its own generate uses it."""
    from transformers import DynamicCache
    state = {}

    @torch.inference_mode()
    def run(tokens: torch.Tensor, start: int) -> torch.Tensor:
        if start == 0:
            state["cache"] = DynamicCache()
        elif (n := state["cache"].get_seq_length()) > start:
            state["cache"].crop(start - n)                        # minus the tokens to forget
        return reference(tokens, past_key_values=state["cache"], logits_to_keep=1).logits[0, -1]

    return run


def skipping(kind: str, shape: str, dtype: torch.dtype):
    """prefill: a prompt's forward and its last logits; decode: STEPS tokens after it, one by one.

    Dense against transformers, each mask against `built_without` and against dense, all in turn.
    """
    large = shape == "llama-1b"
    model, reference = both_models(dtype, LLAMA_1B) if large else embedded_models(dtype)
    for n in PROMPTS:
        tokens, name = torch.randint(20, 40000, (1, n + STEPS)), f"{kind} {shape} {n}"
        zs = [z_of(model.config.num_hidden_layers, *skipped) for skipped in SKIPPED]
        sides = []  # transformers, with weights of its own, stands beside dense only
        for z in zs:
            sides += cached(model, z, n + STEPS), built_without(model, z, n + STEPS)
        sides += cached(model, None, n + STEPS), cached_by_transformers(reference)
        for run in sides:
            run(tokens[:, :n], 0)                                 # what decode goes on from

        def timed(run, n=n, tokens=tokens):
            """What is measured of a side."""
            if kind == "prefill":
                return lambda: run(tokens[:, :n], 0)
            return lambda: [run(tokens[:, i:i + 1], i) for i in range(n, n + STEPS)]

        seconds = interleaved([timed(run) for run in sides], 3 if large else 7)
        yield row(name, "s", 1.05, compared(*seconds[:, -2:].T))
        for i, z in enumerate(zs):
            what = f"{name}, {int((~z).sum())} of {len(z)} skipped"
            yield row(f"{what}, of built without", "s", 1.03,
                      compared(*seconds[:, 2 * i:2 * i + 2].T))
            share = llm.flops(model.config, n, z) / llm.flops(model.config, n)
            yield row(f"{what}, of dense (FLOPs {share:.3f})", "s", None,
                      compared(seconds[:, 2 * i], seconds[:, -2]))


def router_share(dtype: torch.dtype):
    """Eq. 1 and 9 of a text against its dense prefill; and in FLOPs against an 8B model's."""
    folder, path = hub.encoder_folder(), hub.model_folder(hub.EMBEDDED)
    encoder, tokenizer = routing.open_encoder(folder, "cpu", dtype), hub.load_tokenizer(path)
    model, text = llm.load(path, "cpu", dtype), " ".join(
        x["text"] for x in hub.calibration_texts("wikipedia", None)[:20])
    router = routing.Router(torch.randn(16, 384), torch.ones(16, 60).bool(), torch.ones(16, 60), {})
    for n in PROMPTS:
        ids = tokenizer.encode(text).ids[:n]
        words, run = tokenizer.decode(ids), cached(model, None, n)
        yield row(f"router, of prefill smollm2 {n}", "s", None, paired(
            lambda words=words: routing.route(router, routing.encode(encoder, [words])),
            lambda run=run, ids=ids: run(torch.tensor([ids]), 0)))
        yield row(f"router, of Meta-Llama-3-8B {n}", "FLOP", None,
                  (routing.encoder_flops(folder, n), llm.flops(LLAMA_8B, n)))


def both_steps(ours: llm.Transformer, reference, generator: torch.Generator):
    """A training step of igp.train_mask, and the same on transformers with hooks, full logits."""
    args = argparse.Namespace(lr=0.1, lr_lambda=0.1, gate="paper", sparsity=0.25)
    mask, texts = igp.new_mask(torch.ones(60), args, "bench"), torch.randint(20, 49152, (b, w))
    peer = igp.new_mask(torch.ones(60), args, "peer")
    gates = torch.ones(b, 60, dtype=ours.head_weight.dtype)
    hook_gates(reference, gates)  # reads `gates` at every call

    def step():
        igp.train_mask(ours, mask, [(texts.tolist(), 1.0)], args, generator)

    def peer_step():
        z = sample_z(peer["log_alpha"], sample_u((b, 60), generator), "paper")
        L_s = lagrangian(1 - z.mean(), args.sparsity, *peer["lambdas"])
        gates.detach_().copy_(z)  # in the graph, so that the hooks' gradients reach z
        logits = reference(texts, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())
        peer["adam"].zero_grad()
        (loss + L_s).backward()
        peer["adam"].step()

    return step, peer_step


def forward(dtype: torch.dtype):
    """Logits of all positions, dense."""
    ours, reference = both_models(dtype)
    tokens = torch.randint(20, 49152, (b, w))

    @torch.inference_mode()
    def run():
        ours.head(ours(tokens))

    @torch.inference_mode()
    def peer():
        reference(tokens, use_cache=False)

    yield row(f"forward {b} x {w}", "s", 1.05, paired(run, peer))


def training(dtype: torch.dtype):
    """A mask training step: time, share of the machine's matmul rate, memory of its tensors."""
    ours, reference = both_models(dtype)
    step, peer = both_steps(ours, reference, torch.Generator().manual_seed(0))
    yield row(f"training step {b} x {w}", "s", 0.95, paired(step, peer))
    yield row("training, peak of its tensors", "MiB", 0.6,
              (peak_bytes(step) / 2**20, peak_bytes(peer) / 2**20))

    x = torch.ones(4096, 4096, dtype=dtype)
    with FlopCounterMode(display=False) as counted:
        step()
    flops = np.array([counted.get_total_flops(), 2 * len(x) ** 3])
    step_s, matmul_s, ratio, spread = paired(step, lambda: x @ x)
    share = flops[0] / flops[1] / ratio
    yield row("training, of the matmul rate", "GFLOP/s", 0.6,
              (*flops / (step_s, matmul_s) / 1e9, share, share * spread / ratio), "more")


def peak_bytes(step) -> int:
    """Most bytes that the tensors made by a step hold at once (weights not counted)."""
    with torch.profiler.profile(profile_memory=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return int(np.cumsum([e.nbytes() for e in events]).max())


def clustering(_):
    """Lloyd's from the same starts, M = 20,000, d_e = 384, N = 16, on blobs of unit length."""
    from sklearn.cluster import KMeans
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 384))
    e = centres[rng.integers(40, size=20_000)] + 1.5 * rng.normal(size=(20_000, 384))
    e = (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32)
    mu = kmeans.plus_plus(e, 16, rng)
    peer = KMeans(16, init=mu, n_init=1, algorithm="lloyd", tol=0, max_iter=300)
    times = paired(lambda: kmeans.lloyd(e, mu), lambda: peer.fit(e))
    yield row("kmeans, inertia", "sum", 1.001, (kmeans.lloyd(e, mu)[2], peer.inertia_))
    yield row("kmeans, time", "s", 1.5, times)


def encoding(dtype: torch.dtype):
    """Eq. 1 in the run's dtype against float32, and how many nearest centroids it changes."""
    folder = hub.encoder_folder()
    texts = [x["text"] for x in hub.calibration_texts("wikipedia", None)[:1000]]
    encoders = [routing.open_encoder(folder, "cpu", kind) for kind in (dtype, torch.float32)]
    runs = [lambda encoder=encoder: routing.encode(encoder, texts[:250]) for encoder in encoders]
    yield row(f"encoding in {dtype}, of float32", "s", 1.0, paired(*runs, repeats=5))
    fast, exact = (routing.encode(encoder, texts) for encoder in encoders)
    for N in (4, 16):
        mu, labels, _ = kmeans.kmeans(exact, N, np.random.default_rng(0), igp.RESTARTS)
        changed = (kmeans.nearest(fast, mu)[0] != labels).sum()
        yield row(f"encoding, changed centroids of N = {N}", "texts", 0.01, (changed, len(texts)))


def harness(folder: Path, dtype: torch.dtype, limit: int):
    """lm-evaluation-harness: (its model on the embedded default, task -> its requests)."""
    from golden.regenerate import read_rows_from
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    read_rows_from(folder, limit)
    path = hub.model_folder(hub.EMBEDDED)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"),
                                        eos_token="<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    lm, requests = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu"), {}
    tasks = TaskManager().load(list(hub.HUB_TASKS))["tasks"]
    for name, task in tasks.items():
        task.build_all_requests(rank=0, world_size=1)
        requests[name] = task.instances
    return lm, requests


def scoring(dtype: torch.dtype, folder: Path | None, limit: int = 200):
    """log-likelihoods of all choices, tokenising included; a task of ours, then one of theirs."""
    if folder is None:
        raise SystemExit("bench.py: error: scoring needs --tasks-dir FOLDER with <task>.jsonl")
    lm, requests = harness(folder, dtype, limit)
    path = hub.model_folder(hub.EMBEDDED)
    model, tokenizer = llm.load(path, "cpu", dtype), hub.load_tokenizer(path)
    questions = {task: [evaluate.read_row(task, x) for _, x in
                        hub.task_rows(task, str(folder), limit)] for task in requests}
    few, best = [x for task in requests.values() for x in task[::12]], {}
    for size in (8, 16, 32, 64):
        lm.batch_size_per_gpu = size
        start = time.perf_counter()
        lm.loglikelihood(few, disable_tqdm=True)
        best[size] = time.perf_counter() - start
    lm.batch_size_per_gpu = min(best, key=best.get)
    seconds, same, n = np.zeros(2), 0, sum(map(len, questions.values()))
    for task, theirs in requests.items():
        start = time.perf_counter()
        ours = evaluate.score(model, tokenizer, questions[task], None, "auto")
        middle = time.perf_counter()
        peer = np.array([x for x, _ in lm.loglikelihood(theirs, disable_tqdm=True)])
        seconds += middle - start, time.perf_counter() - middle
        peer = np.split(peer, np.cumsum([len(x) for x in ours])[:-1])
        same += sum(evaluate.right(q, a) == evaluate.right(q, b) for q, a, b in
                    zip(questions[task], ours, peer, strict=True))
    yield row(f"scoring, batch size of the peer {lm.batch_size_per_gpu}", "rows/s", 1.8,
              tuple(n / seconds), "more")
    yield row("scoring, rows with equal acc and acc_norm", "rows", 0.95, (same, n), "more")


PARTS = {"forward": forward, "training": training, "kmeans": clustering, "encoding": encoding,
         "prefill": functools.partial(skipping, "prefill", "smollm2"),
         "decode": functools.partial(skipping, "decode", "smollm2"), "router": router_share,
         "prefill-1b": functools.partial(skipping, "prefill", "llama-1b"),
         "decode-1b": functools.partial(skipping, "decode", "llama-1b"), "scoring": scoring}
LONG = ("prefill-1b", "decode-1b", "scoring")  # only if asked for


def main() -> None:
    """Prints a Markdown table, with the goals that are missed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    p.add_argument("--json", type=Path, help="one object a line into this file")
    p.add_argument("--tasks-dir", type=Path, help="for scoring: folder with <task>.jsonl")
    args = p.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        p.error(f"{', '.join(sorted(unknown))}: expected of {', '.join(PARTS)}")
    dtype, lines = getattr(torch, igp.best_dtype("cpu")), []
    print(f"{dtype}, {torch.get_num_threads()} threads\n", flush=True)
    print("| what | ours | peer | unit | ratio | spread | goal |\n" + "| --- " * 7 + "|")
    for part in args.parts or [part for part in PARTS if part not in LONG]:
        more = (args.tasks_dir,) if part == "scoring" else ()
        for line in PARTS[part](dtype, *more):
            sign = "<=" if line["better"] == "less" else ">="
            goal = "-" if line["goal"] is None else f"{sign} {line['goal']}"
            met = goal == "-" or (line["ratio"] <= line["goal"] if sign == "<="
                                  else line["ratio"] >= line["goal"])
            print(f"| {line['name']} | {line['ours']:.4g} | {line['peer']:.4g} | {line['unit']} | "
                  f"{line['ratio']:.3f} | {line['spread']:.3f} | {goal}"
                  f"{'' if met else ', missed'} |", flush=True)
            lines.append(json.dumps(line) + "\n")
            if args.json:
                args.json.write_text("".join(lines))


if __name__ == "__main__":
    main()
