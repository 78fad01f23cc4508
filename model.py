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
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# ---------------------------------------------------------------------------- config.json


@dataclass(frozen=True)
class Config:
    """What forward and `generate` need from config.json, under the checkpoint's own names."""

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


LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError, naming the file, if there is none in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_config(folder: str | Path) -> Config:
    """config.json of a checkpoint folder; optional fields default as in transformers.

    Raises ValueError, naming field and value, for what would change the forward and is not
    implemented here, and for a missing or impossible number; OSError without the file.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, or before
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {rope!r}, expected an object or null")
    rope = {"rope_type": rope.get("type", "default")} | rope
    _refuse(raw | {k: v for k, v in rope.items() if k != "type"}, path)
    value = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
             "tie_word_embeddings": False} | raw
    value["rope_theta"] = rope.get("rope_theta", value["rope_theta"])
    value["rope_scaling"] = None
    if rope["rope_type"] == "llama3":
        value["rope_scaling"] = {key: rope.get(key) for key in LLAMA3}
    for key, kind in ((field.name, field.type) for field in fields(Config)):
        if value.get(key) is None and key == "num_key_value_heads":
            value[key] = value["num_attention_heads"]
        if value.get(key) is None and key == "head_dim":
            value[key] = value["hidden_size"] // value["num_attention_heads"]
        _check_number(path, key, value.get(key), kind)
    for key, number in (value["rope_scaling"] or {}).items():
        _check_number(path, key, number, float)
    eos = value.get("eos_token_id")                               # null, an id, or several
    value["eos_token_id"] = tuple(eos) if isinstance(eos, list) else (eos,) * (eos is not None)
    if any(type(x) is not int for x in value["eos_token_id"]):
        raise ValueError(f"{path}: eos_token_id is {eos!r}, expected ids, an id or null")
    if value["num_attention_heads"] % value["num_key_value_heads"] or value["head_dim"] % 2:
        raise ValueError(f"{path}: num_key_value_heads={value['num_key_value_heads']} must divide "
                         f"num_attention_heads={value['num_attention_heads']}, and "
                         f"head_dim={value['head_dim']} must be even")
    return Config(**{field.name: value[field.name] for field in fields(Config)})


def _check_number(path: Path, key: str, value: object, kind: type) -> None:
    wrong = kind in (int, float) and (type(value) not in {int, kind} or not 0 < value < math.inf)
    if wrong or kind is bool and type(value) is not bool:
        name = "true or false" if kind is bool else f"a positive {kind.__name__}"
        raise ValueError(f"{path}: {key} is {value!r}, expected {name}")


def _refuse(raw: dict, path: Path) -> None:
    """Whatever changes the forward and is not implemented, by name."""
    layers = raw.get("layer_types")
    full = isinstance(layers, list) and all(kind == "full_attention" for kind in layers)
    implemented = {
        "model_type": ("llama", "qwen3"), "rope_type": ("default", "llama3"),
        "partial_rotary_factor": (1,), "rope_interleaved": (False,), "hidden_act": ("silu",),
        "attention_bias": (False,), "mlp_bias": (False,), "quantization_config": (),
        "num_experts": (), "num_local_experts": (), "n_routed_experts": (),
        "sliding_window": (raw.get("sliding_window"),) * (raw.get("use_sliding_window") is False),
        "layer_types": (layers,) * full,
    }
    for key, values in implemented.items():
        value = raw.get(key)
        if value not in values and (value is not None or key == "model_type"):
            raise ValueError(f"{path}: {key} = {str(value)[:60]} changes the forward and is not "
                             f"implemented (what is: {', '.join(map(str, values)) or 'none'})")


# ---------------------------------------------------------------------------- the forward


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis; in float32 up to the weight."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> (..., width), in x's dtype."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_angles(config: Config, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin (..., t, 1, d_h), float32, of the angles position * theta^(-2j / d_h).

    positions (..., t) integers. llama3 scaling divides the frequency of wavelengths above
    original / low_freq_factor by `factor`, keeps those below original / high_freq_factor, and
    blends linearly between the two.
    """
    d_h, scaling = config.head_dim, config.rope_scaling
    inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, d_h, 2, device=positions.device) / d_h)
    if scaling:
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)         # (d_h / 2,) 1 = unchanged
        inv_freq = keep * inv_freq + (1 - keep) * inv_freq / scaling["factor"]
    angle = positions[..., None, None].float() * inv_freq         # (..., t, 1, d_h / 2)
    angle = torch.cat((angle, angle), dim=-1)                     # both halves turn alike
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the rotate-half layout: pairs (j, j + d_h / 2). x (b, t, heads, d_h) -> float32."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin


def score_dtype(x: Tensor) -> torch.dtype:
    """What Q, K and V are in for softmax(Q K^T) V, and in the cache: x's dtype on a GPU.

    On a CPU float32: bf16 takes twice the time there, most of it in the backward pass.
    """
    return torch.float32 if x.device.type == "cpu" else x.dtype


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d_h)) V with h query heads on h_kv key and value heads, then W_O."""

    def __init__(self, config: Config):
        super().__init__()
        d, d_h = config.hidden_size, config.head_dim
        self.d_h = d_h
        self.q_proj = nn.Linear(d, config.num_attention_heads * d_h, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * d_h, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * d_h, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * d_h, d, bias=False)
        if config.model_type == "qwen3":  # one weight (d_h,) shared by all heads, before RoPE
            self.q_norm = RMSNorm(d_h, config.rms_norm_eps)
            self.k_norm = RMSNorm(d_h, config.rms_norm_eps)
        self.qk_norm = config.model_type == "qwen3"

    def forward(self, x: Tensor, rope: tuple, attend: Tensor | None, kv: Tensor | None = None,
                start: int = 0) -> Tensor:
        """x (b, t, d) -> (b, t, d). rope: cos and sin of `rope_angles`; attend: see `Transformer`.

        kv and start: see `keys_values`.
        """
        b, t, _ = x.shape
        k, v = self.keys_values(x, rope, kv, start)               # (b, h_kv, start + t, d_h)
        q = self.q_proj(x).view(b, t, -1, self.d_h)               # (b, t, h, d_h)
        q = rotate(self.q_norm(q) if self.qk_norm else q, *rope).transpose(1, 2)
        y = F.scaled_dot_product_attention(                       # (b, h, t, d_h)
            q.to(v.dtype), k, v, attn_mask=attend, is_causal=attend is None and t > 1,
            enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1).to(x.dtype))  # (b, t, d)

    def keys_values(self, x: Tensor, rope: tuple, kv: Tensor | None, start: int) -> tuple:
        """K and V of x (b, t, d), both (b, h_kv, t, d_h); with kv, of `Cache`, after those before.

        In `score_dtype`. rope: cos and sin of `rope_angles`. kv: where K and V of `start` earlier
        tokens are, and the new ones go.
        """
        b, t, _ = x.shape
        k = self.k_proj(x).view(b, t, -1, self.d_h)               # (b, t, h_kv, d_h)
        v = self.v_proj(x).view(b, t, -1, self.d_h)
        k = rotate(self.k_norm(k) if self.qk_norm else k, *rope)
        k, v = (y.transpose(1, 2).to(score_dtype(x)) for y in (k, v))
        if kv is None:
            return k, v
        kv[0, :, :, start:start + t], kv[1, :, :, start:start + t] = k, v
        return tuple(kv[:, :, :, :start + t])


class FFN(nn.Module):
    """SwiGLU: W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, config: Config):
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, t, d) -> (b, t, d)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """The two blocks of a layer, each with the norm before it."""

    def __init__(self, config: Config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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

    @property
    def bytes(self) -> int:
        """Memory of K and V, allocated once for `longest` tokens."""
        return sum(kv.nbytes for kv in self.kv if kv is not None)


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
            self.lm_head = nn.Linear(d, v, bias=False)

    def forward(self, tokens: Tensor, z: Tensor | None = None, cache: Cache | None = None,
                positions: Tensor | None = None, attend: Tensor | None = None) -> Tensor:
        """Hidden states (b, t, d) after the last norm; `head` makes logits of those one needs.

        tokens (b, t) integers. z None: the dense model. z boolean (B,): block i runs where z_i is
        true; a skipped one launches nothing (Sec. 3.1, inference). z float (B,) or (b, B):
        multiplies each block's output before the residual addition; gradients reach z (training).
        cache: of `new_cache`; tokens follow those that it holds, and are added to it.
        positions (b, t), by default from 0, or from the cache's end, up. attend boolean, broadcast
        to (b, h, t, all tokens): query row may see key column; by default causal. Padding on the
        right needs no `attend`.
        Raises ValueError for a z of another shape, and for a cache that is full or has no place
        for an attention that z keeps.
        Deviates: the paper still computes K and V of a skipped attention for its cache; here that
        is keep_kv. With one z per sequence nothing ever reads them, so they are skipped too.
        """
        b, t = tokens.shape
        keep, soft = self._gates(z, b)
        kv, start = (cache.kv, cache.length) if cache else ([None] * len(self.model.layers), 0)
        if cache:
            self._check_room(cache, keep, t)
        if positions is None:
            positions = torch.arange(start, start + t, device=tokens.device)
        if attend is None and start and t > 1:                    # causal, and all that came before
            attend = torch.ones(t, start + t, dtype=torch.bool, device=tokens.device).tril(start)
        x = self.model.embed_tokens(tokens)                       # (b, t, d)
        rope = rope_angles(self.config, positions)
        for i, layer in enumerate(self.model.layers):
            if keep[2 * i]:
                y = layer.self_attn(layer.input_layernorm(x), rope, attend, kv[i], start)
                x = x + y if soft is None else torch.addcmul(x, soft[2 * i], y)
            elif kv[i] is not None:                               # keep_kv
                layer.self_attn.keys_values(layer.input_layernorm(x), rope, kv[i], start)
            if keep[2 * i + 1]:
                y = layer.mlp(layer.post_attention_layernorm(x))
                x = x + y if soft is None else torch.addcmul(x, soft[2 * i + 1], y)
        if cache:
            cache.length += t
        return self.model.norm(x)

    def new_cache(self, b: int, longest: int, z: Tensor | None = None,
                  keep_kv: bool = False) -> Cache:
        """An empty Cache for b sequences of `longest` tokens under z, as `forward` takes it.

        keep_kv: the paper's rule (Sec. 3.1), K and V of every attention. Only with it may z change
        between two calls; for a fixed z it costs time and memory, and changes nothing.
        """
        config, weight, (keep, _) = self.config, self.head_weight, self._gates(z, b)
        shape = (2, b, config.num_key_value_heads, longest, config.head_dim)
        kv = [torch.empty(shape, dtype=score_dtype(weight), device=weight.device)
              if keep_kv or kept else None for kept in keep[0::2]]
        return Cache(kv, z, longest)

    @staticmethod
    def _check_room(cache: Cache, keep: list[bool], t: int) -> None:
        """ValueError unless t tokens fit, and every attention of `keep` has its place."""
        if cache.length + t > cache.longest:
            raise ValueError(f"{cache.length} + {t} tokens do not fit a cache of {cache.longest}")
        if any(kept and kv is None for kept, kv in zip(keep[0::2], cache.kv, strict=True)):
            raise ValueError("z keeps an attention that the cache was not made for; only with "
                             "keep_kv may z change")

    def _gates(self, z: Tensor | None, b: int) -> tuple[list[bool], Tensor | None]:
        """Which blocks run, and for a soft z its columns (B, b or 1, 1, 1) in the model's dtype."""
        if z is None:
            return [True] * self.B, None
        if z.dtype == torch.bool and z.shape == (self.B,):
            return z.tolist(), None
        if z.is_floating_point() and z.shape in ((self.B,), (b, self.B)):
            soft = z.to(self.model.norm.weight).view(-1, self.B)
            return [True] * self.B, soft.T[:, :, None, None]
        raise ValueError(f"z is {z.dtype} {tuple(z.shape)}, expected bool ({self.B},) "
                         f"or float ({self.B},) or ({b}, {self.B})")

    @property
    def head_weight(self) -> Tensor:
        """(v, d): the embedding when tied, else lm_head."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (..., v) of hidden states (..., d), in the model's dtype."""
        return F.linear(hidden, self.head_weight)


@torch.inference_mode()
def generate(model: Transformer, prompt: list[int], cache: Cache, temperature: float = 0.0,
             generator: torch.Generator | None = None) -> Iterator[int]:
    """Yields the ids that follow `prompt`, one at a time, up to EOS, which is the last of them.

    cache: empty, for one sequence; its z gates every block of prompt and text alike (Eq. 10), and
    both together get cache.longest tokens at most. Raises ValueError for a longer prompt.
    temperature 0: the likeliest token. Above: drawn from softmax(logits / temperature) by
    generator, on the CPU. The first id costs the prompt's forward (prefill), each further one a
    forward of one token (decode).
    """
    tokens, device = prompt, model.head_weight.device
    while True:
        hidden = model(torch.tensor([tokens], device=device), cache.z, cache)
        logits = model.head(hidden[0, -1]).float().cpu()          # (v,)
        if temperature > 0:
            p = torch.softmax(logits / temperature, -1)
            tokens = [int(torch.multinomial(p, 1, generator=generator))]
        else:
            tokens = [int(logits.argmax())]
        yield tokens[0]
        if tokens[0] in model.config.eos_token_id or cache.length + 1 >= cache.longest:
            return


# ---------------------------------------------------------------------------- weights


def _weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> its file: by the index where there is one, else by the files' own headers."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map; download it again")
        for file in set(map(str, weight_map.values())):
            if Path(file).name != file or not (folder / file).is_file():
                raise ValueError(f"{index} names {file}, which is no file of {folder}")
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    return {name: path for path in files for name in _shapes(path)}


def _shapes(path: Path) -> dict[str, tuple]:
    """Tensor name -> (shape, dtype) from a safetensors header, without reading a weight."""
    try:
        with safe_open(path, framework="pt") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}
            return {name: (x.get_shape(), x.get_dtype()) for name, x in slices.items()}
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{path} cannot be read ({e}); download it again") from None


def check_weights(folder: str | Path) -> Transformer:
    """The Transformer of config.json on the "meta" device, without memory, if the weights fit it.

    Names, shapes and dtypes are read from the headers; no weight is. A tied model's duplicate
    lm_head and the rotary_emb.inv_freq of old checkpoints are left aside.
    Raises ValueError for missing, unexpected, misshaped or quantised tensors; names at most five.
    """
    folder = Path(folder)
    config, files = read_config(folder), _weight_files(folder)
    L = sum(name.endswith(".input_layernorm.weight") for name in files)
    if L < config.num_hidden_layers:
        raise ValueError(f"{folder / 'config.json'}: num_hidden_layers is "
                         f"{config.num_hidden_layers}, but the weights are those of {L} layers")
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name: list(p.shape) for name, p in model.named_parameters()}
    held = {path: _shapes(path) for path in set(files.values())}
    tied = config.tie_word_embeddings
    wrong = [f"unexpected {name}" for name in files if name not in wanted
             and not (tied and name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"))]
    for name, shape in wanted.items():
        found, kind = held.get(files.get(name), {}).get(name, (None, None))
        if found is None:
            wrong.append(f"missing {name}")
        elif found != shape:
            wrong.append(f"{name} is {found}, expected {shape}")
        elif kind not in ("BF16", "F16", "F32", "F64"):
            wrong.append(f"{name} is {kind}, and quantised weights are not implemented")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"the weights in {folder} do not fit its config.json: "
                         f"{'; '.join(wrong[:5])}{more}")
    return model


def load(folder: str | Path, device: str, dtype: torch.dtype) -> Transformer:
    """The frozen Transformer of a checkpoint folder, each tensor read onto `device` in `dtype`.

    Raises ValueError as `check_weights` does, before a weight is read.
    """
    model, files, tensors = check_weights(folder), _weight_files(Path(folder)), {}
    wanted = [name for name, _ in model.named_parameters()]
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt", device=str(device)) as f:
            mine = [name for name in wanted if files[name] == path]
            tensors |= {name: f.get_tensor(name).to(dtype) for name in mine}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------- cost


def flops(config: Config, t: int, z: Tensor | None = None, skipped_attention: str = "free") -> int:
    """FLOPs of one forward of t tokens with the head on every position: 2 per multiply-add.

    Counts matmuls only, the scores as full t x t (no causal halving). z boolean (B,) or None.
    skipped_attention: "free" is what our forward does; "table2" is the one rule that fits the
    paper's Table 2 (at t = 2048): a skipped attention still pays its q, k and v projections.
    Deviates: the text of Sec. 3.1 says that only k and v are paid; Table 2 does not fit that.
    """
    if skipped_attention not in ("free", "table2"):
        raise ValueError(f"skipped_attention is {skipped_attention!r}, expected 'free' or 'table2'")
    d, d_q = config.hidden_size, config.num_attention_heads * config.head_dim
    d_kv = config.num_key_value_heads * config.head_dim
    qkv = 2 * t * d * (d_q + 2 * d_kv)
    scores_and_o = 4 * t * t * d_q + 2 * t * d_q * d              # QK^T and AV, then W_O
    ffn = 6 * t * d * config.intermediate_size
    L = config.num_hidden_layers
    n_attention = L if z is None else int(z[0::2].sum())
    n_ffn = L if z is None else int(z[1::2].sum())
    n_qkv = L if skipped_attention == "table2" else n_attention
    head = 2 * t * d * config.vocab_size
    return n_qkv * qkv + n_attention * scores_and_o + n_ffn * ffn + head
