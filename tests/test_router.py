"""router.py against brute force, scikit-learn and transformers."""
import numpy as np
import pytest
import torch
from conftest import WORDS
from safetensors.torch import load_file, save_file
from sklearn.neighbors import NearestCentroid

import router as routing

N, B, d_e = 5, 6, 24


def make_router(seed=0):
    g = torch.Generator().manual_seed(seed)
    return routing.Router(torch.randn(N, d_e, generator=g), torch.rand(N, B, generator=g) < 0.7,
                          torch.randn(N, B, generator=g), {"seed": seed, "model": "tiny"})


def embeddings(n=200):
    return np.random.default_rng(1).normal(size=(n, d_e)).astype(np.float32)


def test_route_is_brute_force_and_sklearns_nearest_centroid():
    router, e = make_router(), embeddings()
    k = routing.route(router, e).numpy()
    brute = ((e[:, None] - router.mu.numpy()[None]) ** 2).sum(-1).argmin(1)
    assert np.array_equal(k, brute) and len(set(k)) == N
    theirs = NearestCentroid().fit(router.mu.numpy(), np.arange(N))
    assert np.array_equal(k, theirs.predict(e))


def test_distance_not_cosine_and_ties_go_to_the_lowest():
    mu = torch.zeros(3, d_e)
    mu[0, 0], mu[1, 0], mu[2, 0] = 9.0, 0.9, 0.9  # 0 and 1 have the same direction
    router = routing.Router(mu, torch.ones(3, B, dtype=torch.bool), torch.zeros(3, B), {})
    e = np.zeros((1, d_e), np.float32)
    e[0, 0] = 1
    assert routing.route(router, e).tolist() == [1]
    with pytest.raises(ValueError, match="7 wide"):
        routing.route(router, np.zeros((1, 7), np.float32))


def test_save_and_load_are_exact_and_the_bytes_repeat(tmp_path):
    router = make_router()
    router.log_alpha[3] = torch.nan  # a cluster not trained yet
    for name in ("a", "b"):
        routing.save(router, tmp_path / name)
    again = routing.load(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for key in ("mu", "z", "log_alpha"):
        assert torch.equal(getattr(again, key).nan_to_num(7), getattr(router, key).nan_to_num(7))
    assert again.identity == router.identity
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]  # no temporary files


def test_a_router_made_by_hand_loads(tmp_path):
    z = torch.tensor([[True, False, True, True, True, False]])
    save_file({"mu": torch.zeros(1, d_e), "z": z, "log_alpha": z.float()},
              tmp_path / "r.safetensors")
    router = routing.load(tmp_path / "r.safetensors")
    assert torch.equal(router.z, z) and router.identity == {}
    assert routing.route(router, embeddings(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("change", [
    lambda t: t.pop("mu"),
    lambda t: t.update(z=t["z"].float()),
    lambda t: t.update(mu=t["mu"][:3].clone()),
    lambda t: t.update(log_alpha=t["log_alpha"][:, :2].clone()),
])
def test_files_that_are_no_router_are_named(tmp_path, change):
    path = tmp_path / "r.safetensors"
    routing.save(make_router(), path)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"r\.safetensors"):
        routing.load(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"r\.safetensors"):
        routing.load(path)
    with pytest.raises(ValueError, match="gone"):
        routing.load(tmp_path / "gone")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    routing.write(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(routing.os, "fsync", full)
    with pytest.raises(ValueError, match="file cannot be written .No space left on device"):
        routing.write(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_encode_is_the_normalised_mean_of_the_backbone(encoder):
    from transformers import AutoModel, AutoTokenizer
    texts = [" ".join(WORDS[i:i + 3 * i + 1]) for i in range(9)] + [" ".join(WORDS * 5)]
    e = routing.encode(routing.open_encoder(encoder, "cpu", torch.float32), texts)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    bert = AutoModel.from_pretrained(encoder).eval()
    for text, row in zip(texts, e, strict=True):
        batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            mean = bert(**batch).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, torch.nn.functional.normalize(mean, dim=0), atol=2e-6)
    assert e.dtype == np.float32 and e.shape == (10, 24)
    assert np.abs(e[0] - e[5]).max() > 0.05


def test_encode_takes_a_folder_never_a_hub_name(tmp_path):
    for name in ("sentence-transformers/all-MiniLM-L6-v2", tmp_path):
        with pytest.raises(ValueError, match="no folder of a sentence-transformers model"):
            routing.open_encoder(name, "cpu", torch.float32)


def test_encoder_flops_equal_torchs_own_count(encoder):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModel
    bert = AutoModel.from_pretrained(encoder, add_pooling_layer=False,
                                     attn_implementation="eager").eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        bert(torch.arange(5, 36)[None])
    assert counter.get_total_flops() == routing.encoder_flops(encoder, 31)
    assert routing.encoder_flops(encoder, 256) == routing.encoder_flops(encoder, 9000)


@pytest.mark.parametrize("change", ["mu", "z", "identity"])
def test_a_router_with_impossible_values_is_refused(tmp_path, change):
    mu, z = torch.ones(2, 3), torch.ones(2, 4, dtype=torch.bool)
    if change == "mu":
        mu[1, 2] = torch.inf
    if change == "z":
        z.view(torch.uint8)[0, 1] = 3                             # neither false nor true
    identity = [] if change == "identity" else {}
    routing.save(routing.Router(mu, z, torch.zeros(2, 4), identity), tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match="r.safetensors is damaged"):
        routing.load(tmp_path / "r.safetensors")


def test_an_encoder_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ValueError, match="the sentence encoder in .* cannot be opened"):
        routing.open_encoder(tmp_path, "cpu", torch.float32)
