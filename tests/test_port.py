"""The porter's kit is what today's code makes, the NumPy port agrees, and mistakes are named."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

KIT = ROOT / "tests/golden/port"
sys.path.insert(0, str(KIT))
import check  # noqa: E402
import make  # noqa: E402
import numpy_port  # noqa: E402
import write  # noqa: E402

MANIFEST = check.read_manifest()
ROWS, EXPECTED = MANIFEST["vectors"], check.read(KIT / "expected.safetensors")
PLANTED = [line for line in (KIT / "planted.txt").read_text().splitlines() if line[0] != "#"]


def test_the_kit_is_what_todays_code_makes(tmp_path):
    make.main(tmp_path)
    assert sum(path.stat().st_size for path in KIT.rglob("*.*")) < 2e6
    for name in ("inputs.json", "manifest.json", "llama/model.safetensors",
                 "qwen3/model.safetensors", "inputs.safetensors"):
        assert (tmp_path / name).read_bytes() == (KIT / name).read_bytes(), name
    found = check.read(tmp_path / "expected.safetensors")
    assert max(check.used(found, ROWS, EXPECTED).values()) < 1 / 3
    found, kept = (check.read(x / "mistakes.safetensors") for x in (tmp_path, KIT))
    assert found.keys() == kept.keys()
    assert {key.split("|")[0] for key in kept} == set(MANIFEST["mistakes"])
    page = (ROOT / "docs/porting.md").read_text(encoding="utf-8")
    assert len(page.splitlines()) <= 120
    for text in (f"{len(ROWS)} expected arrays", f"{len(MANIFEST['mistakes'])} usual mistakes"):
        assert text in page


def test_the_exit_status_and_what_is_read(tmp_path, capsys):
    assert check.main(tmp_path) == 2
    np.save(tmp_path / "loss.npy", np.float64(EXPECTED["loss"][0]))
    x0 = torch.tensor(EXPECTED["llama.x0"]).bfloat16()            # a bf16 file is read too
    save_file({"llama.x0": x0}, tmp_path / "a.safetensors")
    assert check.main(tmp_path) == 0
    np.save(tmp_path / "llama.q.npy", EXPECTED["llama.q"] * 2)
    np.save(tmp_path / "llama.hidden.npy", EXPECTED["llama.hidden"] + 1)
    assert check.main(tmp_path) == 1
    out = capsys.readouterr().out
    assert "FIRST DEVIATION: llama.q " in out and "all is 2 times" in out


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_port_uses_a_third_of_its_tolerances(dtype):
    shares = check.used(write.vectors(numpy_port, dtype), ROWS, EXPECTED)
    assert len(shares) == len(ROWS)
    assert max(shares.values()) < 1 / 3


@pytest.mark.parametrize("line", PLANTED)
@pytest.mark.filterwarnings("ignore")
def test_a_planted_mistake_is_found_at_its_place_and_named(line):
    place, mistake, changes = map(str.strip, line.split(" | ", 2))
    source = (ROOT / "tests/golden/port/numpy_port.py").read_text(encoding="utf-8")
    for change in changes.split(" && "):
        old, _, new = change.partition(" =>")
        assert old in source
        source = source.replace(old, new.strip())
    port = {"__name__": "numpy_port", "__file__": numpy_port.__file__}
    exec(source, port)
    found, shares = {}, {"": 0}
    for part in write.parts(SimpleNamespace(**port), np.float32):
        if max(shares.values()) > 1:                               # later ones are not the first
            break
        found |= {name: np.asarray(value) for name, value in part.items()}
        shares = check.used(found, ROWS, EXPECTED)
    row, _ = check.first_deviation(shares, ROWS)
    names = [name for _, name in check.lookalikes(found[row["name"]], EXPECTED[row["name"]], row)]
    assert (row["name"], names[0]) == (place, mistake)


def test_scores_of_the_harness_need_weights_and_ids_only():
    """The first rows of each task and BOS policy, scored by the NumPy port."""
    model = numpy_port.open_model("../model", np.float32)
    lines = [map(json.loads, (KIT.parent / name).open()) for name in
             ("requests.jsonl", "scores.jsonl")]
    requests, scores = lines[0], [line for line in lines[1] if "row" in line]
    for request, line in zip(requests, scores, strict=True):
        assert all(request[key] == line[key] for key in ("task", "row", "bos"))
        if line["row"] < 3:
            found = sum((numpy_port.log_p(model, *group) for group in request["groups"]), [])
            np.testing.assert_allclose(found, line["loglikelihood"], atol=1e-3, rtol=1e-5)
            acc = [np.argmax(found) == request["gold"]]
            if request["characters"]:
                per_character = np.divide(found, request["characters"])
                acc.append(np.argmax(per_character) == request["gold"])
            assert acc == [line["acc"], line["acc_norm"]][:len(acc)]
