"""kmeans.py against scikit-learn, brute force, and the probabilities of k-means++ by hand."""
import numpy as np
import pytest
from sklearn.cluster import KMeans

from kmeans import kmeans, lloyd, nearest, plus_plus

M, N, d_e = 400, 7, 19
rng = np.random.default_rng


def points(seed=0, spread=0.7):
    """M points around N centres."""
    g = rng(seed)
    centres = g.normal(size=(N, d_e))
    noise = g.normal(size=(M, d_e))
    e = centres[g.integers(N, size=M)] + spread * noise
    return e.astype(np.float32)


def line(*coordinates):
    """Points (n, 1)."""
    return np.float32(coordinates)[:, None]


@pytest.mark.parametrize("seed", range(5))
def test_equal_starts_give_sklearns_clusters(seed):
    e = points(seed)
    start = rng(seed).choice(e, N, replace=False)
    mu, labels, inertia = lloyd(e, start)
    theirs = KMeans(N, init=start, n_init=1, tol=0)
    theirs.fit(e)
    assert np.array_equal(labels, theirs.labels_)
    np.testing.assert_allclose(mu, theirs.cluster_centers_, atol=1e-5)
    assert inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_the_best_of_restarts_counts():
    e = points(1, spread=2)
    generator = rng(3)                                            # where the sixth is the best
    alone = []
    for _ in range(10):
        _, _, inertia = kmeans(e, N, generator, 1)
        alone.append(inertia)
    _, _, inertia = kmeans(e, N, rng(3), 10)
    assert inertia == min(alone) < max(alone)


def test_nearest_is_brute_force_with_ties_to_the_lowest_index():
    e = points(4)
    mu = points(5)[:N]
    labels, distance = nearest(e, mu)
    difference = e[:, None] - mu
    brute = (difference**2).sum(2)
    assert np.array_equal(labels, brute.argmin(1))
    np.testing.assert_allclose(distance, brute.min(1), rtol=1e-4)
    mu = line(9, 1, -1, 1)
    labels, _ = nearest(line(0), mu)
    assert labels == 1
    _, distance = nearest(e, e)
    assert distance.min() >= 0


@pytest.mark.parametrize("seed", range(4))
def test_starts_of_one_partition_give_one_numbering(monkeypatch, seed):
    e = points(7, spread=0.1)
    mu, labels, _ = kmeans(e, N, rng(seed), 10)
    _, first = np.unique(labels, return_index=True)
    assert (np.diff(first) > 0).all()                             # in the order of first members
    start = rng(seed).permutation(mu)
    monkeypatch.setattr("kmeans.plus_plus", lambda *_: start)
    again, numbers, _ = kmeans(e, N, rng(0), 1)
    assert np.array_equal(numbers, labels)
    np.testing.assert_allclose(again, mu, atol=1e-6)


def test_an_empty_cluster_gets_the_farthest_point_that_is_not_alone():
    e = line(0, 0.5, 5, 5.25, 90)
    mu, _, _ = lloyd(e, line(0, 1000, 98))                        # 90 is farther, but alone
    assert mu.tolist() == [[0.25], [5.125], [90]]


@pytest.mark.parametrize("odd", [1, 9])
def test_fewer_distinct_xthan_clusters_leave_none_empty(odd):
    e = line(odd, 1, 1, 1)
    _, labels, _ = kmeans(e, 4, rng(0), 2)
    assert labels.tolist() == [0, 1, 2, 3]


def test_plus_plus_draws_by_squared_distance_to_the_nearest():
    """Of the points 0, 1 and 3 the second is 3 in 9 of 10 draws after 0, in 4 of 5 after 1."""
    e = line(0, 1, 3)
    generator = rng(0)
    drawn = [plus_plus(e, 3, generator) for _ in range(4000)]
    drawn = np.hstack(drawn)                                      # (3, draws)
    share = (drawn[1] == 3).mean()
    assert share == pytest.approx(1.7 / 3, abs=0.03)              # 4 sigma
    assert (np.sort(drawn, 0) == e).all()                         # none is drawn twice


def test_impossible_requests_are_named():
    e = points()
    for x, clusters in (
            (e, 0),
            (e, M + 1),
            (e * np.nan, N)):
        with pytest.raises(ValueError, match=f"{clusters} clusters of {M} points"):
            kmeans(x, clusters, rng(0), 1)
