"""model.py against transformers, torch's FLOP counter and the paper's Table 2."""
import json

import pytest
import torch
from conftest import FAMILIES, LLAMA3_ROPE, SIZES, edit_json, hook_gates, make_reference
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as llm

B = 2 * SIZES["num_hidden_layers"]
HARD = torch.tensor([True, False, False, True, True, True])
SOFT = torch.tensor([0.9, 0.2, 0.0, 0.7, 1.0, 0.4])
EACH = torch.rand(4, B, generator=torch.Generator().manual_seed(2))  # per sequence
EACH[1, 2] = 0                                                       # of one text alone


def load(folder, dtype=torch.float32):
    return llm.load(folder, "cpu", dtype)


@pytest.fixture
def model(checkpoint):
    return load(checkpoint()[0])


def logits(model, tokens, z=None, **kw):
    with torch.no_grad():
        return model.head(model(tokens, z, **kw))


def assert_logits(ours, reference, tokens):
    with torch.no_grad():
        wanted = reference(tokens).logits
    assert wanted.std() > 0.5  # a model whose logits are all alike would prove nothing
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("tied", "shards"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_equal_transformers(checkpoint, tokens, family, tied, shards):
    folder, reference = checkpoint(family, tied, shards)
    assert_logits(logits(load(folder), tokens), reference, tokens)


@pytest.mark.parametrize("z", [torch.ones(B), HARD, SOFT, EACH])
@pytest.mark.parametrize("family", FAMILIES)
def test_gated_logits_equal_transformers_with_hooks(checkpoint, tokens, family, z):
    folder, reference = checkpoint(family)
    ours = logits(load(folder), tokens, z)
    hook_gates(reference, z.float())
    assert_logits(ours, reference, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_z_equal_autograd_on_transformers(checkpoint, tokens, family):
    folder, reference = checkpoint(family)
    model = load(folder)
    z_ours, z_theirs = EACH.clone().requires_grad_(), EACH.clone().requires_grad_()
    hook_gates(reference, z_theirs)
    both = (model.head(model(tokens, z_ours)), z_ours), (reference(tokens).logits, z_theirs)
    for out, z in both:
        out.log_softmax(-1)[..., 5].mean().backward()
        assert z.grad.abs().min() > 1e-6
    torch.testing.assert_close(z_ours.grad, z_theirs.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_has_the_bits_of_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    ours, theirs = llm.RMSNorm(50, 1e-5), LlamaRMSNorm(50, 1e-5)
    ours.weight.data = theirs.weight.data = torch.linspace(0.3, 1.7, 50).to(dtype)
    x = torch.randn(500, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(ours(x), theirs(x)) and ours(x).dtype == dtype


class Launched(TorchDispatchMode):
    """Counts operations."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("cached", [False, True])
def test_a_closed_block_launches_nothing(checkpoint, tokens, cached):
    """As many operations as in a model of fewer layers."""
    counts = []
    for n, z in ((2, [1.0] * 4), (3, [0.9, 0.2, 0.0, 0.0, 1.0, 1.0])):
        model, z = load(checkpoint(num_hidden_layers=n)[0]), torch.tensor(z)
        cache = model.new_cache(4, 23, z) if cached else None
        with torch.no_grad(), Launched() as mode:
            model(tokens[:, :9], z, cache)
        counts.append(mode.n)
    assert counts[0] == counts[1] > 50


def test_a_closed_block_has_the_bits_of_one_multiplied_by_zero(model, tokens):
    """The first text's z is the same in both runs; the second's makes every block run in one."""
    runs = []
    for others in (SOFT - 0.3, torch.ones(B)):
        leaf = torch.stack((SOFT - 0.3, others)).requires_grad_()
        out = model.head(model(tokens[:2], leaf.clamp(0, 1)))[0]
        out.logsumexp(-1).sum().backward()
        runs.append((out, leaf.grad[0]))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    assert runs[0][1].count_nonzero() == 4


@pytest.mark.parametrize("shape", [(B - 1,), (3, B), (1, 4, B)])
def test_a_z_of_another_shape_is_refused(model, tokens, shape):
    with pytest.raises(ValueError, match="z is"):
        model(tokens, torch.ones(shape))


# ------------------------------------------------------------------ cache and generation


@pytest.mark.parametrize("keep_kv", [False, True])
@pytest.mark.parametrize("z", [None, HARD, SOFT, EACH])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_the_full_forward(checkpoint, tokens, family, z, keep_kv):
    """A prompt of 9 tokens, then a part of 5 and one of 2, then one by one; all in float32."""
    model = load(checkpoint(family)[0])
    cache = model.new_cache(4, 25, z, keep_kv)
    parts = tokens.split([9, 5, 2, *[1] * 7], dim=1)
    got = torch.cat([logits(model, part, z, cache=cache) for part in parts], dim=1)
    torch.testing.assert_close(got, logits(model, tokens, z), rtol=0, atol=1e-4)
    assert cache.length == 23


@pytest.mark.parametrize("family", FAMILIES)
def test_with_keep_kv_z_may_change_as_in_transformers(checkpoint, tokens, family):
    """Transformers always computes K and V: its cache under hooks that change after 9 tokens."""
    folder, reference = checkpoint(family)
    model, gates = load(folder), HARD.float()
    later = torch.tensor([False, True, True, True, True, False])
    cache = model.new_cache(4, 23, HARD, keep_kv=True)
    logits(model, tokens[:, :9], HARD, cache=cache)
    got = logits(model, tokens[:, 9:], later, cache=cache)
    hook_gates(reference, gates)
    with torch.no_grad():
        past = reference(tokens[:, :9], use_cache=True).past_key_values
        gates.copy_(later)
        wanted = reference(tokens[:, 9:], past_key_values=past).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_a_full_cache_and_an_attention_that_comes_back_are_refused(model, tokens):
    cache = model.new_cache(4, 22, HARD)
    logits(model, tokens[:, :9], HARD, cache=cache)
    with pytest.raises(ValueError, match=r"9 \+ 14 tokens do not fit a cache of 22"):
        logits(model, tokens[:, 9:], HARD, cache=cache)
    with pytest.raises(ValueError, match="keep_kv"):
        logits(model, tokens[:, 9:20], cache=cache)
    assert cache.length == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_what_its_kept_attentions_need(checkpoint, dtype):
    """K and V, 2 heads of 10, float32 on a CPU in either dtype; attention 1 of 3 is closed."""
    model = load(checkpoint()[0], dtype)
    for z, keep_kv, n in ((None, False, 3), (HARD, False, 2), (HARD, True, 3), (SOFT, False, 2)):
        kv = model.new_cache(4, 31, z, keep_kv).kv
        assert [x is None for x in kv] == [False, n == 2, False]
        assert sum(x.nbytes for x in kv if x is not None) == n * 2 * 4 * 2 * 31 * 10 * 4


@pytest.mark.parametrize("z", [None, HARD, SOFT])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers(checkpoint, family, z):
    folder, reference = checkpoint(family)
    model = load(folder)
    hook_gates(reference, torch.ones(B) if z is None else z.float())
    for prompt in ([3], [5, 9, 11, 3, 40]):
        got = list(llm.generate(model, prompt, model.new_cache(1, 35, z)))
        wanted = reference.generate(torch.tensor([prompt]), max_length=35, do_sample=False)
        assert prompt + got == wanted[0].tolist()


def test_generation_ends_with_eos_or_a_full_cache(checkpoint):
    """The ids of generation_config.json go before those of config.json, where it names any."""
    folder, _ = checkpoint()

    def text(file, ids):
        edit_json(folder / file, eos_token_id=ids)
        model = load(folder)
        return list(llm.generate(model, [3, 4], model.new_cache(1, 12)))

    text("config.json", None)
    free = text("generation_config.json", None)
    assert len(free) == 10 and free[0] != free[4]
    assert text("config.json", free[4]) == free[:free.index(free[4]) + 1]
    assert text("generation_config.json", [96, free[0]]) == free[:1]
    model = load(folder)
    with pytest.raises(ValueError, match="do not fit"):
        next(llm.generate(model, [3, 4], model.new_cache(1, 1)))


# ------------------------------------------------------------------ config.json


SCALING = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
UNNAMED = {k: v for k, v in SCALING.items() if k not in ("rope_type", llm.LLAMA3[-1])}


@pytest.mark.parametrize("change", [
    {"rope_scaling": SCALING},                                    # beside rope_parameters
    {"rope_scaling": {}},
    {"rope_scaling": UNNAMED | {"type": "llama3"}, "rope_theta": 700.0},
    {"rope_parameters": None, "rope_theta": 700.0},
    {"rope_parameters": LLAMA3_ROPE, "rope_theta": 700.0, llm.LLAMA3[-1]: 16},
    {"sliding_window": 4, "layer_types": ["full_attention"] * 3, "hidden_act": None},
])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fields_that_are_spelled_twice_are_read_as_transformers_reads_them(
        checkpoint, tokens, family, change):
    from transformers import AutoModelForCausalLM
    folder, _ = checkpoint(family)
    edit_json(folder / "config.json", **change)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_logits(logits(load(folder), tokens), reference, tokens)


@pytest.mark.parametrize(("change", "named"), [
    ({"model_type": "gemma2"}, "gemma2"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor"),
    ({"rope_scaling": "yarn"}, "'rope_parameters' with value 'yarn'"),
    ({"attention_bias": True}, "attention_bias"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": "48"}, "hidden_size.* '48'"),
    ({"vocab_size": None}, "do not fit config.json"),             # transformers' default is
    ({"num_key_value_heads": 4}, "num_key_value_heads=4"),
    ({"head_dim": 9}, "head_dim.*9"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings.* 'no'"),
])
def test_a_config_that_changes_the_forward_is_refused_by_name(checkpoint, change, named):
    folder, _ = checkpoint()
    edit_json(folder / "config.json", **change)
    with pytest.raises(llm.UserError, match=named):
        llm.check_weights(folder)


@pytest.mark.parametrize("ids", ["</s>", [2, None], True])
def test_end_of_text_ids_that_are_none_are_refused_by_name(checkpoint, ids):
    folder, _ = checkpoint()
    edit_json(folder / "generation_config.json", eos_token_id=ids)
    with pytest.raises(llm.UserError, match="/generation_config.json: eos_token_id is"):
        llm.read_config(folder)


def test_a_byte_order_mark_is_no_data_and_what_is_not_utf8_or_no_object_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert llm.read_json(path) == {"a": 1} and llm.read_text(path) == '{"a": 1}'
    for data, named in ((b"{\n\n\xff}", "x.json line 3 is not UTF-8"), (b"[1]", "x.json holds a"),
                        (b"{", "x.json is not JSON"), (b"[" * 10**5, "x.json is not JSON")):
        path.write_bytes(data)
        with pytest.raises(llm.UserError, match=named):
            llm.read_json(path)


# ------------------------------------------------------------------ weights


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "named"), [
    (lambda t: t.pop("model.norm.weight"), "Missing.*model.norm.weight"),
    (lambda t: t.update(extra=torch.ones(2)), "Unexpected.*extra"),
    (lambda t: t.update({"model.norm.weight": torch.ones(47)}), "model.norm.weight.*47.*48"),
    (lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}), "quantised"),
])
def test_wrong_tensors_are_named_before_a_weight_is_read(checkpoint, change, named):
    folder, _ = checkpoint()
    rewrite(folder, change)
    with pytest.raises(llm.UserError, match=named) as caught:
        llm.check_weights(folder)
    assert "\n" not in str(caught.value)


def test_more_layers_than_the_weights_hold_are_refused_before_they_are_made(checkpoint):
    folder, _ = checkpoint()
    edit_json(folder / "config.json", num_hidden_layers=10**12)
    with pytest.raises(llm.UserError, match="is 1000000000000, but there are 30 tensors"):
        llm.check_weights(folder)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("change", [
    lambda t: t.update({HEAD: t[EMBEDDING].clone()}),
    lambda t: t.update({HEAD: t.pop(EMBEDDING)}),
    lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}),
])
def test_a_tied_pair_may_have_either_name_and_old_buffers_are_left_aside(
        checkpoint, tokens, change):
    folder, reference = checkpoint(tied=True)
    rewrite(folder, change)
    assert_logits(logits(load(folder), tokens), reference, tokens)


def test_a_tied_model_with_a_head_of_its_own_is_refused(checkpoint):
    folder, _ = checkpoint(tied=True)
    rewrite(folder, lambda t: t.update({HEAD: t[EMBEDDING] + 0.01}))
    with pytest.raises(llm.UserError, match="set tie_word_embeddings to false"):
        load(folder)


def test_the_single_file_goes_before_an_index(checkpoint, tokens):
    folder, reference = checkpoint(shards=True)
    make_reference("llama", seed=1).save_pretrained(folder.parent / "new")
    (folder.parent / "new/model.safetensors").rename(folder / "model.safetensors")
    assert_logits(logits(load(folder), tokens), make_reference("llama", seed=1), tokens)


def test_truncated_file_missing_shard_and_path_outside_the_folder(checkpoint):
    folder, _ = checkpoint(shards=True)
    first = min(folder.glob("*.safetensors"))
    whole = first.read_bytes()
    (folder.parent / "outside.safetensors").write_bytes(whole)
    first.write_bytes(whole[:len(whole) // 2])
    index = folder / "model.safetensors.index.json"
    for file in (first.name, "gone.safetensors", "../outside.safetensors"):
        index.write_text(json.dumps({"weight_map": {"x": file}}))
        with pytest.raises(llm.UserError, match=file):
            load(folder)


def test_weights_arrive_in_the_wanted_dtype_and_frozen(checkpoint):
    for p in load(checkpoint()[0], torch.bfloat16).parameters():
        assert p.dtype == torch.bfloat16 and not p.requires_grad and not p.is_meta


# ------------------------------------------------------------------ cost

LLAMA3_8B = llm.Config("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, 5e5, None, False,
                       (128001,))
TABLE_2 = [  # blocks skipped: attention + FFN, TFLOP printed in the paper
    (0, 0, 32.94), (2, 0, 32.66), (14, 0, 31.01), (14, 2, 29.57), (15, 5, 27.27), (18, 8, 24.69)]


def cost(n_attention, n_ffn, rule="table2"):
    """TFLOP of 2048 tokens of Llama-3-8B without so many blocks."""
    z = torch.ones(64, dtype=torch.bool)
    z[0:2 * n_attention:2] = False
    z[1:2 * n_ffn:2] = False
    return llm.flops(LLAMA3_8B, 2048, z, rule) / 1e12


def test_table_2():
    """A consistency check only: the paper prints no counts, so these are the ones that fit.

    Two percentages beside them are too low: 99.1 and 74.9 % of the dense FLOPs.
    """
    for n_attention, n_ffn, tera in TABLE_2:
        assert abs(cost(n_attention, n_ffn) - tera) < 0.006
    assert [round(100 * cost(*n) / cost(0, 0), 1) for n in ((2, 0), (18, 8))] == [99.2, 75.0]


def test_whole_layers_cost_their_share_and_skipping_is_really_free():
    ratios = [cost(n, n, "free") / cost(0, 0) for n in (4, 8, 12)]
    assert [round(100 * r, 1) for r in ratios] == [88.3, 76.6, 64.9]
    with pytest.raises(ValueError, match="cheap"):
        cost(0, 0, "cheap")


@pytest.mark.parametrize(("config", "parameters", "tera"), [
    # model_type, d, L, h, h_kv, head_dim (None: not in the file), f, v, tied
    (("llama", 4096, 32, 32, 8, None, 14336, 128256, False), 8_030_261_248, 32.9381),
    (("llama", 4096, 32, 32, None, None, 11008, 32000, False), 6_738_415_616, 29.2616),
    (("llama", 3072, 28, 24, 8, 128, 8192, 128256, True), 3_212_749_824, 14.6018),
    (("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False), 8_190_735_360, 33.4728),
])
def test_published_families_have_their_parameters_and_flops(tmp_path, config, parameters, tera):
    """Sizes as the checkpoints' config.json print them; counts as their model cards do."""
    keys = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
            "tie_word_embeddings")
    (tmp_path / "config.json").write_text(json.dumps(dict(zip(keys, config, strict=True))))
    read = llm.read_config(tmp_path)
    with torch.device("meta"):
        model = llm.Transformer(read)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert llm.flops(read, 2048) / 1e12 == pytest.approx(tera, abs=6e-5)


@pytest.mark.parametrize("z", [None, HARD])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_equal_torchs_own_count(checkpoint, tokens, family, z):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    model = load(checkpoint(family)[0])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits(model, tokens, z)
    assert counter.get_total_flops() == len(tokens) * llm.flops(model.config, tokens.shape[1], z)
