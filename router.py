"""Stage 2: a text's embedding, its nearest centroid, and that cluster's z.

Source: Eq. 1, 9 and 10 of IG-Pruning, arXiv:2511.02213.
Left out: clustering (kmeans.py) and mask training (igp.py). The encoder is run by
        sentence-transformers; it is not part of the method.
Dims:   n texts, N clusters, d_e embedding width, B blocks. z = 1 keeps a block, 0 skips it.
Run:    python router.py TEXT    (only this demonstration imports more than kmeans)
"""
import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from kmeans import nearest


@dataclass(frozen=True)
class Router:
    """What Stage 1 leaves behind: one centroid and one z per cluster."""

    mu: Tensor         # (N, d_e) float32, the c_k of Eq. 9
    z: Tensor          # (N, B) bool
    log_alpha: Tensor  # (N, B) float32; NaN in the rows of clusters not trained yet
    identity: dict     # what the masks were made from


def open_encoder(folder: str | Path, device: str, dtype: torch.dtype):
    """The sentence-transformers model in `folder`. Raises ValueError where there is none.

    Never a hub name: what a name stands for may change under a finished router.
    """
    if not (Path(folder) / "modules.json").is_file():
        raise ValueError(f"{folder} is no folder of a sentence-transformers model: no modules.json")
    from sentence_transformers import SentenceTransformer  # only when needed: it takes seconds
    from transformers.utils import logging
    logging.disable_progress_bar()                                # of reading the weights
    try:
        return SentenceTransformer(str(folder), device=device, local_files_only=True,
                                   model_kwargs={"dtype": dtype})
    except Exception as e:  # of four libraries, of any kind
        raise ValueError(f"the sentence encoder in {folder} cannot be opened ({e}); delete the "
                         "folder, and it is fetched again") from e


def encode(encoder, texts: list[str]) -> np.ndarray:
    """Eq. 1: e = Encoder(x), (n, d_e) float32, with an encoder from `open_encoder`.

    The encoder computes in its own dtype, which may be bf16; only the result is float32.
    Silent: all-MiniLM-L6-v2 reads the first 256 word pieces of a text, so that the paper's
    "Clustering Stage Sequence Length 4096" bounds only what it is handed.
    """
    bar = sys.stderr.isatty()
    return encoder.encode(texts, batch_size=32, show_progress_bar=bar).astype(np.float32)


def encoder_flops(folder: str | Path, t: int) -> int:
    """FLOPs of the encoder on t word pieces (at most 256), counted as model.flops counts."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    d, f, t = config["hidden_size"], config["intermediate_size"], min(t, 256)
    return config["num_hidden_layers"] * (8 * t * d * d + 4 * t * t * d + 4 * t * d * f)


def route(router: Router, e: np.ndarray) -> Tensor:
    """Eq. 9: k* = arg min_k |e_x - c_k|^2 for each row of e (n, d_e); (n,) int64. Ties: lowest k.

    Eq. 10 is then M^x = router.z[k*].
    Silent: c_k is only said to be initialised with mu_k; no update is described, so c_k = mu_k.
    Raises ValueError for embeddings of another width.
    """
    if e.shape[1] != router.mu.shape[1]:
        raise ValueError(f"embeddings are {e.shape[1]} wide, centroids {router.mu.shape[1]}")
    return torch.from_numpy(nearest(e, router.mu.numpy())[0])


def save(router: Router, path: str | Path) -> None:
    """mu, z and log_alpha as safetensors, the identity as JSON in its metadata; no pickle."""
    tensors = {"mu": router.mu, "z": router.z, "log_alpha": router.log_alpha}
    write(path, to_bytes(tensors, {"igp": json.dumps(router.identity, sort_keys=True)}))


def load(path: str | Path) -> Router:
    """The Router that `save` wrote, or one made by hand in the same form.

    Raises ValueError, naming the file and what is wrong, for anything else.
    """
    try:
        with safe_open(path, framework="pt") as f:
            mu, z, log_alpha = (f.get_tensor(name) for name in ("mu", "z", "log_alpha"))
            identity = json.loads((f.metadata() or {}).get("igp", "{}"))
    except (OSError, SafetensorError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} is no readable router ({e}); delete it, or name one that "
                         "igp.py wrote") from None
    fits = mu.ndim == z.ndim == 2 and len(mu) == len(z) > 0 and z.shape == log_alpha.shape
    kinds = (mu.dtype, z.dtype, log_alpha.dtype) == (torch.float32, torch.bool, torch.float32)
    if not fits or not kinds:
        held = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in (mu, z, log_alpha))
        raise ValueError(f"{path} holds mu, z, log_alpha as {held}; expected float32 (N, d_e), "
                         "bool (N, B), float32 (N, B)")
    if not mu.isfinite().all() or (z.view(torch.uint8) > 1).any() or not isinstance(identity, dict):
        raise ValueError(f"{path} is damaged: mu is not finite, z is not 0 or 1, or the identity "
                         "is no JSON object")
    return Router(mu, z, log_alpha, identity)


def write(path: str | Path, data: bytes) -> None:
    """The file appears whole or not at all: temporary file, fsync, rename.

    Raises ValueError where that fails (a full disk); the old file is then still there.
    """
    part = Path(f"{path}.part")                                   # of a killed run, perhaps
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written ({e.strerror}); mend that and run the same "
                         "command again: it goes on") from None


def made_now() -> tuple[Router, list[str]]:
    """4 clusters of 200 Wikipedia leads, with masks that skip nothing; and what is near each mu."""
    import hub
    from kmeans import closest, kmeans
    leads = hub.calibration_texts("wikipedia", None)
    leads = [leads[i] for i in np.random.default_rng(0).permutation(len(leads))[:200]]
    e = encode(open_encoder(hub.encoder_folder(), "cpu", torch.float32), [x["text"] for x in leads])
    mu, _, _ = kmeans(e, 4, np.random.default_rng(0), 10)
    titles = [", ".join(leads[i]["title"] for i in near) for near in closest(e, mu, 3)]
    z = torch.ones(4, 60, dtype=torch.bool)                       # SmolLM2 has 60 blocks
    return Router(torch.from_numpy(mu), z, torch.full(z.shape, torch.nan), {}), titles


def main() -> None:
    """Routes a text: its distance to each centroid, and the mask of the nearest."""
    import evaluate
    import hub
    p = argparse.ArgumentParser(description=main.__doc__)
    p.add_argument("text", metavar="TEXT")
    p.add_argument("--router", help="router.safetensors of a run; the default run's if not given")
    args = p.parse_args()
    if not args.text.strip():
        raise ValueError("TEXT is empty; give the text to route")
    path = Path(args.router or f"runs/{hub.EMBEDDED}-0.25-demo/router.safetensors")
    if path.exists() or args.router:
        router, results = load(path), path.parent / "results.json"
        found = json.loads(results.read_text()).get("clusters_found") if results.exists() else None
        nearest_texts = ["?"] * len(router.mu)
        if found and len(found) == len(router.mu):                # results of this very router
            nearest_texts = [", ".join(x["nearest"]) for x in found]
    else:
        print(f"There is no {path} (`python igp.py` makes it): 200 leads are clustered instead, "
              "and no block is skipped.\n")
        router, nearest_texts = made_now()
    encoder = open_encoder(hub.encoder_folder(), "cpu", torch.float32)
    e = encode(encoder, [args.text])                              # Eq. 1
    k = int(route(router, e)[0])                                  # Eq. 9
    squares = ((torch.from_numpy(e) - router.mu) ** 2).sum(1)
    print("   k  |e - c_k|^2  nearest to c_k")
    for i, (square, texts) in enumerate(zip(squares, nearest_texts, strict=True)):
        print(f"{'->' if i == k else '  '}{i:2} {square:12.4f}  {texts}")
    z = router.z[k]                                               # Eq. 10
    print(f"\nM^x skips {(~z[0::2]).sum()} attention and {(~z[1::2]).sum()} FFN blocks "
          f"of {len(z)}:\n{evaluate.picture(z)}")


if __name__ == "__main__":
    import hub
    sys.exit(hub.guarded("router.py", main))
