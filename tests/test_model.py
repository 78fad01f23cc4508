"""model.py against transformers, torch's FLOP counter and the paper's Table 2."""
import json

import pytest
import torch
from conftest import FAMILIES, LLAMA3_ROPE, SIZES, edit_json, hook_gates, make_reference
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

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

LLAMA3_8B = llm.Config("llama", 128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, 5e5, None, False)
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
