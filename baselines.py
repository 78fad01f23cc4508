"""Rival depth pruning: SLEB, Shortened LLaMA, EvoPress; each returns one z for every input.

Source: SLEB (Song et al. 2024, arXiv:2402.09025), Shortened LLaMA (Kim et al. 2024,
        arXiv:2402.02834), EvoPress (Sieberling et al. 2024, arXiv:2410.14649), constants and
        order of steps from their published code.
Left out: retraining after pruning; every other method that these three compare with.
Dims:   L layers, B = 2L blocks, k = floor(sparsity L + 1/2) layers to drop; n windows of texts, or
        positions; t tokens, d width, v vocabulary. `texts` are n lists of token ids.
        z = 1 keeps a block, 0 skips it. A rival returns (z boolean (B,), forward tokens spent).
Sums:   float32 within a parameter, or HEAD_ROWS positions; these are added up in float64.
Ties:   wherever something is the lowest, the first of equal ones is taken (`lowest`).
Deviates: the paper calibrates every rival on WikiText-2. Here all methods share --calibration, so
        that texts do not decide between them (its Table 4); --calibration wikitext2 is the paper's.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import evaluate
from model import Transformer, UserError

# A search may spend this many times the forward tokens of IG-Pruning's masks together (a training
# step is two forwards of its tokens). One that would spend more is scaled down; None: as published.
# Deviates: the paper gives each rival what its authors gave it.
CAP = 1
SLEB = (4, 2048)        # windows, tokens of each: 128 lines of WikiText-2 give about four
SHORTENED = (10, 128)   # its calibration samples
PLUS = slice(4, -2)     # its "+" rule: never drop the first four layers and the last two
EVOPRESS = (16, 8192)   # its calibration set of 131,072 tokens
STARTS = 64             # its random first states
OFFSPRING = 32          # its mutations of a generation
# Stage 0 is the choice among the first states, 1 among a generation's mutations, 2 among those that
# are left of them and their parent.
SURVIVORS = (1, 2, 1)               # so many are chosen
STAGE_TOKENS = (2048, 2048, 32768)  # by their divergence over so many tokens


@dataclass(frozen=True)
class Search:
    """What every rival is given."""

    model: Transformer
    texts: Iterable     # of lists of token ids, in random order; read once, as far as needed
    k: int              # layers to drop
    tied: bool          # EvoPress: whole layers, instead of k attention and any k FFN blocks
    cap: int | None     # forward tokens, see CAP
    generator: np.random.Generator


def windows(search: Search, n: int, length: int) -> list:
    """The first n windows of `length` tokens of the joined texts; shorter ones if there is less.

    All n are of one length, at most max_position_embeddings.
    Deviates: SLEB's code puts an empty line between texts, Shortened LLaMA's draws a document and
    an offset for each sample, EvoPress's fills windows with documents. One rule is enough here.
    Raises UserError for fewer than two tokens a window.
    """
    tokens = chain.from_iterable(search.texts)
    joined = list(islice(tokens, n * length))
    length = min(length, len(joined) // n, search.model.config.max_position_embeddings)
    if length < 2:
        raise UserError(f"--calibration has {len(joined)} tokens; {n} windows need {2 * n}: "
                        "give it more or longer texts")
    return [joined[i * length:(i + 1) * length] for i in range(n)]


def lowest(items: list, scores: list, n: int) -> list:
    """The n items (of a list or range) of the lowest scores, ascending.

    Of equal scores the first goes first; NaN is above all numbers.
    """
    order = np.argsort(scores, kind="stable")
    return [items[i] for i in order[:n]]


def without(L: int, layers: list) -> Tensor:
    """z (B,) that skips both blocks of these layers."""
    z = torch.ones(L, 2, dtype=torch.bool)
    z[layers] = False
    return z.flatten()


def loss(model: Transformer, z: Tensor, texts: list) -> float:
    """Mean -log P, in nats, of all texts' tokens after their first, under one boolean z (B,)."""
    logliks = evaluate.judge(model, texts, z.expand(len(texts), -1))
    n = sum(len(x) - 1 for x in texts)
    return float(-logliks.sum() / n)


def sleb(search: Search) -> tuple:
    """k times: drop the layer whose loss is lowest when it is gone too; first minimum wins.

    The first and the last layer are never candidates, so k <= L - 2.
    The criterion is language-model loss; IG-Pruning's Sec. 4.1 says cosine similarity, which
    SLEB's code does not use. A cap shortens the windows, to two tokens at the least.
    """
    model, k = search.model, search.k
    L = model.config.num_hidden_layers
    n, length = SLEB
    evaluations = sum(L - 2 - i for i in range(k))
    if search.cap is not None:
        length = max(2, min(length, search.cap // (n * evaluations)))
    texts = windows(search, n, length)
    gone = []
    for _ in tqdm(range(k), "sleb", disable=None):
        candidates = [j for j in range(1, L - 1) if j not in gone]
        losses = [loss(model, without(L, [*gone, j]), texts) for j in candidates]
        gone += lowest(candidates, losses, 1)
    return without(L, gone), evaluations * sum(map(len, texts))


def shortened(scores_of, search: Search) -> tuple:
    """Drops at once the k layers of the lowest score, of those that PLUS leaves: k <= L - 6.

    scores_of: one of the three below. Each returns (L scores, its cost in forwards of all texts).
    The cost is small, and no cap is applied.
    Silent: which of the three the paper compares with; all are here. Its published code has PLUS
    on for each of them.
    """
    texts = windows(search, *SHORTENED)
    scores, forwards = scores_of(search.model, texts)
    L = len(scores)
    gone = lowest(range(L)[PLUS], scores[PLUS], search.k)
    return without(L, gone), forwards * sum(map(len, texts))


def ppl_scores(model: Transformer, texts: list) -> tuple:
    """exp(loss) with the single layer j gone, for every j."""
    L = model.config.num_hidden_layers
    losses = [loss(model, without(L, [j]), texts) for j in range(L)]
    return np.exp(losses), L


def taylor_scores(model: Transformer, texts: list) -> tuple:
    """Sum over a layer's weights of |w dloss/dw|, loss being the mean over the texts' tokens.

    The texts are of one length. The backward pass is counted as two more forwards.

    Each gradient is turned into its sum as soon as it is there, so that only one is held.
    """
    scores = [0.0] * model.config.num_hidden_layers
    hooks = []

    def add(j, p):
        """Layer j's score grows by the share of parameter p."""
        product = p.float() * p.grad.float()
        scores[j] += product.abs().sum().item()
        p.grad = None

    for j, layer in enumerate(model.model.layers):
        for p in layer.requires_grad_().parameters():
            hooks.append(p.register_post_accumulate_grad_hook(partial(add, j)))
    tokens = torch.tensor(texts, device=model.head_weight.device)
    logits = model.head(model(tokens)[:, :-1]).flatten(0, 1)      # (b (t - 1), v)
    F.cross_entropy(logits.float(), tokens[:, 1:].flatten()).backward()
    for hook in hooks:
        hook.remove()
    model.requires_grad_(False)
    return scores, 3


def magnitude_scores(model: Transformer, texts: list) -> tuple:
    """Sum over a layer's weights of |w|; no text is read."""
    scores = []
    for layer in model.model.layers:
        sums = [p.float().abs().sum().item() for p in layer.parameters()]
        scores.append(sum(sums))
    return scores, 0


@torch.inference_mode()
def divergences(model: Transformer, zs: list, texts: list) -> np.ndarray:
    """KL(dense || pruned) = sum over v of p (log p - log q), in nats, of each z: (len(zs),).

    Float64; the mean over the texts' positions but the last of each.
    The dense model's logits are made once per HEAD_ROWS positions, and never kept.
    """
    sums = np.zeros(len(zs))
    for x in texts:
        tokens = torch.tensor([x], device=model.head_weight.device)
        hidden = [model(tokens, z)[:, :-1] for z in [None, *zs]]
        hidden = torch.cat(hidden)                                # (1 + len(zs), t - 1, d)
        for dense, *pruned in hidden.split(evaluate.HEAD_ROWS, 1):
            log_p = model.head(dense).log_softmax(-1, dtype=torch.float32)
            for i, h in enumerate(pruned):
                log_q = model.head(h).log_softmax(-1, dtype=torch.float32)
                kl = log_p.exp() * (log_p - log_q)                # (HEAD_ROWS, v)
                sums[i] += kl.sum().item()
    n = sum(len(x) - 1 for x in texts)
    return sums / n


def mutate(z: Tensor, tied: bool, generator: np.random.Generator) -> Tensor:
    """Level switch: min(U{1..3}, U{1..3}) times a kept block is dropped and a dropped one kept.

    Both are attention blocks or both FFN blocks, so that the number of each stays; tied: layers.
    A later switch may undo an earlier one, so z itself may come back.
    """
    gates = z.clone().view(-1, 2)                                 # (L, 2): attention, FFN
    for _ in range(generator.integers(1, 4, 2).min()):
        columns = [0, 1] if tied else [generator.integers(2)]
        kept = gates[:, columns[0]].numpy()
        old = generator.choice(np.flatnonzero(~kept))
        new = generator.choice(np.flatnonzero(kept))
        gates[old, columns] = True
        gates[new, columns] = False
    return gates.flatten()


def evolve(select, search: Search, generations: int) -> Tensor:
    """The (1 + OFFSPRING) search; returns the parent z (B,) of the last generation.

    select(list of z, stage): the best SURVIVORS[stage] of them, on a fresh batch for each call.
    The parent joins the last stage, behind the mutations: of equal ones a mutation wins. All
    layers may go, k attention and k FFN blocks of them; tied: k layers.
    """
    L = search.model.config.num_hidden_layers
    generator = search.generator
    starts = []
    for _ in range(STARTS):
        z = without(L, generator.permutation(L)[:search.k])
        other = without(L, generator.permutation(L)[:search.k])
        if not search.tied:
            z[1::2] = other[1::2]                                 # FFN blocks
        starts.append(z)
    [parent] = select(starts, 0)
    for _ in tqdm(range(generations), "evopress", disable=None):
        kids = []
        for _ in range(100 * OFFSPRING):                          # bounded: there may be fewer
            kid = mutate(parent, search.tied, generator)
            if not any(torch.equal(kid, z) for z in [parent, *kids]):
                kids.append(kid)
            if len(kids) == OFFSPRING:
                break
        kids = select(kids, 1)
        [parent] = select([*kids, parent], 2)
    return parent


def evopress(search: Search) -> tuple:
    """EvoPress's drop search by KL divergence from the dense model, k (L - k) / 1.5 generations.

    These are rounded, half to even, and at least one; k <= L - 1.
    Deviates: its code rounds k down; all rivals drop equally many layers here.
    A search above the cap is scaled by s = cap / cost: s^(3/4) of the tokens of every stage and
    s^(1/4) of the generations. At 61,000 forward tokens and 8 of 30 layers, one seed each, 6, 16,
    26, 30 generations gave perplexities of 91, 103, 80, 82. Each batch also runs the dense model.
    """
    spent = 0
    k = search.k
    L = search.model.config.num_hidden_layers
    generations, scale = k * (L - k) / 1.5, 1.0
    if search.cap is not None:
        runs = (STARTS + 1, OFFSPRING + 1, SURVIVORS[1] + 2)      # forwards of a batch in a stage
        start, *stages = np.multiply(runs, STAGE_TOKENS)
        cost = start + generations * sum(stages)
        s = min(1.0, search.cap / cost)
        generations *= s**0.25
        scale = s**0.75
    n, length = EVOPRESS
    pool = windows(search, n, max(2, round(scale * length)))
    length = len(pool[0])

    def select(zs, stage):
        """Lowest KL on a fresh batch: windows in random order, the last cut to the token count."""
        nonlocal spent
        tokens = max(2, int(scale * STAGE_TOKENS[stage]))
        shuffled = search.generator.permutation(pool).flatten()   # (n length,)
        ids = shuffled[:tokens].tolist()
        batch = [ids[i:i + length] for i in range(0, len(ids) - 1, length)]
        spent += (len(zs) + 1) * sum(map(len, batch))             # and one dense forward
        kl = divergences(search.model, zs, batch)
        return lowest(zs, kl, SURVIVORS[stage])

    z = evolve(select, search, max(1, round(generations)))
    return z, spent


# name -> the search, and how many of the L layers it never drops
RIVALS = {
    "sleb": (sleb, 2),
    "shortened-ppl": (partial(shortened, ppl_scores), 6),
    "shortened-taylor": (partial(shortened, taylor_scores), 6),
    "shortened-magnitude": (partial(shortened, magnitude_scores), 6),
    "evopress": (evopress, 1),
}
