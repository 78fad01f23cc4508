"""Rival depth pruning: SLEB, Shortened LLaMA, EvoPress; each returns one z for every input.

Source: SLEB (Song et al. 2024, arXiv:2402.09025), Shortened LLaMA (Kim et al. 2024,
        arXiv:2402.02834), EvoPress (Sieberling et al. 2024, arXiv:2410.14649), constants and
        order of steps from their published code.
Left out: retraining after pruning; every other method that these three compare with.
Dims:   L layers, B = 2L blocks, k = floor(sparsity L + 1/2) layers to drop; n windows of texts, or
        positions; t tokens, d width, v vocabulary. Scores and losses are float32 sums or means.
        z = 1 keeps a block, 0 skips it. A rival returns (z boolean (B,), forward tokens spent).
Deviates: the paper calibrates every rival on WikiText-2. Here all methods share --calibration, so
        that texts do not decide between them (its Table 4); --calibration wikitext2 is the paper's.
"""
import itertools
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import evaluate
from model import Transformer

# A search may spend this many times the forward tokens of IG-Pruning's masks together (a training
# step is two forwards of its tokens). One that would spend more is scaled down; None: as published.
# Deviates: the paper gives each rival what its authors gave it.
CAP = 1
SLEB = (4, 2048)        # windows, tokens of each: 128 lines of WikiText-2 give about four
SHORTENED = (10, 128)   # its calibration samples
PLUS = (0, 1, 2, 3, -2, -1)  # its "+" rule: layers never dropped, whatever the criterion
EVOPRESS = (16, 8192)   # its calibration set of 131,072 tokens
STARTS, START_TOKENS = 64, 2048            # random first states, and the tokens that choose of them
OFFSPRING, SURVIVORS, STAGE_TOKENS = 32, (2, 1), (2048, 32768)  # of a generation


@dataclass(frozen=True)
class Search:
    """What every rival is given."""

    model: Transformer
    texts: list         # of lists of token ids, in random order
    k: int              # layers to drop
    tied: bool          # EvoPress: whole layers, instead of k attention and any k FFN blocks
    cap: int | None     # forward tokens
    generator: np.random.Generator


def windows(search: Search, n: int, length: int) -> list[list[int]]:
    """The first n windows of `length` tokens of the joined texts; shorter ones if there is less.

    Deviates: SLEB's code puts an empty line between texts, Shortened LLaMA's draws a document and
    an offset for each sample, EvoPress's fills windows with documents. One rule is enough here.
    Raises ValueError for fewer than two tokens a window.
    """
    joined = sum(search.texts[:n * length], [])[:n * length]
    length = min(length, len(joined) // n, search.model.config.max_position_embeddings)
    if length < 2:
        raise ValueError(f"--calibration has {len(joined)} tokens; {n} windows need {2 * n}")
    return [joined[i * length:(i + 1) * length] for i in range(n)]


def without(z: Tensor, layers: list[int]) -> Tensor:
    """z (B,) with both blocks of these layers skipped."""
    z = z.clone()
    z.view(-1, 2)[layers] = False
    return z


def sleb(search: Search) -> tuple[Tensor, int]:
    """k times: drop the layer whose loss is lowest when it is gone too; first minimum wins.

    The first and the last layer that are left are never candidates, so k <= L - 2.
    The criterion is language-model loss; IG-Pruning's Sec. 4.1 says cosine similarity, which
    SLEB's code does not use.
    """
    model, (n, length) = search.model, SLEB
    L, z = model.config.num_hidden_layers, torch.ones(model.B, dtype=torch.bool)
    evaluations = sum(L - i - 2 for i in range(search.k))
    if search.cap is not None:
        length = max(2, min(length, search.cap // (n * evaluations)))
    texts = windows(search, n, length)
    for _ in tqdm(range(search.k), "sleb", disable=None):
        alive = z[0::2].nonzero().flatten().tolist()[1:-1]
        z = without(z, [min(alive, key=lambda j: evaluate.loss(model, without(z, [j]), texts))])
    return z, evaluations * sum(map(len, texts))


def shortened(search: Search, scores_of) -> tuple[Tensor, int]:
    """Drops at once the k layers of the lowest score, of those that PLUS leaves: k <= L - 6.

    scores_of: one of the three below. Their cost is small, and no cap is applied.
    Silent: which of the three the paper compares with; all are here. Its published code has PLUS
    on for each of them.
    """
    model, texts = search.model, windows(search, *SHORTENED)
    scores, tokens = scores_of(model, texts)
    kept = {j % len(scores) for j in PLUS}
    order = [j for j in np.argsort(scores, kind="stable").tolist() if j not in kept]
    return without(torch.ones(model.B, dtype=torch.bool), order[:search.k]), tokens


def ppl_scores(model: Transformer, texts: list[list[int]]) -> tuple[list[float], int]:
    """Perplexity with the single layer j gone, for every j; and forward tokens."""
    z, L = torch.ones(model.B, dtype=torch.bool), model.config.num_hidden_layers
    bar = tqdm(range(L), "shortened-ppl", disable=None)
    scores = [float(np.exp(evaluate.loss(model, without(z, [j]), texts))) for j in bar]
    return scores, L * sum(map(len, texts))


def taylor_scores(model: Transformer, texts: list[list[int]]) -> tuple[list[float], int]:
    """Sum over a layer's weights of |w dloss/dw|, loss being the mean over the texts' tokens.

    The texts are of one length. Also the forward tokens, the backward pass counted as two more.

    Each gradient is turned into its sum as soon as it is there, so that only one is held.
    """
    scores, hooks = [0.0] * model.config.num_hidden_layers, []

    def add(j: int, p: Tensor) -> None:
        """Layer j's score grows by the share of parameter p."""
        scores[j] += (p.detach().float() * p.grad.float()).abs().sum().item()
        p.grad = None

    for j, layer in enumerate(model.model.layers):
        for p in layer.parameters():
            p.requires_grad_()
            hooks.append(p.register_post_accumulate_grad_hook(lambda p, j=j: add(j, p)))
    tokens = torch.tensor(texts, device=model.head_weight.device)
    logits = model.head(model(tokens)[:, :-1]).flatten(0, 1)      # (n, v)
    F.cross_entropy(logits.float(), tokens[:, 1:].flatten()).backward()
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    return scores, 3 * tokens.numel()


def magnitude_scores(model: Transformer, texts: list) -> tuple[list[float], int]:
    """Sum over a layer's weights of |w|; no text is read."""
    return [sum(p.float().abs().sum().item() for p in layer.parameters())
            for layer in model.model.layers], 0


@torch.inference_mode()
def divergences(model: Transformer, zs: list[Tensor], texts: list[list[int]]) -> list[float]:
    """KL(dense || pruned) for each z, mean over the texts' positions but the last of each.

    The dense model's logits are made once per HEAD_ROWS positions, and never kept.
    """
    sums, n = [0.0] * len(zs), sum(len(x) - 1 for x in texts)
    for x in texts:
        tokens = torch.tensor([x], device=model.head_weight.device)
        hidden = [model(tokens, z)[0, :-1].split(evaluate.HEAD_ROWS) for z in [None, *zs]]
        for dense, *pruned in zip(*hidden, strict=True):          # (HEAD_ROWS, d) each
            log_p = model.head(dense).log_softmax(-1, dtype=torch.float32)
            for i, h in enumerate(pruned):
                log_q = model.head(h).log_softmax(-1, dtype=torch.float32)
                sums[i] += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
    return [x / n for x in sums]


def mutate(z: Tensor, tied: bool, generator: np.random.Generator) -> Tensor:
    """Level switch: min(U{1..3}, U{1..3}) times a kept block is dropped and a dropped one kept.

    Both are attention blocks or both FFN blocks, so that the number of each stays; tied: layers.
    """
    z = z.clone()
    for _ in range(generator.integers(1, 4, 2).min()):
        column = slice(None) if tied else generator.integers(2)
        gates = z.view(-1, 2)[:, column]                          # (L,) or (L, 2), a view
        kept = gates.view(len(gates), -1)[:, 0].numpy()
        old, new = (generator.choice(np.flatnonzero(kept == x)) for x in (False, True))
        gates[old], gates[new] = True, False
    return z


def evolve(fitness, L: int, k: int, tied: bool, generator: np.random.Generator):
    """The (1 + OFFSPRING) search; yields the parent z (B,) at first and after every generation.

    fitness(list of z, stage) -> list of numbers, lower is better, on a fresh batch for each call;
    stage None chooses of STARTS random states, 0 and 1 are those of a generation. The parent
    joins the last stage. All layers may go, k attention and k FFN blocks of them; tied: k layers.
    """
    def best(zs: list[Tensor], n: int, stage: int | None) -> list[Tensor]:
        """The n fittest of zs."""
        return [zs[i] for i in np.argsort(fitness(zs, stage), kind="stable")[:n]]

    starts = []
    for _ in range(STARTS):
        attention, ffn = (generator.permutation(L)[:k] for _ in range(2))
        z = torch.ones(L, 2, dtype=torch.bool)
        z[attention, 0] = z[attention if tied else ffn, 1] = False
        starts.append(z.flatten())
    [parent] = best(starts, 1, None)
    yield parent
    while True:
        kids = {}
        for _ in range(100 * OFFSPRING):                          # bounded: there may be fewer
            kid = mutate(parent, tied, generator)
            if not torch.equal(kid, parent):
                kids[tuple(kid.tolist())] = kid
            if len(kids) == OFFSPRING:
                break
        kids = best(list(kids.values()), SURVIVORS[0], 0)
        [parent] = best([*kids, parent], SURVIVORS[1], 1)
        yield parent


def evopress(search: Search) -> tuple[Tensor, int]:
    """EvoPress's drop search by KL divergence from the dense model, k (L - k) / 1.5 generations.

    Deviates: its code rounds k down; all rivals drop equally many layers here.
    A search above the cap is scaled by s = cap / cost: s^(3/4) of the tokens of every stage and
    s^(1/4) of the generations. At 61,000 forward tokens and 8 of 30 layers, one seed each, 6, 16,
    26, 30 generations gave perplexities of 91, 103, 80, 82. Each batch also runs the dense model.
    """
    model, k, scale, spent = search.model, search.k, 1.0, 0
    L = model.config.num_hidden_layers
    generations, (n, length) = k * (L - k) / 1.5, EVOPRESS
    if search.cap is not None:
        published = (STARTS + 1) * START_TOKENS + generations * (
            (OFFSPRING + 1) * STAGE_TOKENS[0] + (SURVIVORS[0] + 2) * STAGE_TOKENS[1])
        s = min(1.0, search.cap / published)
        generations, scale = generations * s**0.25, s**0.75
    pool = windows(search, n, max(2, round(scale * length)))

    def fitness(zs: list[Tensor], stage: int | None) -> list[float]:
        """KL on a fresh batch: windows in random order, the last one cut to the token count."""
        nonlocal spent
        left, batch = scale * (START_TOKENS if stage is None else STAGE_TOKENS[stage]), []
        for i in search.generator.permutation(n):
            if left >= 2 or not batch:
                batch.append(pool[i][:max(2, int(left))])
                left -= len(batch[-1])
        spent += (len(zs) + 1) * sum(map(len, batch))             # and one dense forward
        return divergences(model, zs, batch)

    generations = max(1, round(generations))
    states = evolve(fitness, L, k, search.tied, search.generator)
    states = itertools.islice(states, generations + 1)
    *_, z = tqdm(states, "evopress", total=generations + 1, disable=None)
    return z, spent


# name -> the search, and how many of the L layers it never drops
RIVALS = {"sleb": (sleb, 2), "shortened-ppl": (partial(shortened, scores_of=ppl_scores), len(PLUS)),
          "shortened-taylor": (partial(shortened, scores_of=taylor_scores), len(PLUS)),
          "shortened-magnitude": (partial(shortened, scores_of=magnitude_scores), len(PLUS)),
          "evopress": (evopress, 1)}
