"""model.py against transformers, torch's FLOP counter and the paper's Table 2."""
import json

import pytest
import torch
from conftest import FAMILIES, LLAMA3_ROPE, SIZES, edit_json, hook_gates, make_reference
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import hub
import model as llm

B = 2 * SIZES["num_hidden_layers"]
HARD = torch.tensor([True, False, False, True, True, True])
SOFT = torch.tensor([0.9, 0.2, 0.0, 0.7, 1.0, 0.4])


def logits(model, tokens, z=None, **kw):
    with torch.no_grad():
        return model.head(model(tokens, z, **kw))


def assert_logits(ours, reference, tokens):
    with torch.no_grad():
        wanted = reference(tokens).logits
    assert wanted.std() > 0.5  # a model whose logits are all alike would prove nothing
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_logits_equal_transformers(checkpoint, tokens, family, tied, shards):
    folder, reference = checkpoint(family, tied, shards)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == shards
    assert_logits(logits(llm.load(folder, "cpu", torch.float32), tokens), reference, tokens)


@pytest.mark.parametrize("z", [HARD, SOFT, "per sequence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gated_logits_equal_transformers_with_hooks(checkpoint, tokens, family, z):
    folder, reference = checkpoint(family)
    if isinstance(z, str):
        z = torch.rand(len(tokens), B, generator=torch.Generator().manual_seed(2))
    ours = logits(llm.load(folder, "cpu", torch.float32), tokens, z)
    hook_gates(reference, z.float())
    assert_logits(ours, reference, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_z_equal_autograd_on_transformers(checkpoint, tokens, family):
    folder, reference = checkpoint(family)
    model = llm.load(folder, "cpu", torch.float32)
    z_ours = torch.rand(len(tokens), B, generator=torch.Generator().manual_seed(3)).requires_grad_()
    z_theirs = z_ours.detach().clone().requires_grad_()
    hook_gates(reference, z_theirs)
    both = (model.head(model(tokens, z_ours)), z_ours), (reference(tokens).logits, z_theirs)
    for out, z in both:
        loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        assert z.grad.abs().min() > 1e-6
    torch.testing.assert_close(z_ours.grad, z_theirs.grad, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_all_ones_is_the_dense_model(checkpoint, tokens):
    model = llm.load(checkpoint()[0], "cpu", torch.float32)
    dense = logits(model, tokens)
    for z in (torch.ones(B, dtype=torch.bool), torch.ones(B), torch.ones(len(tokens), B)):
        assert torch.equal(logits(model, tokens, z), dense)


def test_a_skipped_block_runs_nothing(checkpoint, tokens):
    model = llm.load(checkpoint()[0], "cpu", torch.float32)
    for i, layer in enumerate(model.model.layers):  # weights that would spoil the result if used
        for block, kept in zip((layer.self_attn, layer.mlp), HARD[2 * i:2 * i + 2], strict=True):
            if not kept:
                for p in block.parameters():
                    p.fill_(torch.nan)
    assert logits(model, tokens, HARD).isfinite().all()
    assert logits(model, tokens).isnan().any()


def test_positions_and_attend_default_to_the_causal_case(checkpoint, tokens):
    model = llm.load(checkpoint()[0], "cpu", torch.float32)
    b, t = tokens.shape
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    given = logits(model, tokens, positions=torch.arange(t).expand(b, t), attend=causal)
    torch.testing.assert_close(given, logits(model, tokens), rtol=0, atol=1e-5)
    # Two texts packed into one sequence, each seeing only itself and counting from 0.
    packed = torch.cat((tokens[:1, :9], tokens[1:2, :14]), dim=1)
    block = torch.block_diag(torch.ones(9, 9), torch.ones(14, 14)).bool() & causal
    positions = torch.cat((torch.arange(9), torch.arange(14)))[None]
    got = logits(model, packed, positions=positions, attend=block)
    torch.testing.assert_close(got[:, 9:], logits(model, tokens[1:2, :14]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("z", [torch.ones(B - 1), torch.ones(3, B),
                               torch.ones(B, dtype=torch.int64),
                               torch.ones(4, B, dtype=torch.bool)])
def test_a_z_of_another_shape_is_refused(checkpoint, tokens, z):
    model = llm.load(checkpoint()[0], "cpu", torch.float32)
    with pytest.raises(ValueError, match="z is"):
        model(tokens, z)


# ------------------------------------------------------------------ cache and generation


def stepwise(model, tokens, z, cache, parts):
    """Logits of tokens that go through the cache in `parts`, each a number of them."""
    out = [logits(model, part, z, cache=cache) for part in tokens.split(parts, dim=1)]
    assert cache.length == tokens.shape[1] == sum(parts)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("keep_kv", [False, True])
@pytest.mark.parametrize("z", [None, HARD, SOFT, "per sequence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_the_full_forward(checkpoint, tokens, family, z, keep_kv):
    """A prompt of 9 tokens, then a part of 5 and one of 2, then one by one; all in float32."""
    model = llm.load(checkpoint(family)[0], "cpu", torch.float32)
    if isinstance(z, str):
        z = torch.rand(len(tokens), B, generator=torch.Generator().manual_seed(2))
    cache = model.new_cache(len(tokens), 25, z, keep_kv)
    got = stepwise(model, tokens, z, cache, [9, 5, 2, *[1] * 7])
    torch.testing.assert_close(got, logits(model, tokens, z), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_keep_kv_z_may_change_as_in_transformers(checkpoint, tokens, family):
    """Transformers always computes K and V: its cache under hooks that change after 9 tokens."""
    folder, reference = checkpoint(family)
    model, z = llm.load(folder, "cpu", torch.float32), HARD.float()
    later = torch.tensor([False, True, True, True, True, False])
    cache, gates = model.new_cache(len(tokens), 23, HARD, keep_kv=True), z.clone()
    got = [logits(model, tokens[:, :9], HARD, cache=cache),
           logits(model, tokens[:, 9:], later, cache=cache)]
    hook_gates(reference, gates)
    with torch.no_grad():
        first = reference(tokens[:, :9], use_cache=True)
        gates.copy_(later)
        wanted = [first.logits, reference(tokens[:, 9:], past_key_values=first.past_key_values
                                          ).logits]
    torch.testing.assert_close(torch.cat(got, 1), torch.cat(wanted, 1), rtol=0, atol=1e-4)


def test_without_keep_kv_an_attention_cannot_come_back(checkpoint, tokens):
    model = llm.load(checkpoint()[0], "cpu", torch.float32)
    cache = model.new_cache(len(tokens), 23, HARD)
    logits(model, tokens[:, :9], HARD, cache=cache)
    with pytest.raises(ValueError, match="keep_kv"):
        logits(model, tokens[:, 9:], cache=cache)
    assert cache.length == 9


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 4)])
def test_the_cache_holds_what_its_kept_attentions_need(checkpoint, tokens, dtype, size):
    """2 K and V, 2 heads of 10, float32 on a CPU in either dtype; HARD skips 1 attention of 3."""
    model = llm.load(checkpoint()[0], "cpu", dtype)
    each = 2 * 4 * 2 * 31 * 10 * size
    for z, keep_kv, layers in ((None, False, 3), (HARD, False, 2), (HARD, True, 3),
                               (SOFT, False, 3)):
        cache = model.new_cache(4, 31, z, keep_kv)
        assert cache.bytes == layers * each
        assert [kv is None for kv in cache.kv] == [False, layers == 2, False]
        before = cache.bytes, [kv is None for kv in cache.kv]
        logits(model, tokens, z, cache=cache)
        assert (cache.bytes, [kv is None for kv in cache.kv]) == before


def test_a_full_cache_is_refused_and_stays_as_it_is(checkpoint, tokens):
    model = llm.load(checkpoint()[0], "cpu", torch.float32)
    cache = model.new_cache(len(tokens), 22)
    with pytest.raises(ValueError, match=r"0 \+ 23 tokens do not fit a cache of 22"):
        model(tokens, None, cache)
    assert cache.length == 0
    model(tokens[:, :22], None, cache)
    with pytest.raises(ValueError, match=r"22 \+ 1 tokens"):
        model(tokens[:, 22:], None, cache)


class Launched(TorchDispatchMode):
    """Counts operations, and the bytes of what they return."""

    def __init__(self):
        super().__init__()
        self.n, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.n += 1
        self.bytes += sum(x.nbytes for x in (out if isinstance(out, tuple | list) else [out])
                          if isinstance(x, torch.Tensor))
        return out


def test_a_skipped_block_launches_and_allocates_nothing(checkpoint, tokens):
    """As many operations and bytes as a model of fewer layers, with and without a cache."""
    for cached in (False, True):
        counts = []
        for L, z in ((2, None), (3, torch.tensor([True, True, False, False, True, True]))):
            model = llm.load(checkpoint(num_hidden_layers=L)[0], "cpu", torch.float32)
            cache = model.new_cache(4, 23, z) if cached else None
            with torch.no_grad(), Launched() as mode:
                model(tokens[:, :9], z, cache)
            counts.append((mode.n, mode.bytes))
        assert counts[0] == counts[1] and counts[0][0] > 50


def greedy(reference, ids, n):
    """transformers' own greedy continuation."""
    out = reference.generate(torch.tensor([ids]), max_new_tokens=n, do_sample=False,
                             pad_token_id=0)
    return out[0, len(ids):].tolist()


@pytest.mark.parametrize("z", [None, HARD, SOFT])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_transformers(checkpoint, family, z):
    folder, reference = checkpoint(family)
    model = llm.load(folder, "cpu", torch.float32)
    hook_gates(reference, torch.ones(B) if z is None else z.float())
    for prompt in ([3], [5, 9, 11, 3, 40], list(range(30, 50))):
        got = list(llm.generate(model, prompt, model.new_cache(1, len(prompt) + 30, z)))
        assert got == greedy(reference, prompt, 30)


def test_generation_ends_with_eos_or_a_full_cache(checkpoint):
    folder, _ = checkpoint()
    model = llm.load(folder, "cpu", torch.float32)
    free = list(llm.generate(model, [3, 4], model.new_cache(1, 12)))
    assert len(free) == 10 and model.config.eos_token_id == (2,)
    end = next(i for i in range(2, 10) if free[i] not in free[:i])
    edit_json(folder / "config.json", eos_token_id=[96, free[end]])
    model = llm.load(folder, "cpu", torch.float32)
    assert model.config.eos_token_id == (96, free[end])
    assert list(llm.generate(model, [3, 4], model.new_cache(1, 12))) == free[:end + 1]
    with pytest.raises(ValueError, match="do not fit"):
        next(llm.generate(model, [3, 4], model.new_cache(1, 1)))


def test_a_temperature_draws_from_the_softmax_and_repeats(checkpoint):
    model = llm.load(checkpoint(vocab_size=11)[0], "cpu", torch.float32)
    p = torch.softmax(logits(model, torch.tensor([[3, 4]]))[0, -1] / 3.0, -1)

    def draw(seed):
        return next(llm.generate(model, [3, 4], model.new_cache(1, 2), 3.0,
                                 torch.Generator().manual_seed(seed)))

    n = 500
    counts = torch.bincount(torch.tensor([draw(seed) for seed in range(n)]), minlength=11)
    assert ((counts / n - p).abs() < 4 * (p * (1 - p) / n)**0.5).all()
    assert (counts / n)[p.argmax()] < 0.9 and draw(5) == draw(5)


@pytest.mark.embedded
def test_greedy_text_of_the_embedded_model_equals_transformers():
    """64 tokens of 20 prompts dense, and of 5 with 16 blocks bypassed by hooks, in float32.

    Every token must be the likeliest of transformers' full forward on all before it, which is what
    its greedy search takes; two texts of either kind are compared with that search itself.
    """
    from transformers import LlamaForCausalLM
    folder = hub.model_folder(hub.EMBEDDED)
    model, tokenizer = llm.load(folder, "cpu", torch.float32), hub.load_tokenizer(folder)
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    leads = hub.calibration_texts("wikipedia", None)[:20]
    prompts = [tokenizer.encode(x["text"]).ids[:6 + i] for i, x in enumerate(leads)]
    z = torch.ones(60, dtype=torch.bool)
    z[[8, 10, 12, 14, 18, 22, 25, 29, 32, 36, 37, 40, 44, 46, 47, 52]] = False
    for gates, mine in ((None, prompts), (z, prompts[:5])):
        hook_gates(reference, torch.ones(60) if gates is None else gates.float())
        for i, prompt in enumerate(mine):
            cache = model.new_cache(1, len(prompt) + 64, gates)
            got = list(llm.generate(model, prompt, cache))
            with torch.no_grad():
                likeliest = reference(torch.tensor([prompt + got])).logits[0].argmax(-1)
            assert got == likeliest[len(prompt) - 1:-1].tolist()
            assert len(got) == 64 or got[-1] == 2
            assert i > 1 or got == greedy(reference, prompt, 64)


# ------------------------------------------------------------------ config.json


def test_rope_scaling_is_read_in_the_old_form_too(checkpoint, tokens):
    folder, reference = checkpoint("llama3-scaled")
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    edit_json(folder / "config.json", rope_parameters=None, rope_scaling=scaling, rope_theta=1e4)
    assert_logits(logits(llm.load(folder, "cpu", torch.float32), tokens), reference, tokens)


def test_head_dim_and_kv_heads_have_the_usual_defaults(checkpoint):
    folder, _ = checkpoint(hidden_size=48, num_attention_heads=6, head_dim=8)
    edit_json(folder / "config.json", head_dim=None, num_key_value_heads=None)
    config = llm.read_config(folder)
    assert (config.head_dim, config.num_key_value_heads) == (8, 6)


@pytest.mark.parametrize(("change", "named"), [
    ({"model_type": "gemma2"}, "gemma2"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
     "partial_rotary_factor"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "factor"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 64}, "sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
    ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"num_experts": 8}, "num_experts"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"hidden_size": "48"}, "hidden_size is '48'"),
    ({"vocab_size": None}, "vocab_size is None"),
    ({"num_key_value_heads": 4}, "num_key_value_heads=4"),
    ({"head_dim": 9}, "head_dim=9"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected ids"),
    ({"eos_token_id": [2, None]}, "eos_token_id is"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
])
def test_a_config_that_changes_the_forward_is_refused_by_name(checkpoint, change, named):
    folder, _ = checkpoint()
    edit_json(folder / "config.json", **change)
    with pytest.raises(ValueError, match=named):
        llm.read_config(folder)


def test_fields_that_change_nothing_are_accepted(checkpoint):
    folder, _ = checkpoint("qwen3")
    edit_json(folder / "config.json", use_sliding_window=False, sliding_window=64,
              max_window_layers=2,
              attention_dropout=0.1, layer_types=["full_attention"] * 3)
    assert llm.read_config(folder).model_type == "qwen3"


# ------------------------------------------------------------------ weights


def test_more_layers_than_the_weights_hold_are_refused_before_they_are_made(checkpoint):
    folder, _ = checkpoint(shards=True)
    edit_json(folder / "config.json", num_hidden_layers=10**12)
    with pytest.raises(ValueError, match="is 1000000000000, but the weights are those of 3 layers"):
        llm.check_weights(folder)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "named"), [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
     "missing model.layers.1.mlp.up_proj.weight"),
    (lambda t: t.update(extra=torch.ones(2)), "unexpected extra"),
    (lambda t: t.update({"model.norm.weight": torch.ones(47)}),
     r"model.norm.weight is \[47\], expected \[48\]"),
    (lambda t: t.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}), "quantised"),
    (lambda t: [t.pop(k) for k in list(t) if "proj" in k], "missing .*; and 16 more|and 16 more"),
])
def test_wrong_tensors_are_named(checkpoint, change, named):
    folder, _ = checkpoint()
    rewrite(folder, change)
    with pytest.raises(ValueError, match=named) as caught:
        llm.load(folder, "cpu", torch.float32)
    assert str(caught.value).count("missing") <= 5


def test_a_tied_models_duplicate_head_and_old_buffers_are_left_aside(checkpoint, tokens):
    folder, reference = checkpoint(tied=True)
    rewrite(folder, lambda t: t.update({
        "lm_head.weight": torch.ones(97, 48),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}))
    assert_logits(logits(llm.load(folder, "cpu", torch.float32), tokens), reference, tokens)


def test_truncated_file_missing_shard_and_path_outside_the_folder(checkpoint):
    folder, _ = checkpoint(shards=True)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    first = folder / sorted(weight_map.values())[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=first.name):
        llm.load(folder, "cpu", torch.float32)
    first.write_bytes(whole)
    outside = folder.parent / "outside.safetensors"
    outside.write_bytes(whole)
    for file in ("gone.safetensors", "../outside.safetensors", str(outside)):
        index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": file}}))
        with pytest.raises(ValueError, match=file):
            llm.load(folder, "cpu", torch.float32)


def test_weights_arrive_in_the_wanted_dtype_and_frozen(checkpoint):
    model = llm.load(checkpoint()[0], "cpu", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


# ------------------------------------------------------------------ cost

LLAMA3_8B = llm.Config("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, 5e5, None, False,
                       (128001,))
TABLE_2 = [  # blocks skipped: attention + FFN, TFLOP printed in the paper
    (0, 0, 32.94), (2, 0, 32.66), (4, 0, 32.39), (6, 0, 32.11), (8, 0, 31.84), (10, 0, 31.56),
    (12, 0, 31.29), (14, 0, 31.01), (14, 2, 29.57), (15, 3, 28.71), (15, 5, 27.27), (16, 6, 26.41),
    (16, 8, 24.97), (18, 8, 24.69)]


def skip(n_attention, n_ffn, L=32):
    z = torch.ones(2 * L, dtype=torch.bool)
    z[0:2 * n_attention:2] = False
    z[1:2 * n_ffn:2] = False
    return z


@pytest.mark.parametrize(("n_attention", "n_ffn", "tera"), TABLE_2)
def test_table_2(n_attention, n_ffn, tera):
    """A consistency check only: the paper prints no counts, so these are the ones that fit."""
    ours = llm.flops(LLAMA3_8B, 2048, skip(n_attention, n_ffn), "table2") / 1e12
    assert abs(ours - tera) < 0.006


def test_table_2_has_two_percentages_too_low():
    """3.12 % and 40.62 % of blocks: printed as 99.1 and 74.9 % of the dense FLOPs."""
    dense = llm.flops(LLAMA3_8B, 2048)
    ratios = [llm.flops(LLAMA3_8B, 2048, skip(*n), "table2") / dense for n in ((2, 0), (18, 8))]
    assert [round(100 * r, 1) for r in ratios] == [99.2, 75.0]


def test_whole_layers_cost_what_spec_says_and_skipping_is_really_free():
    dense = llm.flops(LLAMA3_8B, 2048)
    ratios = [llm.flops(LLAMA3_8B, 2048, skip(n, n)) / dense for n in (4, 8, 12)]
    assert [round(100 * r, 1) for r in ratios] == [88.3, 76.6, 64.9]
    free, paid = (llm.flops(LLAMA3_8B, 2048, skip(14, 2), rule) for rule in ("free", "table2"))
    assert free < paid
    with pytest.raises(ValueError, match="cheap"):
        llm.flops(LLAMA3_8B, 2048, None, "cheap")


SCALED = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(("config", "parameters", "tera"), [
    # model_type, d, L, h, h_kv, head_dim (None: not in the file), f, v, tied, rope_scaling
    (("llama", 4096, 32, 32, 8, None, 14336, 128256, False, None), 8_030_261_248, 32.9381),
    (("llama", 3072, 28, 24, 8, 128, 8192, 128256, True, SCALED), 3_212_749_824, 14.6018),
    (("llama", 2048, 16, 32, 8, 64, 8192, 128256, True, SCALED), 1_235_814_400, 5.6114),
    (("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False, None), 8_190_735_360, 33.4728),
    (("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True, None), 4_022_468_096, 18.9491),
    (("llama", 576, 30, 9, 3, None, 1536, 49152, True, None), 134_515_008, 0.8407),
])
def test_published_families_have_their_parameters_and_flops(tmp_path, config, parameters, tera):
    """Sizes as the checkpoints' config.json print them; counts as their model cards do."""
    keys = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
            "tie_word_embeddings", "rope_scaling")
    fields = dict(zip(keys, config, strict=True)) | {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0,
        "use_sliding_window": False, "sliding_window": None, "pretraining_tp": 1,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "torch_dtype": "bfloat16"}
    if fields["head_dim"] is None:
        del fields["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    read = llm.read_config(tmp_path)
    with torch.device("meta"):
        model = llm.Transformer(read)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert llm.flops(read, 2048) / 1e12 == pytest.approx(tera, abs=6e-5)


@pytest.mark.parametrize("z", [None, HARD])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_equal_torchs_own_count(checkpoint, tokens, family, z):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    model = llm.load(checkpoint(family)[0], "cpu", torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits(model, tokens, z)
    assert counter.get_total_flops() == len(tokens) * llm.flops(model.config, tokens.shape[1], z)


def test_reference_is_not_trivial():
    """Swapping two layers must change the logits, or the comparisons above could not fail."""
    reference = make_reference("llama")
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        before = reference(tokens).logits
        layers = reference.model.layers
        layers[0], layers[1] = layers[1], layers[0]
        assert (reference(tokens, use_cache=False).logits - before).abs().max() > 0.1
