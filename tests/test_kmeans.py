"""kmeans.py against scikit-learn from the same starts."""
import numpy as np
import pytest
from conftest import ROOT  # noqa: F401  (puts the root on the path)
from sklearn.cluster import KMeans

from kmeans import closest, kmeans, lloyd, nearest, plus_plus, purity

M, N, d_e = 400, 7, 19


def points(seed=0, n=M):
    rng = np.random.default_rng(seed)
    blobs = rng.normal(size=(11, d_e))[rng.integers(11, size=n)]
    return (blobs + 0.7 * rng.normal(size=(n, d_e))).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_same_starts_give_sklearns_clusters(seed):
    e = points(seed)
    start = e[np.random.default_rng(seed).choice(M, N, replace=False)]
    mu, labels, inertia = lloyd(e, start)
    theirs = KMeans(N, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(e)
    assert np.array_equal(labels, theirs.labels_)
    np.testing.assert_allclose(mu, theirs.cluster_centers_, rtol=1e-4, atol=1e-5)
    assert inertia == pytest.approx(theirs.inertia_, rel=1e-5)


def test_best_of_restarts_is_as_good_as_sklearns():
    e = points(1)
    inertia = kmeans(e, N, np.random.default_rng(0), 10)[2]
    assert inertia <= 1.001 * KMeans(N, n_init=10, random_state=0).fit(e).inertia_
    assert inertia <= kmeans(e, N, np.random.default_rng(0), 1)[2]


def test_result_is_a_fixed_point_that_no_single_move_betters():
    e = points(2)
    mu, labels, inertia = kmeans(e, N, np.random.default_rng(3), 2)
    brute = ((e[:, None].astype(np.float64) - mu[None]) ** 2).sum(-1)
    assert np.array_equal(labels, brute.argmin(1))
    assert inertia == pytest.approx(brute.min(1).sum(), rel=1e-5)
    for k in range(N):
        np.testing.assert_allclose(mu[k], e[labels == k].mean(0), rtol=1e-4, atol=1e-5)


def test_nearest_is_brute_force_with_ties_to_the_lowest_index():
    e, mu = points(4), points(5, N)
    labels, distance = nearest(e, mu)
    brute = ((e[:, None] - mu[None]) ** 2).sum(-1)
    assert np.array_equal(labels, brute.argmin(1))
    np.testing.assert_allclose(distance, brute.min(1), rtol=1e-4)
    mu = np.array([[1, 0], [0, 1], [1, 0]], np.float32)
    assert nearest(np.zeros((1, 2), np.float32), mu)[0] == [0]


def test_example_of_the_docstring_and_one_cluster_is_the_mean():
    e = np.array([[0], [1], [10], [11]], np.float32)
    mu, labels, inertia = kmeans(e, 2, np.random.default_rng(0), 3)
    assert sorted(mu.ravel().tolist()) == [0.5, 10.5] and inertia == pytest.approx(1)
    assert labels[0] == labels[1] != labels[2] == labels[3]
    np.testing.assert_allclose(kmeans(points(), 1, np.random.default_rng(0), 1)[0][0],
                               points().mean(0, dtype=np.float64), rtol=1e-5, atol=1e-6)


def test_inertia_never_rises(monkeypatch):
    e, start, inertia = points(6), points(7, N), []
    for n in range(1, 25):  # stopped after n rounds
        monkeypatch.setattr("kmeans.MAX_ITERATIONS", n)
        inertia.append(lloyd(e, start)[2])
    assert (np.diff(inertia) <= 1e-6 * inertia[0]).all() and inertia[-1] < 0.9 * inertia[0]


@pytest.mark.parametrize("order", range(3))
def test_same_start_gives_the_same_centroids_in_any_order_of_points(order):
    e = points(8)
    shuffled = e[np.random.default_rng(order).permutation(M)]
    for ours, theirs in zip(lloyd(e, e[:N])[0], lloyd(shuffled, e[:N])[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_empty_clusters_are_seeded_again():
    e = np.array([[0.0], [0.1], [5.0], [5.1], [90.0]], np.float32)
    far_away = np.array([[0.0], [1000.0], [2000.0]], np.float32)
    mu, labels, _ = lloyd(e, far_away)
    assert sorted(np.bincount(labels, minlength=3)) == [1, 2, 2]
    assert np.isfinite(mu).all()


@pytest.mark.parametrize("e", [np.ones((6, 3), np.float32),
                               np.array([[9.0], [1], [1], [1], [1], [1]], np.float32)])
def test_fewer_distinct_points_than_clusters_leaves_none_empty(e):
    mu, labels, inertia = kmeans(e, 6, np.random.default_rng(0), 2)
    assert sorted(labels) == list(range(6)) and np.isfinite(mu).all()
    assert inertia == pytest.approx(0)


def test_plus_plus_prefers_far_points_and_repeats_with_its_generator():
    e = np.concatenate([np.zeros((99, 1)), np.full((1, 1), 100.0)]).astype(np.float32)
    assert {float(x) for x in plus_plus(e, 2, np.random.default_rng(0)).ravel()} == {0.0, 100.0}
    assert np.array_equal(plus_plus(points(), N, np.random.default_rng(1)),
                          plus_plus(points(), N, np.random.default_rng(1)))


def test_impossible_requests_are_named():
    for n in (0, M + 1):
        with pytest.raises(ValueError, match=f"{n} clusters of {M} texts"):
            kmeans(points(), n, np.random.default_rng(0), 1)
    e = points()
    e[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 embeddings are not finite"):
        kmeans(e, N, np.random.default_rng(0), 1)


def test_purity_is_by_the_commonest_topic_and_closest_by_brute_force():
    found = purity(np.array([0, 0, 0, 1, 2, 2]), ["a", "a", "b", None, "d", "c"])
    assert found == [("a", 2, 3), (None, 0, 0), ("c", 1, 2)]      # of equal topics the first
    rng = np.random.default_rng(0)
    e, mu = rng.normal(size=(50, 7)).astype(np.float32), rng.normal(size=(3, 7)).astype(np.float32)
    distance = ((mu[:, None] - e) ** 2).sum(2)
    assert np.array_equal(closest(e, mu, 4), distance.argsort(1)[:, :4])
