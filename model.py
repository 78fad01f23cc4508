"""The Llama and Qwen3 forward pass by hand, with a gate z on the output of every block.

Source: Sec. 3.1 ("Dynamic Routing for FFN and Attention Blocks") of IG-Pruning, arXiv:2511.02213;
        Llama 3 (arXiv:2407.21783), Qwen3 (arXiv:2505.09388), GQA (arXiv:2305.13245),
        RoPE (arXiv:2104.09864), SwiGLU (arXiv:2002.05202), RMSNorm (arXiv:1910.07467).
Left out: dropout, biases, sliding windows, experts, quantised weights; batches in generation.
Dims:   b batch, t tokens, d hidden_size, h query heads, h_kv key and value heads, d_h head_dim,
        f intermediate_size, v vocab_size, L layers, B = 2L blocks.
Blocks: block 2i is the attention of layer i, block 2i+1 its FFN. z = 1 keeps a block, 0 skips it.
"""
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# ---------------------------------------------------------------------------- files


class UserError(ValueError):
    """What a user can mend: it ends the program with this one line and exit status 2."""


def read_text(path: Path) -> str:
    """A UTF-8 file's text, without a byte order mark. Raises UserError, with the line, if not."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        number = e.object[:e.start].count(b"\n") + 1
        raise UserError(f"{path} line {number} is not UTF-8 text; save it as UTF-8") from None


def write(path: str | Path, data: bytes) -> None:
    """The file appears whole or not at all: temporary file, fsync, rename.

    Raises UserError where that fails (a full disk); the old file is then still there.
    """
    part = Path(f"{path}.part")                                   # of a killed run, perhaps
    try:
        with open(part, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror}); mend that and run the same "
                        "command again: it goes on") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises UserError, naming the file, if there is none in it."""
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
        raise UserError(f"{path} is not JSON ({e}); delete it or fetch it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


# ---------------------------------------------------------------------------- config.json


@dataclass(frozen=True)
class Config:
    """What the forward, `generate` and --bos need of config.json, by the checkpoint's own names."""

    model_type: str               # "llama", or "qwen3" for RMSNorm on the heads of q and k
    vocab_size: int               # v
    hidden_size: int              # d
    intermediate_size: int        # f
    num_hidden_layers: int        # L
    num_attention_heads: int      # h
    num_key_value_heads: int      # h_kv, divides h
    head_dim: int                 # d_h; h d_h need not be d (Qwen3-4B: 4096 against 2560)
    max_position_embeddings: int  # longest input, in tokens
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None     # None, or the four numbers of llama3 scaling
    tie_word_embeddings: bool     # the head is the embedding matrix
    eos_token_id: tuple           # ids that end a generated text; may be none
    bos_token_id: int | None = None  # for --bos on


LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
IMPLEMENTED = {  # fields that change the forward: the values that are implemented here
    "model_type": ("llama", "qwen3"), "rope_type": ("default", "llama3"),
    "hidden_act": ("silu", "swish"),                              # one function
    "partial_rotary_factor": (None, 1), "layer_types": ({"full_attention"},),
} | dict.fromkeys((
    "attention_bias", "mlp_bias", "use_sliding_window", "num_experts", "quantization_config",
    "per_layer_config", "transformers_weights",
    "full_attention", "sliding_attention",  # rope_parameters by kind of layer
), (None, False))


def read_config(folder: str | Path) -> Config:
    """The Config of a checkpoint folder; transformers reads it: types, defaults, older spellings.

    The end-of-text ids are those of generation_config.json if it names any, else config.json's
    (transformers asks the second only where the first does not exist).
    Raises UserError, naming field and value, for what would change the forward and is not
    implemented here, and for an impossible number; OSError without config.json.
    """
    from transformers import AutoConfig, logging  # only when needed: it takes seconds
    logging.set_verbosity_error()
    path = Path(folder) / "config.json"
    read_json(path)
    try:
        value = AutoConfig.from_pretrained(folder).to_dict()
    except Exception as e:  # of any kind
        raise UserError(f"{path} cannot be used ({str(e)[:300]})") from None
    # of two spellings its model reads rope_parameters, but for original_max_position_embeddings
    rope = value.get("rope_parameters") or {}
    outer = {key: x for key, x in value.items() if key == LLAMA3[-1]}
    value = value | rope | outer
    value["layer_types"] = set(value.get("layer_types") or ["full_attention"])
    for key, implemented in IMPLEMENTED.items():
        found = value.get(key)
        if found not in implemented:
            raise UserError(f"{path}: {key} is {str(found)[:60]!r}, but implemented is only "
                            f"{' or '.join(map(str, implemented))}")
    numbers = [field.name for field in fields(Config) if field.type in (int, float)]
    value["rope_scaling"] = None
    if value["rope_type"] == "llama3":
        numbers += LLAMA3
        value["rope_scaling"] = {key: value.get(key) for key in LLAMA3}
    for key in numbers:
        x = value.get(key)
        if type(x) not in (int, float) or not 0 < x < 1e10:
            raise UserError(f"{path}: {key} is {x!r}, expected a number above 0, below 1e10")
    h, h_kv = value["num_attention_heads"], value["num_key_value_heads"]
    if h % h_kv:
        raise UserError(f"{path}: num_key_value_heads={h_kv} must divide num_attention_heads={h}")
    value["eos_token_id"] = _end_ids(path.with_name("generation_config.json"), value)
    return Config(**{field.name: value[field.name] for field in fields(Config)})


def _end_ids(path, config):
    """eos_token_id of a JSON file if it names any, else of the config; null, an id, or several."""
    given = read_json(path).get("eos_token_id") if path.exists() else None
    ends = config["eos_token_id"] if given in (None, []) else given
    ends = ends if isinstance(ends, list) else [ends]
    if ends == [None]:
        return ()
    if any(type(x) is not int for x in ends):
        raise UserError(f"{path}: eos_token_id is {ends}, expected ids, an id or null")
    return tuple(ends)


# ---------------------------------------------------------------------------- the forward


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; nn.RMSNorm but for one rounding.

    As in transformers, the mean is float32 and the quotient is rounded to x's dtype before the
    weight multiplies it.
    """

    def forward(self, x):
        """x (..., width) -> (..., width), in x's dtype."""
        return self.weight * F.rms_norm(x, self.normalized_shape, eps=self.eps)


def rope_angles(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (..., t, 1, d_h), float32, of the angles position * theta^(-2j / d_h).

    positions (..., t) integers. llama3 scaling divides the frequency of wavelengths above
    original / low_freq_factor by `factor`, keeps those below original / high_freq_factor, and
    blends linearly between the two.
    """
    d_h, scaling = config.head_dim, config.rope_scaling
    pair = torch.arange(0, d_h, 2, device=positions.device)       # (d_h / 2,) 2j
    inv_freq = 1.0 / config.rope_theta ** (pair / d_h)
    if scaling:
        factor, low, high, original = (scaling[key] for key in LLAMA3)
        turns = original * inv_freq / (2 * math.pi)               # of the angle, within original
        keep = ((turns - low) / (high - low)).clamp(0, 1)         # (d_h / 2,) 1 = unchanged
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / factor
    angle = positions[..., None, None].float() * inv_freq         # (..., t, 1, d_h / 2)
    angle = torch.cat((angle, angle), dim=-1)                     # both halves turn alike
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the rotate-half layout: pairs (j, j + d_h / 2). x (b, t, heads, d_h) -> float32."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def score_dtype(x: Tensor) -> torch.dtype:
    """What Q, K and V are in for softmax(Q K^T) V, and in the cache: x's dtype on a GPU.

    On a CPU float32: bf16 takes twice the time there, most of it in the backward pass. So a bf16
    checkpoint has two right answers, one of a CPU and one of a GPU.
    """
    return torch.float32 if x.is_cpu else x.dtype


Linear = partial(nn.Linear, bias=False)  # weight (out, in), as in the checkpoint


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d_h)) V, then W_O; query head j reads K/V head j // (h / h_kv)."""

    def __init__(self, config: Config):
        super().__init__()
        d, d_h = config.hidden_size, config.head_dim
        d_q = config.num_attention_heads * d_h
        d_kv = config.num_key_value_heads * d_h
        self.q_proj = Linear(d, d_q)
        self.k_proj = Linear(d, d_kv)
        self.v_proj = Linear(d, d_kv)
        self.o_proj = Linear(d_q, d)
        self.by_head = (-1, d_h)                                  # (heads d_h) as two axes
        # before RoPE; Qwen3's has one weight (d_h,) for all heads
        norm = RMSNorm if config.model_type == "qwen3" else nn.Identity
        self.q_norm = norm(d_h, config.rms_norm_eps)
        self.k_norm = norm(d_h, config.rms_norm_eps)

    def forward(self, x, rope, attend, kv, start):
        """x (b, t, d) -> (b, t, d). rope: cos and sin of `rope_angles`; attend: see `Transformer`.

        kv and start: see `keys_values`.
        """
        k, v = self.keys_values(x, rope, kv, start)               # (b, h_kv, start + t, d_h)
        q = self.q_proj(x).unflatten(2, self.by_head)             # (b, t, h, d_h)
        q = rotate(self.q_norm(q), *rope)
        q = q.transpose(1, 2).to(v.dtype)                         # (b, h, t, d_h)
        causal = attend is None and not start
        if not (x.is_cpu or attend is None and x.dtype == torch.bfloat16):
            # of a GPU's fast kernels only flash shares K and V, and it takes bf16 without a mask
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attend, is_causal=causal, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)                          # (b, t, h d_h)
        return self.o_proj(y.to(x.dtype))                         # (b, t, d)

    def keys_values(self, x, rope, kv, start):
        """K and V of x (b, t, d), both (b, h_kv, t, d_h); with kv, of `Cache`, after those before.

        In `score_dtype`. rope: cos and sin of `rope_angles`. kv: where K and V of `start` earlier
        tokens are, and the new ones go.
        """
        k = self.k_proj(x).unflatten(2, self.by_head)             # (b, t, h_kv, d_h)
        v = self.v_proj(x).unflatten(2, self.by_head)
        k = rotate(self.k_norm(k), *rope)
        k = k.transpose(1, 2).to(score_dtype(x))                  # (b, h_kv, t, d_h)
        v = v.transpose(1, 2).to(score_dtype(x))
        if kv is None and start:
            raise ValueError("z keeps an attention that the cache was not made for; only with "
                             "keep_kv may z change")
        if kv is None:
            return k, v
        end = start + x.shape[1]
        kv[..., start:end, :] = torch.stack((k, v))
        return tuple(kv[..., :end, :])


class FFN(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config: Config):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, f)
        self.up_proj = Linear(d, f)
        self.down_proj = Linear(f, d)

    def forward(self, x):
        """x (b, t, d) -> (b, t, d)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """The two blocks of a layer, each with the norm before it."""

    def __init__(self, config: Config):
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.mlp = FFN(config)


@dataclass
class Cache:
    """K and V of the tokens so far, so that the next token's forward runs on that token alone.

    From `Transformer.new_cache`. An attention that its z skips has no place in it, unless keep_kv.
    """

    kv: list[Tensor | None]  # a layer's K and V in one tensor (2, b, h_kv, longest, d_h), or None
    z: Tensor | None         # the z that `generate` runs
    longest: int             # room, in tokens
    length: int = 0          # tokens that it holds


class Transformer(nn.Module):
    """A frozen decoder with gated blocks: x += z_2i Attn(norm x), then x += z_2i+1 FFN(norm x)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.B = 2 * config.num_hidden_layers
        d, v = config.hidden_size, config.vocab_size
        self.model = nn.ModuleDict({  # so that names are the checkpoint's: model.norm.weight
            "embed_tokens": nn.Embedding(v, d),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(d, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = Linear(d, v)

    def forward(self, tokens: Tensor, z: Tensor | None = None, cache: Cache | None = None,
                positions: Tensor | None = None, attend: Tensor | None = None) -> Tensor:
        """Hidden states (b, t, d) after the last norm; `head` makes logits of those one needs.

        tokens (b, t) integers. z boolean or float, (B,) or (b, B): block i adds z_i times its
        output, z_i rounded to the model's dtype; None is all ones, the dense model. Gradients
        reach z (training). A block whose z is 0 for all texts launches nothing (Sec. 3.1), and its
        z gets no gradient. To see which these are costs no wait for a GPU if z is on the CPU.
        cache: of `new_cache`; tokens follow those that it holds, and are added to it.
        positions (b, t), by default from 0, or from the cache's end, up. attend boolean, broadcast
        to (b, h, t, all tokens): query row may see key column; by default causal. Padding on the
        right needs no `attend`.
        Raises ValueError for a z of another shape, a full cache, and an attention that z keeps and
        the cache does not.
        Deviates: the paper still computes K and V of a skipped attention for its cache; here that
        is keep_kv. With one z per sequence nothing ever reads them, so they are skipped too.
        """
        b, t = tokens.shape
        keep, gates = self._gates(z, b)
        kv, start = (cache.kv, cache.length) if cache else ([None] * len(self.model.layers), 0)
        if cache and start + t > cache.longest:
            raise ValueError(f"{start} + {t} tokens do not fit a cache of {cache.longest}")
        if positions is None:
            positions = torch.arange(start, start + t, device=tokens.device)
        if attend is None and start and t > 1:                    # causal after what is cached
            attend = torch.ones(t, start + t, dtype=torch.bool, device=tokens.device).tril(start)
        x = self.model.embed_tokens(tokens)                       # (b, t, d)
        rope = rope_angles(self.config, positions)
        for i, layer in enumerate(self.model.layers):
            if keep[2 * i]:
                y = layer.self_attn(layer.input_layernorm(x), rope, attend, kv[i], start)
                x = torch.addcmul(x, gates[2 * i], y)             # x + z_2i Attn(norm x)
            elif kv[i] is not None:                               # keep_kv
                layer.self_attn.keys_values(layer.input_layernorm(x), rope, kv[i], start)
            if keep[2 * i + 1]:
                y = layer.mlp(layer.post_attention_layernorm(x))
                x = torch.addcmul(x, gates[2 * i + 1], y)         # x + z_2i+1 FFN(norm x)
        if cache:
            cache.length += t
        return self.model.norm(x)

    def new_cache(self, b: int, longest: int, z: Tensor | None = None,
                  keep_kv: bool = False) -> Cache:
        """An empty Cache for b sequences of `longest` tokens under z, as `forward` takes it.

        keep_kv: the paper's rule (Sec. 3.1), K and V of every attention. Only with it may z change
        between two calls; for a fixed z it costs time and memory, and changes nothing.
        """
        config, weight = self.config, self.head_weight
        shape = (2, b, config.num_key_value_heads, longest, config.head_dim)
        keep, _ = self._gates(z, b)
        kv = []
        for kept in keep[0::2]:
            kv.append(None)
            if kept or keep_kv:
                kv[-1] = weight.new_empty(shape, dtype=score_dtype(weight))
        return Cache(kv, z, longest)

    def _gates(self, z, b):
        """Which of the B blocks run, and the z of each, (b or 1, 1, 1) in the model's dtype."""
        z = torch.ones(self.B) if z is None else z
        if z.shape not in ((self.B,), (b, self.B)):
            raise ValueError(f"z is {tuple(z.shape)}, expected ({self.B},) or ({b}, {self.B})")
        z = z.reshape(-1, self.B)                                 # (b or 1, B)
        columns = z.to(self.model.norm.weight).T[..., None, None]
        return z.any(0).tolist(), columns.unbind()

    @property
    def head_weight(self) -> Tensor:
        """(v, d): the embedding when tied, else lm_head."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., v) of hidden states (..., d), in the model's dtype."""
        return F.linear(hidden, self.head_weight)


@torch.inference_mode()
def generate(model: Transformer, prompt: list[int], cache: Cache) -> Iterator[int]:
    """Yields the likeliest id after `prompt`, then after both, up to EOS, which is the last.

    cache: empty, for one sequence; its z gates every block of prompt and text alike (Eq. 10), and
    both together get cache.longest tokens at most. Raises ValueError for a longer prompt.
    Ties go to the lowest id. The first id costs the prompt's forward (prefill), each further one
    a forward of one token (decode).
    """
    tokens, device = prompt, model.head_weight.device
    while True:
        hidden = model(torch.tensor([tokens], device=device), cache.z, cache)
        token = int(model.head(hidden[0, -1]).argmax())
        yield token
        if token in model.config.eos_token_id or cache.length + 1 >= cache.longest:
            return
        tokens = [token]


# ---------------------------------------------------------------------------- weights


def _read(folder, device, dtype):
    """Tensor name -> the tensor on `device` in `dtype`; on "meta" its shape, from a file's header.

    As in transformers: model.safetensors goes before an index, an index only says which files
    there are, and of two tensors of one name the later file's counts.
    """
    index, paths = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.exists() and not paths[0].exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map; download it again")
        paths = [folder / file for file in sorted(set(map(str, weight_map.values())))]
    tensors = {}
    for path in paths:
        if path.parent != folder:
            raise UserError(f"{index} names {path}, which is no file of {folder}")
        try:
            with safe_open(path, framework="pt") as f:
                for name in f.keys():
                    x = f.get_slice(name)
                    if x.get_dtype() not in ("BF16", "F16", "F32", "F64"):
                        raise UserError(f"{path}: {name} is {x.get_dtype()}, and quantised "
                                        "weights are not implemented")
                    if device == "meta":
                        tensors[name] = torch.empty(x.get_shape(), device=device)
                    else:
                        tensors[name] = x[:].to(device, dtype)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} cannot be read ({e}); download it again") from None
    return tensors


def _fill(model, folder, tensors):
    """The model's parameters become `tensors`; UserError unless each has one, and it fits.

    Left aside are inv_freq of old checkpoints, and a tied model's lm_head.weight if it equals the
    embedding, whose other name it is.
    """
    tensors = {name: x for name, x in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if model.config.tie_word_embeddings and "lm_head.weight" in tensors:
        head = tensors.pop("lm_head.weight")
        embedding = tensors.setdefault("model.embed_tokens.weight", head)
        if not head.is_meta and not torch.equal(head, embedding):
            raise UserError(f"{folder}: lm_head.weight differs from the embedding, but config.json "
                            "ties the two; set tie_word_embeddings to false there")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as e:
        what = " ".join(str(e).split())[:500]
        raise UserError(f"{folder}: the weights do not fit config.json: {what}") from None


def check_weights(folder: str | Path) -> Transformer:
    """The Transformer of config.json on the "meta" device, without memory, if the weights fit it.

    Names, shapes and dtypes are read from the headers; no weight is.
    Raises UserError, by name, for missing, unexpected, misshaped or quantised tensors.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), _read(folder, "meta", None)
    if config.num_hidden_layers > len(tensors):                   # before as many are made
        raise UserError(f"{folder / 'config.json'}: num_hidden_layers is "
                        f"{config.num_hidden_layers}, but there are {len(tensors)} tensors")
    with torch.device("meta"):
        model = Transformer(config)
    _fill(model, folder, tensors)
    return model


def load(folder: str | Path, device: str, dtype: torch.dtype) -> Transformer:
    """The frozen Transformer of a checkpoint folder, each tensor read onto `device` in `dtype`.

    Raises UserError as `check_weights` does, before a weight is read; and for a tied model whose
    files hold a head that is not the embedding.
    """
    model = check_weights(folder)
    _fill(model, folder, _read(Path(folder), str(device), dtype))
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------- cost


def flops(config: Config, t: int, z: Tensor | None = None, skipped_attention: str = "free") -> int:
    """FLOPs of one forward of t tokens with the head on every position: 2 per multiply-add.

    Counts matmuls only, the scores as full t x t (no causal halving). z boolean (B,) or None.
    skipped_attention: "free" is what our forward does; "table2" is the one rule that fits the
    paper's Table 2 (at t = 2048): a skipped attention still pays its q, k and v projections.
    Raises KeyError for another word.
    Deviates: the text of Sec. 3.1 says that only k and v are paid; Table 2 does not fit that.
    """
    d, L = config.hidden_size, config.num_hidden_layers
    d_q = config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    if z is None:
        z = torch.ones(2 * L)
    n_attention, n_ffn = int(z[0::2].sum()), int(z[1::2].sum())
    n_qkv = {"free": n_attention, "table2": L}[skipped_attention]
    qkv = 2 * t * d * (d_q + 2 * d_kv)
    scores_and_o = 4 * t * t * d_q + 2 * t * d_q * d              # QK^T and AV, then W_O
    ffn = 6 * t * d * config.intermediate_size
    head = 2 * t * d * config.vocab_size
    return n_qkv * qkv + n_attention * scores_and_o + n_ffn * ffn + head
