"""ModelConfig: a Llama-family architecture, read from and written to a Hugging Face config.json."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from kvlib.rope import read_rope


class Family(NamedTuple):
    """What an architecture's name says, so that config.json need not. None: config.json says it after all."""

    model_type: str
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    head_dim: int | None = None


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral", qkv_bias=False, output_bias=False, mlp_bias=False),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, output_bias=False, mlp_bias=False),
    "Qwen3ForCausalLM": Family("qwen3", mlp_bias=False, qk_norm=True, head_dim=128),
}


# what a field of config.json must be where it is there and not null; sizes are checked one by one
FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "architectures": list,
    "quantization_config": dict,
    "rope_scaling": dict,
    "rope_parameters": dict,
    "layer_types": list,
    "sliding_window": int,
    "max_window_layers": int,
    "rms_norm_eps": (float, int),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder: everything but its weights.

    ``head_dim`` is its own number: it need not be hidden_size / num_heads. ``sliding_window`` is kept only
    where it cannot matter, that is when no position inside ``max_positions`` reaches past it.
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
    qk_norm: bool
    tied_embeddings: bool
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ModelConfig":
        """Read the contents of a config.json.

        Raises:
            ValueError: an architecture, activation, quantisation, window or rope scaling that kvlib lacks
                (the message says what it has); a size that is missing, not positive or at odds with others.
        """
        for name, kind in FIELD_TYPES.items():
            if config.get(name) is not None and not isinstance(config[name], kind):
                wanted = "a number" if isinstance(kind, tuple) else f"of type {kind.__name__}"
                raise ValueError(f"config.json: {name} must be {wanted}, got {config[name]!r}")
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        if (activation := config.get("hidden_act", "silu")) != "silu":
            raise ValueError(f"hidden_act {activation!r} is not supported; supported: silu")
        if quantised := config.get("quantization_config"):
            method = quantised.get("quant_method", "unknown")
            raise ValueError(
                f"quantised weights (quant_method {method!r}) are not supported; use the plain checkpoint"
            )

        hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        kv_heads = _size(config, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}"
            )
        head_dim = _size(config, "head_dim", default=family.head_dim or hidden // heads)
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} must be even: RoPE turns pairs of columns")

        def bias(of_family: bool | None, name: str) -> bool:
            return bool(config.get(name)) if of_family is None else of_family

        return cls(
            architecture=architecture,
            vocab_size=_size(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(config, "intermediate_size"),
            num_layers=_size(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=_size(config, "max_position_embeddings"),
            rms_norm_eps=float(config.get("rms_norm_eps") or 1e-6),
            rope=read_rope(config),
            qkv_bias=bias(family.qkv_bias, "attention_bias"),
            output_bias=bias(family.output_bias, "attention_bias"),
            mlp_bias=bias(family.mlp_bias, "mlp_bias"),
            qk_norm=family.qk_norm,
            tied_embeddings=bool(config.get("tie_word_embeddings")),
            sliding_window=_sliding_window(config, family.model_type),
            **{name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )

    def to_dict(self, dtype: str) -> dict[str, Any]:
        """The config.json that transformers reads; rope in the older spelling, which every version reads."""
        scaling = {name: value for name, value in self.rope.items() if name != "rope_theta"}
        return {
            "architectures": [self.architecture],
            "model_type": FAMILIES[self.architecture].model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope["rope_theta"],
            "rope_scaling": None if self.rope["rope_type"] == "default" else scaling,
            "attention_bias": self.qkv_bias,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tied_embeddings,
            "sliding_window": self.sliding_window,
            "use_sliding_window": self.sliding_window is not None,
            "max_window_layers": 0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": dtype,
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a checkpoint of this architecture holds: Hugging Face name -> shape."""
        d, ffn = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        linears = {  # name: (outputs, inputs, has a bias)
            "self_attn.q_proj": (q, d, self.qkv_bias),
            "self_attn.k_proj": (kv, d, self.qkv_bias),
            "self_attn.v_proj": (kv, d, self.qkv_bias),
            "self_attn.o_proj": (d, q, self.output_bias),
            "mlp.gate_proj": (ffn, d, self.mlp_bias),
            "mlp.up_proj": (ffn, d, self.mlp_bias),
            "mlp.down_proj": (d, ffn, self.mlp_bias),
        }
        layer = {f"{name}.weight": (out, into) for name, (out, into, _) in linears.items()}
        layer |= {f"{name}.bias": (out,) for name, (out, _, bias) in linears.items() if bias}
        layer |= {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        if self.qk_norm:
            layer |= {
                "self_attn.q_norm.weight": (self.head_dim,),
                "self_attn.k_norm.weight": (self.head_dim,),
            }
        shapes = {"model.embed_tokens.weight": (self.vocab_size, d), "model.norm.weight": (d,)}
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes | {
            f"model.layers.{i}.{k}": shape for i in range(self.num_layers) for k, shape in layer.items()
        }


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures") or []
    if not names:  # a config that was never saved with a model says only its type
        names = [name for name, family in FAMILIES.items() if family.model_type == config.get("model_type")]
    found = str(names[0]) if names else f"model_type {config.get('model_type')!r}"
    if found not in FAMILIES:
        raise ValueError(f"architecture {found} is not supported; supported: {', '.join(FAMILIES)}")
    return found


def _size(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json: {name} must be a positive integer, got {value!r}")
    return value


def _sliding_window(config: dict[str, Any], model_type: str) -> int | None:
    """The sliding window, if the model has one that no position reaches past; raises if one does."""
    window, context = None, config["max_position_embeddings"]
    if model_type == "mistral":
        window = config.get("sliding_window", 4096)  # transformers' default: only an explicit null means none
    elif model_type.startswith("qwen") and config.get("use_sliding_window"):
        sliding = "sliding_attention" in (config.get("layer_types") or [])
        full = config.get("max_window_layers")
        if sliding or (28 if full is None else full) < config["num_hidden_layers"]:
            window = config.get("sliding_window", 4096)
    if window is not None and window < context:
        raise ValueError(
            f"sliding_window={window} is smaller than the context of {context} tokens, and kvlib has no "
            f"sliding windows yet; to stay inside it set max_position_embeddings={window} in config.json"
        )
    return window
