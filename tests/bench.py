"""Speed against peers: both sides interleaved in one run, on one machine, in one dtype.

Run:  python tests/bench.py [forward training kmeans prefill decode]
      python tests/bench.py scoring --tasks-dir FOLDER    (needs lm-eval==0.4.13 and accelerate)
Sets: forward and training on a random model of SmolLM2-135M's shape against transformers;
      kmeans against scikit-learn;
      prefill and decode: the embedded default, dense against transformers, and under masks
      against the same model built without those blocks;
      scoring, 200 rows of each of the six tasks on the embedded default, against
      lm-evaluation-harness at the best of four batch sizes.
Ratio is the median of ours / peer over the interleaved turns; spread is the range of the middle
half of those ratios. Run nothing beside it.
"""
import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from conftest import hook_gates  # which also finds the modules below

import evaluate
import hub
import igp
import kmeans
import model as llm
from run import parse

SMOLLM2 = json.loads("""{
 "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
 "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
 "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
 "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}""")
PROMPTS = (32, 128, 512)                # tokens
SKIPPED = ((6, 2), (12, 4), (15, 7))    # of 30 and 30 attention and FFN blocks: 8, 16, 22 of 60
STEPS = 16                              # tokens decoded in one measurement
CLOSED = 7                              # gates of 60 that no text opens, in the mean of a training
ROWS = 200                              # scored of each task
BATCH_SIZES = (8, 16, 32, 64)           # of lm-evaluation-harness
b, w = 8, 96                            # sequences and tokens of a forward, of a training step
REPEATS = 15

# ---------------------------------------------------------------------------- measuring


def interleaved(runs, repeats):
    """Seconds (n, repeats) of n callables in turn, every other time in reverse."""
    seconds = np.zeros((len(runs), repeats + 2))
    turn = list(range(len(runs)))
    for i in range(repeats + 2):
        turn.reverse()
        for j in turn:
            start = time.perf_counter()
            runs[j]()
            seconds[j, i] = time.perf_counter() - start
    return seconds[:, 2:]                                         # the first two warm up


def row(what, unit, goal, ours, peer):
    """A line of the table. ours and peer: one number each, or one of every turn."""
    ratio = np.divide(ours, peer)
    low, middle, high = np.quantile(ratio, (0.25, 0.5, 0.75))
    missed = ", missed" if goal and middle > goal else ""
    return {
        "what": what,
        "ours": f"{np.median(ours):.4g}",
        "peer": f"{np.median(peer):.4g}",
        "unit": unit,
        "ratio": f"{middle:.3f}",
        "spread": f"{high - low:.3f}",
        "goal: at most": f"{goal or '-'}{missed}",
    }


def peak_bytes(step):
    """Most bytes that the tensors made by a step hold at once (weights not counted)."""
    with torch.profiler.profile(profile_memory=True) as profiled:
        step()
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    _, sizes = np.transpose(sorted(changes))
    return sizes.cumsum().max()


# ---------------------------------------------------------------------------- models


def random_models(dtype):
    """(ours, transformers' with sdpa), with the same random weights, in memory once."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(**SMOLLM2, tie_word_embeddings=True, attn_implementation="sdpa")
    reference = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        config.save_pretrained(folder)
        ours = llm.Transformer(llm.read_config(folder))
    weights = reference.state_dict()
    weights.pop("lm_head.weight")                                 # the embedding's other name
    ours.load_state_dict(weights, assign=True)
    return ours.eval().requires_grad_(False), reference


def embedded_models(dtype):
    """(ours, transformers' with sdpa) of the embedded default."""
    from transformers import LlamaForCausalLM
    folder = hub.model_folder(hub.EMBEDDED)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return llm.load(folder, "cpu", dtype), reference.eval().requires_grad_(False)


def z_of(attention, ffn):
    """A z that skips so many blocks of 30 and 30, spread over the depth."""
    z = torch.ones(30, 2, dtype=torch.bool)
    for column, n in enumerate((attention, ffn)):
        z[(torch.arange(n) + 0.5).mul(30 / n).long(), column] = False
    return z.flatten()


def built_without(model, z, longest):
    """The same weights as a chain of the kept blocks alone: run(tokens, start) -> logits (v,)."""
    chain, cache = [], model.new_cache(1, longest, z)
    for i, layer in enumerate(model.model.layers):
        if z[2 * i]:
            chain.append((layer.input_layernorm, layer.self_attn, cache.kv[i]))
        if z[2 * i + 1]:
            chain.append((layer.post_attention_layernorm, layer.mlp, None))

    @torch.inference_mode()
    def run(tokens, start):
        x = model.model.embed_tokens(tokens)
        rope = llm.rope_angles(model.config, torch.arange(start, start + tokens.shape[1]))
        for norm, block, kv in chain:
            more = () if kv is None else (rope, None, kv, start)
            x = x + block(norm(x), *more)
        return model.head(model.model.norm(x)[0, -1])

    return run


def cached(model, z, longest):
    """Our forward: run(tokens, start) -> logits (v,) of the last; start tokens are in the cache."""
    cache = model.new_cache(1, longest, z)

    @torch.inference_mode()
    def run(tokens, start):
        cache.length = start
        return model.head(model(tokens, z, cache)[0, -1])

    return run


def cached_by_transformers(reference):
    """The same with transformers' DynamicCache, as its own generate uses it."""
    from transformers import DynamicCache
    cache = DynamicCache()

    @torch.inference_mode()
    def run(tokens, start):
        nonlocal cache
        more = cache.get_seq_length() - start
        if start == 0:
            cache = DynamicCache()
        elif more > 0:
            cache.crop(-more)                                     # tokens to forget
        return reference(tokens, past_key_values=cache, logits_to_keep=1).logits[0, -1]

    return run


# ---------------------------------------------------------------------------- parts


def forward(args):
    """Logits of all positions, dense."""
    ours, reference = random_models(args.dtype)
    tokens = torch.randint(20, 49152, (b, w))

    runs = [lambda: ours.head(ours(tokens)), partial(reference, tokens, use_cache=False)]
    with torch.inference_mode():
        seconds = interleaved(runs, REPEATS)
    yield row(f"forward {b} x {w}", "s", 1.03, *seconds)


def training(args):
    """L_LM and its gradient by z, which is all but a thousandth of a training step.

    The peer is transformers with a hook on every block, and logits as a whole.
    """
    ours, reference = random_models(args.dtype)
    texts = torch.randint(20, 49152, (b, w))
    z = torch.rand(b, 60)
    gates = torch.ones(b, 60, dtype=args.dtype)
    hook_gates(reference, gates)                                  # reads `gates` at every call
    step = partial(igp.lm_gradient, ours, texts.tolist(), z, b)

    def peer():
        leaf = z.clone().requires_grad_()
        gates.detach_().copy_(leaf)                               # the hooks' gradients reach leaf
        logits = reference(texts, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())
        loss.backward()

    name = f"training step {b} x {w}"
    yield row(f"{name}, peak of its tensors", "bytes", 0.5, peak_bytes(step), peak_bytes(peer))
    yield row(f"{name}, all gates open", "s", None, *interleaved([step, peer], REPEATS))
    z[:, torch.arange(CLOSED) * 60 // CLOSED] = 0
    yield row(f"{name}, {CLOSED} of 60 closed", "s", 0.80, *interleaved([step, peer], REPEATS))


def clustering(_):
    """Lloyd's from the same starts, M = 20,000, d_e = 384, N = 16, on blobs of unit length."""
    from sklearn.cluster import KMeans
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, 384))
    e = centres[rng.integers(40, size=20_000)] + 1.5 * rng.normal(size=(20_000, 384))
    e = (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32)
    mu = kmeans.plus_plus(e, 16, rng)
    peer = KMeans(16, init=mu, n_init=1, tol=0)
    runs = [partial(kmeans.lloyd, e, mu), partial(peer.fit, e)]
    yield row("kmeans, time", "s", 1.5, *interleaved(runs, REPEATS))
    _, _, inertia = kmeans.lloyd(e, mu)
    yield row("kmeans, inertia", "sum", 1.001, inertia, peer.inertia_)


def skipping(kind, args):
    """prefill: a prompt's forward and its last logits; decode: STEPS tokens after it, one by one.

    Dense against transformers, each mask against `built_without` and against dense, all in turn.
    """
    model, reference = embedded_models(args.dtype)
    zs = [z_of(*skipped) for skipped in SKIPPED]

    def work(run, n, tokens):
        """What is measured of a side."""
        if kind == "prefill":
            run(tokens[:, :n], 0)
        else:
            for i in range(n, n + STEPS):
                run(tokens[:, i:i + 1], i)

    for n in PROMPTS:
        longest = n + STEPS
        tokens = torch.randint(20, 40000, (1, longest))
        sides = [cached(model, None, longest), cached_by_transformers(reference)]
        for z in zs:
            sides += [cached(model, z, longest), built_without(model, z, longest)]
        for run in sides:
            run(tokens[:, :n], 0)                                 # what decode goes on from
        runs = [partial(work, run, n, tokens) for run in sides]
        dense, peer, *pruned = interleaved(runs, REPEATS // 2)
        name = f"{kind} {n}"
        yield row(name, "s", 1.05, dense, peer)
        for z, ours, chain in zip(zs, pruned[0::2], pruned[1::2], strict=True):
            what = f"{name}, {int((~z).sum())} of {len(z)} skipped"
            yield row(f"{what}, of built without", "s", 1.03, ours, chain)
            share = llm.flops(model.config, n, z) / llm.flops(model.config, n)
            yield row(f"{what}, of dense (FLOPs {share:.3f})", "s", None, ours, dense)


def harness(reference, folder):
    """lm-evaluation-harness: (its wrapped model, task -> its requests)."""
    from golden.regenerate import read_rows_from
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerFast
    read_rows_from(folder, ROWS)
    file = hub.model_folder(hub.EMBEDDED) / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|im_end|>")
    lm = HFLM(pretrained=reference, tokenizer=tokenizer, device="cpu")
    tasks, requests = TaskManager().load(list(hub.HUB_TASKS))["tasks"], {}
    for name, task in tasks.items():
        task.build_all_requests(rank=0, world_size=1)
        requests[name] = task.instances
    few = [x for task in requests.values() for x in task[::12]]
    seconds = []
    for lm.batch_size_per_gpu in BATCH_SIZES:
        start = time.perf_counter()
        lm.loglikelihood(few, disable_tqdm=True)
        seconds.append(time.perf_counter() - start)
    lm.batch_size_per_gpu = BATCH_SIZES[np.argmin(seconds)]
    return lm, requests


def scoring(args):
    """log-likelihoods of all choices, tokenising included; a task of ours, then one of theirs."""
    if args.tasks_dir is None:
        raise SystemExit("bench.py: error: scoring needs --tasks-dir FOLDER with <task>.jsonl")
    model, reference = embedded_models(args.dtype)
    tokenizer = hub.load_tokenizer(hub.model_folder(hub.EMBEDDED))
    lm, requests = harness(reference, args.tasks_dir)
    seconds, other, n = np.zeros(2), 0, 0
    for task, theirs in requests.items():
        rows = hub.task_rows(task, args.tasks_dir, ROWS)
        questions = [evaluate.read_row(task, x) for _, x in rows]
        start = time.perf_counter()
        ours = evaluate.score(model, tokenizer, questions, None, "auto")
        middle = time.perf_counter()
        peer = lm.loglikelihood(theirs, disable_tqdm=True)
        seconds += middle - start, time.perf_counter() - middle
        values = iter(peer)
        for question, x in zip(questions, ours, strict=True):
            y = np.array([next(values)[0] for _ in x])
            other += evaluate.right(question, x) != evaluate.right(question, y)
        n += len(questions)
    what = f"scoring, batch size of the peer {lm.batch_size_per_gpu}"
    yield row(what, "s", 0.476, *seconds)                         # 2.1 times as fast
    yield row("scoring, rows with another acc or acc_norm", "rows", 0.05, other, n)


PARTS = {
    "forward": forward,
    "training": training,
    "kmeans": clustering,
    "prefill": partial(skipping, "prefill"),
    "decode": partial(skipping, "decode"),
    "scoring": scoring,  # only if asked for
}


def main():
    """Prints a Markdown table, with the goals that are missed."""
    short = list(PARTS)[:-1]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("parts", nargs="*", default=short, help=", ".join(PARTS))
    p.add_argument("--tasks-dir", type=Path, help="for scoring: folder with <task>.jsonl")
    args = p.parse_args()
    if not set(args.parts) <= set(PARTS):
        p.error(f"{' '.join(args.parts)}: expected of {', '.join(PARTS)}")
    args.dtype = getattr(torch, parse(["--device", "cpu"]).dtype)
    print(f"{args.dtype}, {torch.get_num_threads()} threads\n", flush=True)
    first = 0                                                     # the table's head, once
    for part in args.parts:
        for line in PARTS[part](args):
            table = evaluate.markdown([line]).splitlines()
            print("\n".join(table[first:]), flush=True)
            first = 2


if __name__ == "__main__":
    main()
