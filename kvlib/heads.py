"""From activations to attention heads and back: grouped-query heads, and multi-head latent attention.

Both are ``heads(x, w, config, angles, recall)``: activations (B, T, hidden_size) in and out, the layer's weights, the
angles of its rotations, and a `Recall` that stores what is new and attends over everything.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kvlib.arrays import Array, backend_of
from kvlib.attention import dense
from kvlib.config import ModelConfig
from kvlib.ops import Weights, join_heads, linear, rms_norm, split_heads
from kvlib.rope import rotate

LATENT_EPS = 1e-6  # of the two norms inside latent attention, whatever rms_norm_eps says: so in transformers
Angles = tuple[Array, Array]  # cos and sin, each (B, 1, T, columns / 2)


class Recall(NamedTuple):
    """What one layer remembers: k and v go in, and q is answered from all that is there.

    cache: a KVCache or anything with its ``append`` and ``attend``; `Forgetful` where a model runs without one.
    window: a query sees its own position and the ``window`` - 1 before it; None sees all.
    """

    cache: Any
    layer: int
    seqs: Sequence[int] | None
    window: int | None

    def __call__(self, q: Array, k: Array, v: Array | None, scale: float | None, sinks: Array | None = None) -> Array:
        """q (B, Hq, T, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv), or None for a latent cache -> (B, Hq, T, Dv)."""
        wanted = {"scale": scale, "window": self.window, "sinks": sinks}
        wanted = {name: value for name, value in wanted.items() if value is not None}  # a plain cache has no others
        self.cache.append(k, v, layer=self.layer, seqs=self.seqs)
        return self.cache.attend(q, layer=self.layer, seqs=self.seqs, **wanted)


class Forgetful:
    """The cache of a model that has none: it holds one layer's new tokens until they are attended, in float32."""

    def __init__(self, latent: int | None) -> None:
        self.latent = latent

    def append(self, k: Array, v: Array | None, layer: int, seqs: None) -> None:
        self.k, self.v = k, k[..., : self.latent] if v is None else v

    def attend(self, q: Array, layer: int, seqs: None, **options: Any) -> Array:
        backend = backend_of(q)
        if "sinks" in options:
            options["sinks"] = backend.astype(options["sinks"], "float32")
        out = dense(*(backend.astype(x, "float32") for x in (q, self.k, self.v)), **options)
        return backend.astype(out, backend.dtype_name(q))


def grouped_heads(x: Array, w: Weights, config: ModelConfig, angles: Angles, recall: Recall) -> Array:
    """num_heads query heads over num_kv_heads heads of K and V (GQA, Ainslie et al. 2023, arXiv:2305.13245).

    Where the model has them: q and k normalised head by head (Qwen3, Gemma 3), and learned sinks, a score per head
    that takes part in the softmax and gives no value (gpt-oss).
    """
    q, k, v = (split_heads(linear(x, w, f"self_attn.{name}_proj"), config.head_dim) for name in "qkv")
    if config.qk_norm:
        q = rms_norm(q, w["self_attn.q_norm.weight"], config.rms_norm_eps, config.norm_offset)
        k = rms_norm(k, w["self_attn.k_norm.weight"], config.rms_norm_eps, config.norm_offset)
    heads = recall(rotate(q, *angles), rotate(k, *angles), v, config.attention_scale, w.get("self_attn.sinks"))
    return linear(join_heads(heads), w, "self_attn.o_proj")


def latent_heads(x: Array, w: Weights, config: ModelConfig, angles: Angles, recall: Recall) -> Array:
    """Multi-head latent attention in its absorbed form (DeepSeek-V2, 2024, arXiv:2405.04434, section 2.1).

    A token is remembered as one row that all heads share: its latent (kv_lora_rank columns), from which every head's
    keys and values could be expanded, and one rotated key (qk_rope_head_dim columns). Nothing is expanded: the
    matrix that would make keys moves into the query, the one that would make values into the output.
    """
    sizes = config.latent
    rank, nope = sizes.kv_lora_rank, sizes.qk_nope_head_dim
    expand = w["self_attn.kv_b_proj.weight"].reshape(config.num_heads, -1, rank)  # (H, nope + v, rank)
    to_keys, to_values = expand[:, :nope], expand[:, nope:]

    q = split_heads(_queries(x, w, config), sizes.query_dim)
    row = linear(x, w, "self_attn.kv_a_proj_with_mqa")[:, None]  # (B, 1, T, rank + rope)
    latent = rms_norm(row[..., :rank], w["self_attn.kv_a_layernorm.weight"], LATENT_EPS)
    concat = backend_of(x).xp.concat
    k = concat([latent, rotate(row[..., rank:], *angles, config.rope_interleaved)], axis=-1)
    q = concat([q[..., :nope] @ to_keys, rotate(q[..., nope:], *angles, config.rope_interleaved)], axis=-1)
    heads = recall(q, k, None, config.attention_scale)  # (B, H, T, rank)
    return linear(join_heads(heads @ to_values.mT), w, "self_attn.o_proj")


def _queries(x: Array, w: Weights, config: ModelConfig) -> Array:
    if config.latent.q_lora_rank is None:
        return linear(x, w, "self_attn.q_proj")
    latent = rms_norm(linear(x, w, "self_attn.q_a_proj"), w["self_attn.q_a_layernorm.weight"], LATENT_EPS)
    return linear(latent, w, "self_attn.q_b_proj")
