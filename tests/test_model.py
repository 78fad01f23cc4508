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
EACH = torch.linspace(0.1, 1, 4 * B).view(4, B)               # per sequence
EACH[1, 2] = 0                                                # of one text alone


def load(folder, dtype=torch.float32):
    return llm.load(folder, "cpu", dtype)


def logits(model, tokens, z=None, **kw):
    with torch.no_grad():
        return model.head(model(tokens, z, **kw))


def assert_logits(ours, reference, tokens):
    with torch.no_grad():
        wanted = reference(tokens).logits
    assert wanted.std() > 0.5  # a model whose logits are all alike would prove nothing
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("z", "storage"), [
    (None, (False, False)),                                       # tied, in shards
    (HARD, (False, True)),
    (SOFT, (True, False)),
    (EACH, (True, True)),
])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_with_hooks(checkpoint, tokens, family, z, storage):
    folder, reference = checkpoint(family, *storage)
    ours = logits(load(folder), tokens, z)
    if z is not None:
        hook_gates(reference, z.float())
    assert_logits(ours, reference, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_z_and_greedy_text_equal_transformers(checkpoint, tokens, family):
    folder, reference = checkpoint(family)
    model = load(folder)
    ours, theirs = EACH.clone().requires_grad_(), EACH.clone().requires_grad_()
    hook_gates(reference, theirs)
    for out, z in ((model.head(model(tokens, ours)), ours), (reference(tokens).logits, theirs)):
        out.log_softmax(-1)[..., 5].mean().backward()
        assert z.grad.abs().min() > 1e-6
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    theirs.data = HARD.float().expand(4, -1)
    text = list(llm.generate(model, [5, 9], model.new_cache(1, 35, HARD)))
    ids = torch.tensor([[5, 9]] * 4)                              # a row for each row of z
    wanted = reference.generate(ids, max_length=35, do_sample=False)
    assert [5, 9, *text] == wanted[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_has_the_bits_of_transformers(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    ours, theirs = llm.RMSNorm(50, 1e-5), LlamaRMSNorm(50, 1e-5)
    weight = torch.linspace(0.3, 1.7, 50).to(dtype)
    ours.weight.data = theirs.weight.data = weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 50, generator=generator).to(dtype)
    assert ours(x).dtype == dtype
    assert torch.equal(ours(x), theirs(x))


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
    some = torch.tensor([0.9, 0.2, 0, 0, 1, 1])
    for n, z in ((2, torch.ones(4)), (3, some)):
        model = load(checkpoint(num_hidden_layers=n)[0])
        cache = model.new_cache(4, 23, z) if cached else None
        with torch.no_grad(), Launched() as mode:
            model(tokens[:, :9], z, cache)
        counts.append(mode.n)
    assert counts[0] == counts[1] > 50


def test_a_z_of_another_shape_is_refused(model, tokens):
    for shape in ((B - 1,), (3, B), (1, 4, B)):
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
    got = [logits(model, part, z, cache=cache) for part in parts]
    whole = logits(model, tokens, z)
    torch.testing.assert_close(torch.cat(got, 1), whole, rtol=0, atol=1e-4)


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
    for z, keep_kv in ((None, False), (HARD, False), (HARD, True)):
        first, second, third = model.new_cache(4, 31, z, keep_kv).kv
        assert first.nbytes == third.nbytes == 2 * 4 * 2 * 31 * 10 * 4
        assert (second is None) == (z is HARD and not keep_kv)


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


# ------------------------------------------------------------------ config.json


SCALING = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
UNNAMED = {k: v for k, v in SCALING.items() if k not in ("rope_type", llm.LLAMA3[-1])}


@pytest.mark.parametrize("change", [
    {"rope_scaling": SCALING},                                    # beside rope_parameters
    {"rope_scaling": {}},
    {"rope_scaling": UNNAMED | {"type": "llama3"}, "rope_theta": 700.0},
    {"rope_parameters": None, "rope_theta": 700.0},
    {"rope_parameters": LLAMA3_ROPE, "rope_theta": 700.0, llm.LLAMA3[-1]: 16},
    {"rope_parameters": LLAMA3_ROPE, "rope_type": "default", "factor": 2.0},
    {"sliding_window": 4, "layer_types": ["full_attention"] * 3, "hidden_act": "swish"},
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
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but"),
    ({"eos_token_id": "</s>"}, "generation_config.json: eos_token_id is"),
    ({"eos_token_id": [2, None]}, "generation_config.json: eos_token_id is"),
    ({"eos_token_id": True}, "generation_config.json: eos_token_id is"),
])
def test_a_config_that_changes_the_forward_is_refused_by_name(checkpoint, change, named):
    folder, _ = checkpoint()
    file = "generation_config.json" if "eos_token_id" in change else "config.json"
    edit_json(folder / file, **change)
    with pytest.raises(llm.UserError, match=named):
        llm.check_weights(folder)


def test_a_byte_order_mark_is_no_data_and_what_is_not_utf8_or_no_object_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert llm.read_json(path) == {"a": 1}
    for data, named in (
            (b"{\n\n\xff}", "x.json line 3 is not UTF-8"),
            (b"[1]", "x.json holds a"),
            (b"{", "x.json is not JSON"),
            (b"[" * 10**5, "x.json is not JSON")):
        path.write_bytes(data)
        with pytest.raises(llm.UserError, match=named):
            llm.read_json(path)


# ------------------------------------------------------------------ weights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm.weight"


def rewrite(folder, changes):
    """Replaces tensors of a checkpoint; None removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: x for name, x in tensors.items() if x is not None}, path)


@pytest.mark.parametrize(("changes", "named"), [
    ({NORM: None}, f"Missing.*{NORM}"),
    ({"extra": torch.ones(2)}, "Unexpected.*extra"),
    ({NORM: torch.ones(47)}, f"{NORM}.*47.*48"),
    ({NORM: torch.ones(48).byte()}, "quantised"),
])
def test_wrong_tensors_are_named_before_a_weight_is_read(checkpoint, changes, named):
    folder, _ = checkpoint()
    rewrite(folder, changes)
    with pytest.raises(llm.UserError, match=named) as caught:
        llm.check_weights(folder)
    assert "\n" not in str(caught.value)


def test_more_layers_than_the_weights_hold_are_refused_before_they_are_made(checkpoint):
    folder, _ = checkpoint()
    edit_json(folder / "config.json", num_hidden_layers=10**8)
    with pytest.raises(llm.UserError, match="is 100000000, but there are 30 tensors"):
        llm.check_weights(folder)


def test_a_tied_pair_may_have_either_name_and_old_buffers_are_left_aside(checkpoint, tokens):
    folder, reference = checkpoint(tied=True)
    head = reference.lm_head.weight.detach().clone()
    for changes in (
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)},
            {HEAD: head},
            {EMBEDDING: None}):
        rewrite(folder, changes)
        assert_logits(logits(load(folder), tokens), reference, tokens)
    rewrite(folder, {EMBEDDING: head + 0.01})
    with pytest.raises(llm.UserError, match="set tie_word_embeddings to false"):
        load(folder)


def test_the_single_file_goes_before_an_index(checkpoint, tokens):
    folder, _ = checkpoint(shards=True)
    newer = make_reference("llama", seed=1)
    newer.save_pretrained(folder.parent / "new")
    (folder.parent / "new/model.safetensors").rename(folder / "model.safetensors")
    assert_logits(logits(load(folder), tokens), newer, tokens)


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
        assert p.dtype == torch.bfloat16
        assert not p.requires_grad and not p.is_meta


# ------------------------------------------------------------------ cost

LLAMA3_8B = llm.Config("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, 5e5, None, False,
                       (128001,))
TABLE_2 = [  # blocks skipped: attention + FFN, TFLOP printed in the paper
    (0, 0, 32.94),
    (2, 0, 32.66),
    (14, 0, 31.01),
    (14, 2, 29.57),
    (15, 5, 27.27),
    (18, 8, 24.69)]


def cost(n_attention, n_ffn, rule="table2"):
    """TFLOP of 2048 tokens of Llama-3-8B without so many blocks."""
    z = torch.ones(32, 2, dtype=torch.bool)
    z[:n_attention, 0] = z[:n_ffn, 1] = False
    return llm.flops(LLAMA3_8B, 2048, z.flatten(), rule) / 1e12


def test_table_2():
    """A consistency check only: the paper prints no counts, so these are the ones that fit.

    Two percentages beside them are too low: 99.1 and 74.9 % of the dense FLOPs.
    """
    for n_attention, n_ffn, tera in TABLE_2:
        assert abs(cost(n_attention, n_ffn) - tera) < 0.006
    for skipped, percent in (((2, 0), 99.2), ((18, 8), 75.0)):
        assert round(100 * cost(*skipped) / cost(0, 0), 1) == percent


def test_whole_layers_cost_their_share_and_skipping_is_really_free():
    ratio = cost(8, 8, "free") / cost(0, 0)
    assert round(100 * ratio, 1) == 76.6
    with pytest.raises(KeyError, match="cheap"):
        cost(0, 0, "cheap")


# Sizes as the checkpoints' config.json print them; counts as their model cards do.
@pytest.mark.parametrize(("config", "parameters", "tera"), [
    ('{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 128256,'
     ' "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}',
     8_030_261_248, 32.9381),
    ('{"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000,'
     ' "num_attention_heads": 32, "intermediate_size": 11008}',
     6_738_415_616, 29.2616),
    ('{"model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "vocab_size": 128256,'
     ' "num_attention_heads": 24, "num_key_value_heads": 8, "intermediate_size": 8192,'
     ' "head_dim": 128, "tie_word_embeddings": true}',
     3_212_749_824, 14.6018),
    ('{"model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936,'
     ' "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288,'
     ' "head_dim": 128}',
     8_190_735_360, 33.4728),
])
def test_published_families_have_their_parameters_and_flops(tmp_path, config, parameters, tera):
    (tmp_path / "config.json").write_text(config)
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
    b, t = tokens.shape
    assert counter.get_total_flops() == b * llm.flops(model.config, t, z)
