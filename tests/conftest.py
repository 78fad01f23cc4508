"""One thread, the root on the path, `--embedded`, and the small models of the tests."""
import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import hub  # noqa: E402
import model as llm  # noqa: E402
import router as routing  # noqa: E402

# Every axis has a size of its own, so that a swapped one cannot pass; 6 * 10 heads are not 48 wide.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = ("llama", "llama3-scaled", "qwen3")


def pytest_addoption(parser):
    parser.addoption("--embedded", action="store_true",
                     help="also test the embedded default, which is downloaded")


def pytest_configure(config):
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"                           # of torchrun's processes
    config.addinivalue_line("markers", "embedded: needs the embedded default's files, or is long")
    if not config.option.embedded:
        config.option.markexpr = config.option.markexpr or "not embedded"


def make_reference(family: str, tied: bool = False, seed: int = 0, **sizes):
    """A random float32 transformers model with weights large enough to tell mistakes apart."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
    kind, config = ((Qwen3ForCausalLM, Qwen3Config) if family == "qwen3"
                    else (LlamaForCausalLM, LlamaConfig))
    rope = LLAMA3_ROPE if family == "llama3-scaled" else {"rope_type": "default", "rope_theta": 5e3}
    torch.manual_seed(seed)
    model = kind(config(**SIZES | sizes, tie_word_embeddings=tied, rope_parameters=dict(rope)))
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.15)
    return model.eval()


def make_golden_model():
    """The transformers model of tests/golden, whose tokenizer has 400 tokens."""
    return make_reference("llama", seed=7, vocab_size=400, max_position_embeddings=512)


def hook_gates(reference, z):
    """Multiplies every block's output by its z (B,) or (b, B), inside the transformers model."""
    for i, layer in enumerate(reference.model.layers):
        layer.self_attn.register_forward_hook(
            lambda _m, _a, out, i=i: (out[0] * z[..., 2 * i, None, None], *out[1:]))
        layer.mlp.register_forward_hook(
            lambda _m, _a, out, i=i: out * z[..., 2 * i + 1, None, None])


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(family, tied, shards) -> (folder, the transformers model saved there)."""
    def make(family="llama", tied=False, shards=False, **sizes):
        reference = make_reference(family, tied, **sizes)
        folder = tmp_path / f"{family}-{tied}-{shards}"
        reference.save_pretrained(folder, max_shard_size="40KB" if shards else "1GB")
        return folder, reference
    return make


@pytest.fixture
def model(checkpoint):
    """Ours, of the llama that `make_reference` makes."""
    return llm.load(checkpoint()[0], "cpu", torch.float32)


@pytest.fixture
def tokens():
    return torch.arange(92).view(4, 23)


def edit_json(path, **changes):
    """Rewrites fields of a JSON file; None removes a field."""
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


WORDS = [f"w{i}" for i in range(80)]


def make_tokenizer(bos: bool = False):
    """A word-level tokenizer whose ids fit SIZES; w0 .. w79, with <bos> in front if asked."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    vocab = {"<unk>": 0, "<bos>": 1, **{word: i + 2 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


# One row of each task in the hub's schema, with its footguns.
ROWS = json.loads("""{
"openbookqa": {"question_stem": "Atomic 26 is drawn to a device, it could be", "answerKey": "B",
 "choices": {"text": ["wood", "magnetized"], "label": ["A", "B"]}},
"winogrande": {"option1": "Samantha", "option2": "Rebecca", "answer": "2", "sentence":
 "People think _ is embarassed, because Samantha made snide comments about the shirt Rebecca was \
wearing. "},
"hellaswag": {"activity_label": " Roof shingle removal", "ctx_a": "A man [header] sits.  He",
 "ctx_b": "STARTS Up [title] now", "endings": ["[substeps] Ask him.", "is   up."], "label": "1"},
"piqa": {"goal": "Remove seeds from  strawberries", "sol1": "use a straw", "sol2": "no ",
 "label": 0},
"arc_easy": {"question": "Which is the function of the gallbladder?", "answerKey": "1",
 "choices": {"text": ["store bile", "b", "c"], "label": ["1", "2", "3"]}},
"arc_challenge": {"question": "Q", "answerKey": " E",
 "choices": {"text": ["v", "w", "x", "y", "z"], "label": ["A", "B", "C", "D", "E"]}}
}""")


def make_encoder(folder):
    """A tiny random sentence encoder: BERT, mean pooling, normalisation; returns its folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    from sentence_transformers.sentence_transformer.modules import Transformer as Backbone
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder.mkdir(exist_ok=True)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocab))
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=85, hidden_size=24, num_hidden_layers=2,
                                num_attention_heads=3,
                                intermediate_size=40, max_position_embeddings=300))
    torch.nn.init.normal_(bert.embeddings.word_embeddings.weight)
    bert.save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    backbone = Backbone(str(folder / "bert"), max_seq_length=256)
    modules = [backbone, Pooling(24), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "st"))
    return folder / "st"


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The folder of `make_home`, to be left as it is."""
    root = tmp_path_factory.mktemp("home")
    make_home(root)
    return root


@pytest.fixture(scope="module")
def home(made):
    """The same, while its cache is the program's; an encoder is opened once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "CACHE", made / "cache")
        patch.setattr(routing, "open_encoder", functools.cache(routing.open_encoder))
        yield made


def make_home(root):
    """root/cache, a stand-in for ~/.cache/ig-pruning with tiny models, which is returned.

    Beside it root/model in shards with an index, root/texts.jsonl, root/tasks, and root/torch, the
    code of 60 functions.
    """
    cache, rng = root / "cache", np.random.default_rng(0)
    cache.mkdir(parents=True)
    make_encoder(root / "encoder").rename(cache / "all-MiniLM-L6-v2")
    for folder in (root / "model", cache / "SmolLM2-135M-Instruct"):
        deep = make_reference("llama", num_hidden_layers=8)       # layers enough for every rival
        deep.save_pretrained(folder, max_shard_size="160KB")
        make_tokenizer().save(str(folder / "tokenizer.json"))
    leads = {}
    for i in range(300):
        words = rng.choice(WORDS[i % 2 * 40:i % 2 * 40 + 40], size=rng.integers(6, 30))
        leads[str(i)] = {"title": f"T{i}", "description": f"w{i % 80} w{i % 7}",
                         "topic": "AB"[i % 2], "extract": " ".join(words)}
    (cache / "summaries_en-us.json").write_text(json.dumps(leads))
    texts = [json.dumps({"text": lead["extract"]}) for lead in leads.values()]
    (root / "texts.jsonl").write_text("\n".join(texts[:60]) + "\n")
    for folder in ("tasks", "torch/nn"):
        (root / folder).mkdir(parents=True)
    functions = [f"def w{i}():\n    return {'w1 + ' * i}0\n\n" for i in range(30, 90)]
    (root / "torch/nn/a.py").write_text("".join(functions))
    for task, row in ROWS.items():
        (root / f"tasks/{task}.jsonl").write_text(f"{json.dumps(row)}\n" * 5)
    return cache
