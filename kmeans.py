"""K-means: k-means++ starts, Lloyd's iterations, empty clusters re-seeded. NumPy only.

Source: Eq. 2 of IG-Pruning, arXiv:2511.02213; k-means++ is Arthur and Vassilvitskii 2007.
Dims:   M points, N clusters, d_e coordinates; e (M, d_e) points, mu (N, d_e) centroids.
Silent: start, restarts and stopping rule. k-means++, the best of `restarts`, and stop when no
        point changes its cluster.
Run:    python kmeans.py    (305 Wikipedia leads; only this demonstration imports other files)
"""
import sys
from operator import itemgetter

import numpy as np

MAX_ITERATIONS = 300  # Lloyd's ends long before on real data; this bounds it on any


def _squares(x):
    """|x|^2 of each row."""
    return np.vecdot(x, x)


def nearest(e: np.ndarray, mu: np.ndarray) -> tuple:
    """For each point the index of its nearest centroid and the squared distance, both (M,).

    |e - mu|^2 = |e|^2 - 2 e.mu + |mu|^2 turns M N distances into one matmul. Ties: lowest index,
    but the matmul may round two equal centroids apart.
    """
    distance = _squares(mu) - e @ (2 * mu.T)                      # (M, N), short of |e|^2
    labels = distance.argmin(1)
    distance = distance.min(1) + _squares(e)
    return labels, distance.clip(0)                               # rounding may dip below 0


def plus_plus(e: np.ndarray, N: int,
              generator: np.random.Generator) -> np.ndarray:
    """N starting points out of e, each drawn with probability ~ squared distance to the others.

    That is, to the nearest of those drawn before it. Returns mu (N, d_e), distinct points wherever
    e holds that many.
    """
    chosen = [generator.integers(len(e))]
    distance = np.full(len(e), np.inf)
    while len(chosen) < N:
        newest = _squares(e - e[chosen[-1]])
        distance = np.minimum(distance, newest)                   # (M,) float64
        total = distance.sum()
        p = distance / total if total else None                   # None: all points alike
        chosen.append(generator.choice(len(e), p=p))
    return e[chosen]


def lloyd(e: np.ndarray, mu: np.ndarray) -> tuple:
    """Alternate the two halves of Eq. 2, labels for fixed mu and mu for fixed labels, until stable.

    e (M, d_e), mu (N, d_e) starts. Returns mu, labels (M,) and the inertia, the sum of Eq. 2.
    Silent: a cluster without points is moved onto the point farthest from its centroid, of those
    that are not alone in theirs. Ties: lowest index.
    """
    clusters = np.arange(len(mu))[:, None]                        # (N, 1)
    old = None
    for _ in range(MAX_ITERATIONS):
        labels, distance = nearest(e, mu)
        for k in np.setdiff1d(clusters, labels):                  # those without points
            alone = np.bincount(labels)[labels] == 1
            far = np.where(alone, -1, distance).argmax()
            labels[far] = k
        if np.array_equal(old, labels):
            break
        old = labels
        member = np.float32(labels == clusters)                   # (N, M), a 1 in each column
        mu = member @ e / member.sum(1, keepdims=True)            # each cluster's mean
    return mu, labels, distance.sum(dtype=np.float64)


def kmeans(e: np.ndarray, N: int,
           generator: np.random.Generator, restarts: int) -> tuple:
    """arg min over S of Eq. 2: the best of `restarts` runs of Lloyd's from k-means++ starts.

    e (M, d_e) float32. Returns mu (N, d_e) float32, labels (M,) int64, inertia. Clusters are
    numbered in the order of their first points, so that starts which end in one partition, a
    rounding apart, give it one numbering.
    Raises ValueError unless 1 <= N <= M and every coordinate is finite.
    Example: e = [[0], [1], [10], [11]], N = 2 -> mu [[0.5], [10.5]], inertia 4 * 0.5^2 = 1.
    """
    if not 1 <= N <= len(e) or not np.isfinite(e).all():
        raise ValueError(f"{N} clusters of {len(e)} points: too few, or not finite")
    runs = [lloyd(e, plus_plus(e, N, generator)) for _ in range(restarts)]
    mu, labels, inertia = min(runs, key=itemgetter(2))
    _, first = np.unique(labels, return_index=True)               # (N,) each cluster's first point
    order = first.argsort()                                       # (N,) new number -> old
    rank = order.argsort()                                        # (N,) old number -> new
    return mu[order], rank[labels], inertia


def main() -> None:
    """Clusters the embeddings of 305 Wikipedia leads: sizes, and some of their titles."""
    from sentence_transformers import SentenceTransformer

    import hub
    leads = hub.calibration_texts("wikipedia", None)[::33]
    encoder = SentenceTransformer(str(hub.encoder_folder()))
    e = encoder.encode([x["text"] for x in leads])
    _, labels, _ = kmeans(e, 8, np.random.default_rng(0), 10)
    for k in range(8):
        own = [leads[i]["title"] for i in np.flatnonzero(labels == k)]
        print(len(own), own[:6])


if __name__ == "__main__":
    import hub
    sys.exit(hub.guarded("kmeans.py", main))
