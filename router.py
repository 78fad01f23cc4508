"""Stage 2: a text's embedding, its nearest centroid, and that cluster's z.

Source: Eq. 1, 9 and 10 of IG-Pruning, arXiv:2511.02213.
Left out: clustering (kmeans.py) and mask training (igp.py). The encoder is run by
        sentence-transformers; it is not part of the method.
Dims:   n texts, N clusters, d_e embedding width, B blocks. z = 1 keeps a block, 0 skips it.
Run:    python router.py TEXT    (only this demonstration imports evaluate and hub)
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from kmeans import nearest
from model import UserError, write


@dataclass
class Router:
    """What Stage 1 leaves behind: one centroid and one z per cluster."""

    mu: Tensor         # (N, d_e) float32, the c_k of Eq. 9; (1, 1) where one mask needs none
    z: Tensor          # (N, B) bool
    log_alpha: Tensor  # (N, B) float32, what z was hardened from; of rivals 1 or -1
    identity: dict     # "model", its name, and "files", a fingerprint of each of its files


def open_encoder(folder: Path, device: str, dtype: torch.dtype):
    """The sentence-transformers model in `folder`. Raises UserError where there is none.

    Never a hub name: what a name stands for may change under a finished router.
    """
    from sentence_transformers import SentenceTransformer  # only when needed: it takes seconds
    from transformers.utils import logging
    logging.disable_progress_bar()                                # of reading the weights
    try:
        return SentenceTransformer(str(folder), device=device, model_kwargs={"dtype": dtype},
                                   local_files_only=True)
    except Exception as e:  # of four libraries, of any kind
        raise UserError(f"the sentence encoder in {folder} cannot be opened ({e}); delete the "
                        "folder, and it is fetched again") from e


def encode(encoder, texts: list[str]) -> np.ndarray:
    """Eq. 1: e = Encoder(x), (n, d_e) float32, with an encoder from `open_encoder`.

    all-MiniLM-L6-v2: the mean of its last layer over a text's word pieces, divided by its norm,
    d_e = 384. (A mean of such e, a centroid, has a norm below 1, and keeps it.) The encoder
    computes in its own dtype, which may be bf16; only the result is float32.
    Silent: all-MiniLM-L6-v2 reads the first 256 word pieces of a text, so that the paper's
    "Clustering Stage Sequence Length 4096" bounds only what it is handed.
    """
    return encoder.encode(texts, show_progress_bar=sys.stderr.isatty()).astype(np.float32)


def encoder_flops(encoder, texts: list[str]) -> int:
    """FLOPs of the encoder on all texts, a text at a time, counted as model.flops counts.

    t is what the encoder reads of a text: its word pieces, at most 256, the marks at both ends
    included. d and f are the widths of its layers and of their FFN.
    """
    config, total = encoder[0].auto_model.config, 0
    d, f = config.hidden_size, config.intermediate_size
    for text in texts:
        t = encoder.preprocess([text])["input_ids"].shape[1]
        total += t * d * (8 * d + 4 * t + 4 * f)                  # q, k, v, o; scores; FFN
    return config.num_hidden_layers * total


def route(router: Router, e: np.ndarray) -> Tensor:
    """Eq. 9: k* = arg min_k |e_x - c_k|^2 for each row of e (n, d_e); (n,) int64. Ties: lowest k.

    A lone centroid wins unseen: it may be a placeholder.
    Eq. 10 is then M^x = router.z[k*].
    Silent: c_k is only said to be initialised with mu_k; no update is described, so c_k = mu_k.
    Raises UserError for embeddings of another width.
    """
    if len(router.mu) == 1:
        return torch.zeros(len(e), dtype=torch.int64)
    if e.shape[1] != router.mu.shape[1]:
        raise UserError(f"embeddings are {e.shape[1]} wide, the router's centroids "
                        f"{router.mu.shape[1]}; name a router of this encoder")
    k, _ = nearest(e, router.mu.numpy())
    return torch.from_numpy(k)


# ---------------------------------------------------------------------------- the file


def save(router: Router, path: Path) -> None:
    """mu, z and log_alpha as safetensors, the identity as JSON in its metadata; no pickle."""
    tensors = vars(router).copy()
    identity = json.dumps(tensors.pop("identity"), sort_keys=True)
    write(path, to_bytes(tensors, {"igp": identity}))


def load(path: str | Path) -> Router:
    """The Router that `save` wrote, or one made by hand in the same form.

    Raises UserError, naming the file and what is expected, for anything else; but log_alpha, which
    nothing of Stage 2 reads, only has to be there, and the identity may be missing.
    """
    try:
        with safe_open(path, "pt") as f:
            mu, z, log_alpha = map(f.get_tensor, ("mu", "z", "log_alpha"))
            identity = json.loads((f.metadata() or {}).get("igp", "{}"))
    except (OSError, SafetensorError, ValueError) as e:
        raise UserError(f"{path} is no readable router ({e}); name a router.safetensors that a "
                        "run of igp.py left in its folder") from None
    floats = mu.dtype == torch.float32 and mu.isfinite().all()
    bools = z.dtype == torch.bool and z.numel() and z.view(torch.uint8).max() <= 1
    shapes = mu.ndim == z.ndim == 2 and len(mu) == len(z)
    if not (floats and bools and shapes and isinstance(identity, dict)):
        raise UserError(f"{path} is no router: expected mu (N, d_e) float32 and finite, z (N, B) "
                        "bool, log_alpha, and a JSON object as identity")
    return Router(mu, z, log_alpha, identity)


def main():
    """Prints k* of a text (- is standard input) and the mask that it then runs under."""
    import argparse

    import evaluate
    import hub
    p = argparse.ArgumentParser(description=main.__doc__)
    p.add_argument("text")
    p.add_argument("--router", default=f"runs/{hub.EMBEDDED}-0.25-demo/router.safetensors",
                   help="a run's router.safetensors; if not given, that of `python igp.py`")
    args = p.parse_args()
    router = load(args.router)
    encoder = open_encoder(hub.encoder_folder(), "cpu", torch.float32)
    e = encode(encoder, [hub.argument_text(args.text, "TEXT")])   # Eq. 1
    [k] = route(router, e)                                        # Eq. 9
    z = router.z[k]                                               # Eq. 10
    print(f"k* = {k} of {len(router.z)}\n{evaluate.picture(z)}")


if __name__ == "__main__":
    import hub
    sys.exit(hub.guarded("router.py", main))
