"""ModelConfig: the shape of a decoder, read from and written to a Hugging Face config.json."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from kvlib.families import FAMILIES, FULL, SLIDING, Family
from kvlib.parts import Experts, Latent, Shapes, gated_shapes, linear_shapes
from kvlib.rope import read_rope, read_ropes, temperature
from kvlib.settings import number, read_settings, size
from kvlib.spec import CacheSpec


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything about a decoder but its weights.

    ``num_kv_heads`` and ``head_dim`` are what the cache stores: with a `Latent` one head of kv_lora_rank +
    qk_rope_head_dim columns. Otherwise ``head_dim`` is its own number, not always hidden_size / num_heads.
    ``windows`` has one entry to a layer: how many positions it sees, its own among them, or None for all.
    ``local_rope``: the rotation of layers with a window, where it differs from ``rope``, that of the others.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: dict[str, Any]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    qk_norm: bool = False
    local_rope: dict[str, Any] | None = None
    rope_interleaved: bool = False
    query_pre_attn_scalar: float | None = None
    sinks: bool = False
    latent: Latent | None = None
    experts: Experts | None = None
    activation: str = "silu"
    norm_offset: float = 0.0  # added to the weights of every norm
    sandwich_norms: bool = False  # attention and feed-forward have a norm behind them too
    scaled_embedding: bool = False  # by sqrt(hidden_size)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read the contents of a config.json.

        Raises:
            ValueError: an architecture, activation, quantisation or rope scaling that kvlib lacks (the message says
                what it has); a setting that is missing, of the wrong type or at odds with others.
        """
        architecture, settings = read_settings(config)
        family = FAMILIES[architecture]
        heads = size(settings, "num_attention_heads")
        kv_heads = size(settings, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}")
        latent = Latent.read(settings, heads, kv_heads) if family.latent else None
        if latent:
            kv_heads, head_dim, turned = 1, latent.kv_lora_rank + latent.qk_rope_head_dim, latent.qk_rope_head_dim
        else:
            turned = head_dim = size(settings, "head_dim", default=size(settings, "hidden_size") // heads)
        if turned % 2:
            name = "qk_rope_head_dim" if latent else "head_dim"
            raise ValueError(f"{name}={turned} must be even: RoPE turns pairs of columns")
        rope, local_rope = read_ropes(settings) if "rope_local_base_freq" in settings else (read_rope(settings), None)
        bias = settings.get("attention_bias", False)
        fields = {
            "architecture": architecture,
            "vocab_size": size(settings, "vocab_size"),
            "hidden_size": size(settings, "hidden_size"),
            "intermediate_size": size(settings, "intermediate_size"),
            "num_layers": size(settings, "num_hidden_layers"),
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "max_positions": size(settings, "max_position_embeddings"),
            "rms_norm_eps": number(settings, "rms_norm_eps", default=1e-6),
            "rope": rope,
            "local_rope": local_rope,
            "rope_interleaved": settings.get("rope_interleave", False),
            "qkv_bias": bias,
            "output_bias": bias,
            "mlp_bias": settings.get("mlp_bias", False),
            "tied_embeddings": settings.get("tie_word_embeddings", False),
            "windows": _windows(settings, family),
            "latent": latent,
            "experts": Experts.read(settings, family) if family.experts else None,
        }
        if "query_pre_attn_scalar" in settings:
            fields["query_pre_attn_scalar"] = number(settings, "query_pre_attn_scalar")
        tokens = {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(**(fields | family.fixed | tokens))

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """The config.json that transformers reads; rope in the older spelling, which every version reads."""
        family = FAMILIES[self.architecture]
        window = self.sliding_window
        config = {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope["rope_theta"],
            "rope_scaling": {name: value for name, value in self.rope.items() if name != "rope_theta"},
            "attention_bias": self.qkv_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied_embeddings,
            "sliding_window": window,
            "use_sliding_window": window is not None,
            "max_window_layers": 0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": dtype,
        } | {name: values[0] for name, values in family.only.items()}
        if self.rope["rope_type"] == "default":
            config["rope_scaling"] = None
        if self.local_rope:
            config["rope_local_base_freq"] = self.local_rope["rope_theta"]
        if self.query_pre_attn_scalar:
            config["query_pre_attn_scalar"] = self.query_pre_attn_scalar
        kinds = [FULL if window is None else SLIDING for window in self.windows]
        if family.layer_types and family.layer_types(family.defaults | config) != kinds:
            config["layer_types"] = kinds  # left out where it says nothing: transformers takes it for another family
        if self.latent:
            config |= asdict(self.latent)
            config |= {"num_key_value_heads": self.num_heads, "head_dim": self.latent.qk_rope_head_dim}
            config["rope_interleave"] = self.rope_interleaved
        if self.experts:
            config |= {name: getattr(self.experts, field) for field, name in family.experts.items()}
        return config

    @property
    def sliding_window(self) -> int | None:
        """The window of the layers that have one; None if none has."""
        return next((window for window in self.windows if window is not None), None)

    @property
    def attention_scale(self) -> float | None:
        """What scores are multiplied with; None is the usual 1 / sqrt(head_dim)."""
        if self.latent:  # heads are query_dim wide, whatever the cache stores; YaRN sharpens the softmax
            return temperature(self.rope, "mscale_all_dim") ** 2 / math.sqrt(self.latent.query_dim)
        return None if self.query_pre_attn_scalar is None else 1 / math.sqrt(self.query_pre_attn_scalar)

    def tensor_shapes(self) -> Shapes:
        """Every tensor that a checkpoint of this architecture holds: Hugging Face name -> shape."""
        d = self.hidden_size
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab_size, d), "model.norm.weight": (d,)}
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if self.sandwich_norms:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        dense = gated_shapes("mlp", d, self.intermediate_size, self.mlp_bias)
        heads = self._head_shapes()
        for layer in range(self.num_layers):
            routed = self.experts is not None and layer >= self.experts.first_layer
            parts = heads | (self.experts.shapes(d) if routed else dense) | {f"{name}.weight": (d,) for name in norms}
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in parts.items()}
        return shapes

    def _head_shapes(self) -> Shapes:
        if self.latent:
            return self.latent.shapes(self.hidden_size, self.num_heads, self.qkv_bias)
        d, width = self.hidden_size, self.head_dim
        q, kv = self.num_heads * width, self.num_kv_heads * width
        shapes = linear_shapes("self_attn.q_proj", q, d, self.qkv_bias)
        shapes |= linear_shapes("self_attn.k_proj", kv, d, self.qkv_bias)
        shapes |= linear_shapes("self_attn.v_proj", kv, d, self.qkv_bias)
        shapes |= linear_shapes("self_attn.o_proj", d, q, self.output_bias)
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (width,), "self_attn.k_norm.weight": (width,)}
        if self.sinks:
            shapes["self_attn.sinks"] = (self.num_heads,)
        return shapes

    def cache_spec(self, dtype: str) -> CacheSpec:
        """What a cache for this model must store."""
        latent = self.latent.kv_lora_rank if self.latent else None
        return CacheSpec(self.num_kv_heads, self.head_dim, self.num_layers, dtype, latent=latent)


def _windows(settings: dict[str, Any], family: Family) -> tuple[int | None, ...]:
    layers = size(settings, "num_hidden_layers")
    if family.layer_types is None:
        return (None,) * layers
    kinds = family.layer_types(settings)
    if unknown := [kind for kind in kinds if kind not in (SLIDING, FULL)]:
        raise ValueError(f"layer_types holds {unknown[0]!r}, which is not supported; supported: {SLIDING}, {FULL}")
    if len(kinds) != layers:
        raise ValueError(f"layer_types has {len(kinds)} entries for {layers} layers (num_hidden_layers)")
    window = size(settings, "sliding_window") if SLIDING in kinds else None
    return tuple(window if kind == SLIDING else None for kind in kinds)
