"""K-means: k-means++ starts, Lloyd's iterations, empty clusters re-seeded. NumPy only.

Source: Eq. 2 of IG-Pruning, arXiv:2511.02213; k-means++ is Arthur and Vassilvitskii 2007.
Dims:   M points, N clusters, d_e coordinates; e (M, d_e) points, mu (N, d_e) centroids.
Silent: start, restarts and stopping rule. k-means++, the best of `restarts`, and stop when no
        point changes its cluster.
Run:    python kmeans.py    (300 Wikipedia leads; only this demonstration imports other files)
"""
import sys

import numpy as np

MAX_ITERATIONS = 300  # Lloyd's ends long before on real data; this bounds it on any


def nearest(e: np.ndarray, mu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each point the index of its nearest centroid and the squared distance, both (M,).

    |e - mu|^2 = |e|^2 - 2 e.mu + |mu|^2 turns M N distances into one matmul. Ties: lowest index.
    """
    distance = (mu * mu).sum(1) - 2 * (e @ mu.T)                  # (M, N), short of |e|^2
    labels = distance.argmin(1)
    distance = distance[np.arange(len(e)), labels] + np.einsum("md,md->m", e, e)
    return labels, np.maximum(distance, 0)                        # rounding may dip below 0


def plus_plus(e: np.ndarray, N: int, generator: np.random.Generator) -> np.ndarray:
    """N starting points out of e, each drawn with probability ~ squared distance to the others.

    That is, to the nearest of those drawn before it. Returns mu (N, d_e), distinct points wherever
    e holds that many.
    """
    chosen = [int(generator.integers(len(e)))]
    distance = np.full(len(e), np.inf)
    while len(chosen) < N:
        distance = np.minimum(distance, ((e - e[chosen[-1]]) ** 2).sum(1, dtype=np.float64))
        total = distance.sum()
        chosen.append(int(generator.choice(len(e), p=distance / total if total > 0 else None)))
    return e[chosen]


def lloyd(e: np.ndarray, mu: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Alternate the two halves of Eq. 2, labels for fixed mu and mu for fixed labels, until stable.

    e (M, d_e), mu (N, d_e) starts. Returns mu, labels (M,) and the inertia, the sum of Eq. 2.
    Silent: a cluster without points is moved onto the point farthest from its centroid.
    """
    N, labels = len(mu), None
    for _ in range(MAX_ITERATIONS):
        old, (labels, distance) = labels, nearest(e, mu)
        size = np.bincount(labels, minlength=N)
        for k in np.flatnonzero(size == 0):
            far = np.where(size[labels] > 1, distance, -1).argmax()  # leaves no other cluster empty
            size[labels[far]] -= 1
            size[k], labels[far], distance[far] = 1, k, 0
        if old is not None and np.array_equal(old, labels):
            break
        member = (labels == np.arange(N)[:, None]).astype(e.dtype)  # (N, M) one-hot: sums by matmul
        mu = member @ e / size[:, None].astype(e.dtype)
    return mu, labels, float(distance.sum(dtype=np.float64))


def kmeans(e: np.ndarray, N: int, generator: np.random.Generator, restarts: int):
    """arg min over S of Eq. 2: the best of `restarts` runs of Lloyd's from k-means++ starts.

    e (M, d_e) float32. Returns mu (N, d_e) float32, labels (M,) int64, inertia.
    Raises ValueError unless 1 <= N <= M and every coordinate is finite.
    Example: e = [[0], [1], [10], [11]], N = 2 -> mu {[0.5], [10.5]}, inertia 4 * 0.5^2 = 1.
    """
    if not 1 <= N <= len(e):
        raise ValueError(f"{N} clusters of {len(e)} texts: expected 1 to {len(e)}")
    if not np.isfinite(e).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(e).all(1))} embeddings are not finite")
    runs = [lloyd(e, plus_plus(e, N, generator)) for _ in range(restarts)]
    return min(runs, key=lambda run: run[2])


# ---------------------------------------------------------------------------- looking at clusters


def purity(labels: np.ndarray, topics: list[str | None]) -> list[tuple[str | None, int, int]]:
    """For each cluster (commonest topic, its texts, texts with a topic): purity is their quotient.

    labels (M,); topics of the M points, None where unknown. The first of equal topics counts.
    Example: labels [0, 0, 0, 1], topics [a, a, b, None] -> [(a, 2, 3), (None, 0, 0)].
    """
    found = []
    for k in range(labels.max() + 1):
        held = [topic for topic, label in zip(topics, labels, strict=True) if label == k and topic]
        topic = max(sorted(set(held)), key=held.count, default=None)
        found.append((topic, held.count(topic), len(held)))
    return found


def closest(e: np.ndarray, mu: np.ndarray, n: int) -> np.ndarray:
    """For each centroid the indices of its n nearest points, nearest first: (N, n), n <= M."""
    distance = (e * e).sum(1) - 2 * (mu @ e.T)                    # (N, M), short of |mu|^2
    return distance.argsort(1, kind="stable")[:, :n]


def main() -> None:
    """Clusters the embeddings of 300 Wikipedia leads, and prints what is in them."""
    import torch

    import hub
    import router
    leads = [x for x in hub.calibration_texts("wikipedia", None) if x["topic"] != "Uncategorized"]
    order, N = np.random.default_rng(0).permutation(len(leads))[:300], 8
    leads = [leads[i] for i in order]
    encoder = router.open_encoder(hub.encoder_folder(), "cpu", torch.float32)
    e = router.encode(encoder, [x["text"] for x in leads])
    print(f"{e.shape[0]} leads, {e.shape[1]} coordinates, {N} clusters; inertia of five starts:")
    for seed in range(5):
        start = plus_plus(e, N, np.random.default_rng(seed))
        print(f"  k-means++ {nearest(e, start)[1].sum():.1f} -> Lloyd {lloyd(e, start)[2]:.1f}")
    mu, labels, inertia = kmeans(e, N, np.random.default_rng(0), 10)
    topics = [x["topic"] for x in leads]
    print(f"best of 10: {inertia:.1f}\n\nsize  purity  topic; the three leads nearest to the mean")
    found = purity(labels, topics)
    for (topic, hits, of), near in zip(found, closest(e, mu, 3), strict=True):
        titles = ", ".join(leads[i]["title"] for i in near)
        print(f"{of:4} {hits / of:7.0%}  {topic}; {titles}")
    hits = sum(x[1] for x in found) / len(leads)
    print(f"\nPurity {hits:.0%}; one cluster of all has "
          f"{max(map(topics.count, topics)) / len(leads):.0%}.")


if __name__ == "__main__":
    import hub
    sys.exit(hub.guarded("kmeans.py", main))
