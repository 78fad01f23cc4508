"""Stage 2: a text's embedding, its nearest centroid, and that cluster's z.

Source: Eq. 1, 9 and 10 of IG-Pruning, arXiv:2511.02213.
Left out: clustering (kmeans.py) and mask training (igp.py). The encoder is run by
        sentence-transformers; it is not part of the method.
Dims:   n texts, N clusters, d_e embedding width, B blocks. z = 1 keeps a block, 0 skips it.
"""
import json
import os
import sys
import tempfile
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
    return SentenceTransformer(str(folder), device=device, local_files_only=True,
                               model_kwargs={"dtype": dtype})


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
    except (OSError, SafetensorError, ValueError) as e:
        raise ValueError(f"{path} is no readable router ({e})") from None
    fits = mu.ndim == z.ndim == 2 and len(mu) == len(z) and z.shape == log_alpha.shape
    kinds = (mu.dtype, z.dtype, log_alpha.dtype) == (torch.float32, torch.bool, torch.float32)
    if not fits or not kinds:
        held = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in (mu, z, log_alpha))
        raise ValueError(f"{path} holds mu, z, log_alpha as {held}; expected float32 (N, d_e), "
                         "bool (N, B), float32 (N, B)")
    return Router(mu, z, log_alpha, identity)


def write(path: str | Path, data: bytes) -> None:
    """The file appears whole or not at all: temporary file, fsync, rename."""
    path = Path(path)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as f:
        try:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise
