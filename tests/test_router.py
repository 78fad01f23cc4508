"""router.py against brute force, transformers and torch's FLOP counter."""
import numpy as np
import pytest
import torch
from conftest import WORDS
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

import hub
import router as routing
from evaluate import picture
from model import UserError

N, B, d_e = 5, 6, 24
LONG = " ".join(WORDS * 5)                                        # more than 256 word pieces
ONES = torch.ones(N, B)


@pytest.fixture
def router():
    torch.manual_seed(0)
    mu, log_alpha = torch.randn(N, d_e), torch.randn(N, B)
    identity = {"model": "tiny", "files": {}}
    return routing.Router(mu, log_alpha > 0, log_alpha, identity)


@pytest.fixture
def path(router, tmp_path):
    routing.save(router, tmp_path / "file")
    return tmp_path / "file"


@pytest.fixture
def folder(home):
    return hub.encoder_folder()


@pytest.fixture
def encoder(folder):
    return routing.open_encoder(folder, "cpu", torch.float32)


def test_route_is_brute_force(router):
    e = torch.randn(200, d_e)
    brute = torch.cdist(e, router.mu).argmin(1)
    assert torch.equal(routing.route(router, e.numpy()), brute)
    with pytest.raises(UserError, match="7 wide, the router's centroids 24"):
        routing.route(router, np.ones((1, 7)))


def test_save_and_load_are_exact_and_the_bytes_repeat(router, path):
    for name, x in load_file(path).items():
        assert torch.equal(x, getattr(router, name))
    again, data = routing.load(path), path.read_bytes()
    assert again.identity == router.identity
    again.identity = dict(reversed(again.identity.items()))       # in another order
    routing.save(again, path)
    assert path.read_bytes() == data
    save_file(load_file(path), path)                              # as one may write it by hand
    assert routing.load(path).identity == {}


@pytest.mark.parametrize("name, x", [
    ("mu", torch.ones(N)),
    ("mu", ONES[:1]),
    ("mu", ONES.int()),
    ("mu", ONES / 0),
    ("z", ONES.byte()),
    ("z", ONES[:, :0].bool()),
    ("z", (3 * ONES).byte().view(torch.bool))])
def test_tensors_that_are_no_router_are_refused(path, name, x):
    save_file(load_file(path) | {name: x}, path)
    with pytest.raises(UserError, match="file is no router: expected mu"):
        routing.load(path)


def test_files_that_are_none_are_named(tmp_path):
    for bad in (tmp_path, tmp_path / "gone", __file__):
        with pytest.raises(UserError, match=f"{bad} is no readable router"):
            routing.load(bad)
    with pytest.raises(UserError, match=f"the sentence encoder in {tmp_path} cannot be opened"):
        routing.open_encoder(tmp_path, "cpu", torch.float32)


def test_encode_is_the_normalised_mean_of_transformers(folder, encoder):
    bert = AutoModel.from_pretrained(folder)
    for text in ["w1", "w7 w7 w2", LONG]:
        pieces = encoder.tokenizer(text, truncation=True, return_tensors="pt")
        mean = bert(**pieces).last_hidden_state.mean(1).detach()
        [e] = routing.encode(encoder, [text])
        np.testing.assert_allclose(e, mean[0] / mean.norm(), atol=2e-6)


def test_encoder_flops_are_torchs_own_count(folder, encoder):
    bert = AutoModel.from_pretrained(folder, add_pooling_layer=False, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        bert(torch.arange(5, 8)[None])                            # [CLS] w1 [SEP]
        bert(torch.arange(256)[None] % 85)
    assert counter.get_total_flops() == routing.encoder_flops(encoder, ["w1", LONG])


def test_the_demonstration(router, path, home, monkeypatch, capsys):
    router.mu[3] = 0                                              # embeddings have length 1
    routing.save(router, path)
    monkeypatch.setattr("sys.argv", ["router.py", "w1 w2", "--router", str(path)])
    routing.main()
    assert capsys.readouterr().out == f"k* = 3 of 5\n{picture(router.z[3])}\n"
