"""Rotary position embedding: each pair of a head's columns turns by an angle that grows with the position.

Column i pairs with column i + D/2 (Hugging Face's "half split"), or 2i with 2i + 1 ("interleaved": DeepSeek), and
pair i turns by ``theta ** (-2 i / D)`` radians per token. Scaling slows the slow pairs down: a model then reaches past
the context it was trained on.

Sources: RoPE, Su et al. 2021 (arXiv:2104.09864); position interpolation ("linear"), Chen et al. 2023
(arXiv:2306.15595); YaRN, Peng et al. 2023 (arXiv:2309.00071); "llama3", the Llama 3.1 reference code.
"""

import math
from typing import Any

import numpy as np

from kvlib.arrays import Array, Backend, backend_of

# rope_type -> (parameters it must have, parameters it may have)
KINDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


def read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rope parameters of a config.json: rope_type, rope_theta and what the scaling needs.

    Reads both spellings: ``rope_parameters`` (transformers 5), and ``rope_theta`` beside ``rope_scaling``.

    Raises:
        ValueError: a scaling that kvlib does not have; a parameter that is missing, unknown or not a number.
    """
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.pop("rope_type", None) or given.get("type", "default")
    given.pop("type", None)
    if kind == "dynamic":
        raise ValueError(
            "rope_type 'dynamic' is not supported: it changes the frequencies as a sequence grows, so cached "
            "keys would have been turned by other angles than new ones; use 'yarn' or 'linear'"
        )
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"rope_type {kind!r} is not supported; supported: {', '.join(KINDS)}")

    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if given.pop("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ValueError("partial_rotary_factor is not supported: kvlib turns every column of a head")
    required, optional = KINDS[kind]
    if "original_max_position_embeddings" in required:
        inside = given.get("original_max_position_embeddings")
        beside = config.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = beside or inside or config.get("max_position_embeddings")
    given = {name: value for name, value in given.items() if value is not None}
    if missing := required - given.keys():
        raise ValueError(f"rope_type {kind!r} needs {', '.join(sorted(missing))}, got {given}")
    if unknown := given.keys() - required - optional:
        raise ValueError(
            f"rope_type {kind!r} has parameters that kvlib does not know: {', '.join(sorted(unknown))}"
        )
    for name, value in {"rope_theta": theta, **given}.items():
        if not isinstance(value, int | float) or (name != "truncate" and not 0 < value < math.inf):
            raise ValueError(f"rope parameter {name} must be a positive number, got {value!r}")
    if kind == "llama3" and not given["high_freq_factor"] > given["low_freq_factor"]:
        raise ValueError(f"rope_type 'llama3' needs high_freq_factor above low_freq_factor, got {given}")
    return {"rope_type": kind, "rope_theta": float(theta), **given}


def read_ropes(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rope parameters of full layers and of layers with a window, where a model has two rotations (Gemma 3).

    Reads both spellings: ``rope_parameters`` by kind of layer, and ``rope_local_base_freq`` beside those of full
    layers; scaling is for full layers alone. Raises ValueError as `read_rope`.
    """
    by_kind = config.get("rope_parameters") or {}
    full = {**config, "rope_parameters": by_kind.get("full_attention", {})}
    local = {
        "rope_parameters": by_kind.get("sliding_attention", {}),
        "rope_theta": config["rope_local_base_freq"],
        "max_position_embeddings": config.get("max_position_embeddings"),
    }
    if unknown := by_kind.keys() - {"full_attention", "sliding_attention"}:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"rope_parameters has {names}; expected full_attention, sliding_attention")
    ropes = read_rope(full), read_rope(local)
    if ropes[1]["rope_type"] != "default":
        raise ValueError(f"layers with a window have rope_type 'default' alone, got {ropes[1]['rope_type']!r}")
    return ropes


def frequencies(rope: dict[str, Any], head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per token of each pair, (head_dim / 2,) float32, and the factor of cos and sin (for YaRN)."""
    # rounded to float32 where transformers rounds: at position 100,000 the rounding is part of the model
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    turn = 1.0 / (rope["rope_theta"] ** exponents.astype(np.float64)).astype(np.float32)
    kind = rope["rope_type"]
    if kind == "linear":
        return turn / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(turn, rope), 1.0
    if kind == "yarn":
        return _yarn(turn, rope, head_dim)
    return turn, 1.0


def _llama3(turn: np.ndarray, rope: dict[str, Any]) -> np.ndarray:
    """Pairs that turn often in the original context stay; those that turn rarely slow down by ``factor``."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / (2 * math.pi / turn)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - keep) * turn / rope["factor"] + keep * turn


def _yarn(turn: np.ndarray, rope: dict[str, Any], head_dim: int) -> tuple[np.ndarray, float]:
    """The same with a ramp over pairs instead of over turns, and a correction of the softmax temperature."""
    factor, original = rope["factor"], rope["original_max_position_embeddings"]

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    first, last = pair_that_turns(rope.get("beta_fast", 32)), pair_that_turns(rope.get("beta_slow", 1))
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - first) / max(last - first, 0.001)
    slow = np.clip(ramp, 0, 1)

    scale = temperature(rope)
    if "mscale" in rope and "mscale_all_dim" in rope:
        scale = temperature(rope, "mscale") / temperature(rope, "mscale_all_dim")
    return turn / factor * slow + turn * (1 - slow), rope.get("attention_factor", scale)


def temperature(rope: dict[str, Any], weight: str | None = None) -> float:
    """YaRN's factor for queries and keys, 0.1 w ln(factor) + 1, where w is rope[weight]; 1 where there is none."""
    w = 1.0 if weight is None else rope.get(weight, 0.0)
    return 0.1 * w * math.log(rope["factor"]) + 1.0 if rope.get("factor", 1.0) > 1 else 1.0


def cos_sin(positions: np.ndarray, turn: Array, scale: float, backend: Backend) -> tuple[Array, Array]:
    """Positions (B, T) -> cos and sin, each (B, 1, T, D / 2) float32 on ``backend``; the 1 is for heads."""
    positions = backend.astype(backend.asarray(positions), "float32")
    angles = positions[:, None, :, None] * turn
    return backend.xp.cos(angles) * scale, backend.xp.sin(angles) * scale


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool = False) -> Array:
    """Turn every pair of x (B, H, T, D) by its angle; computed in float32, returned in the dtype of x.

    Interleaved pairs come out half split: q and k are turned alike, and their product does not see the order.
    """
    backend = backend_of(x)
    half = x.shape[-1] // 2
    parts = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    first, second = (backend.astype(part, "float32") for part in parts)
    turned = backend.xp.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return backend.astype(turned, backend.dtype_name(x))
