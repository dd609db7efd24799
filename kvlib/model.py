"""A Llama-family decoder on either backend: norm, attention, norm, feed-forward, and again.

Reads and writes Hugging Face directories of Llama, Mistral, Qwen2 and Qwen3. Inference only. Activations are
(B, T, hidden_size).
"""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvlib import checkpoint
from kvlib.arrays import Array, Backend, backend_of, get_backend
from kvlib.attention import dense
from kvlib.cache import KVCache
from kvlib.config import ModelConfig
from kvlib.rope import cos_sin, frequencies, rotate
from kvlib.spec import CacheSpec

Weights = dict[str, Array]


class Transformer:
    """A decoder: token ids in, logits out. The cache is no part of it: it is handed in, of any kind, or none.

    Attributes: ``config`` (ModelConfig), ``backend``, ``dtype`` (of weights and activations).
    """

    def __init__(self, config: ModelConfig, weights: Weights, backend: Backend, dtype: str) -> None:
        self.config, self.backend, self.dtype = config, backend, dtype
        self._weights = weights
        self._layers = [_below(weights, f"model.layers.{i}.") for i in range(config.num_layers)]
        self._embedding = weights["model.embed_tokens.weight"]
        self._output = weights.get("lm_head.weight", self._embedding)  # absent when the two are tied
        turn, self._rope_scale = frequencies(config.rope, config.head_dim)
        self._turn = backend.asarray(turn)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, backend: str = "numpy", device: str | None = None, dtype: str = "float32"
    ) -> "Transformer":
        """Read a Hugging Face directory: config.json and safetensors, in one file or sharded.

        ``dtype`` is what weights are converted to and activations computed in: "float32", or on torch also
        "float16" and "bfloat16" (norms, rotations and softmax stay in float32).

        Raises:
            FileNotFoundError: no such directory, or it lacks config.json or weights.
            ValueError: an unsupported architecture or setting, weights in a pickle, a tensor that is missing,
                unexpected or of another shape, a damaged file, an unknown backend or dtype.
        """
        kind = get_backend(backend, device)
        allowed = ("float32",) if kind.name == "numpy" else ("float32", "float16", "bfloat16")
        if dtype not in allowed:
            raise ValueError(f"dtype must be {' or '.join(allowed)} on the {kind.name} backend, got {dtype!r}")
        directory = Path(path)
        config = ModelConfig.from_dict(checkpoint.read_config(directory))
        weights = checkpoint.read_tensors(directory, config.tensor_shapes(), kind, dtype)
        return cls(config, weights, kind, dtype)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers and `from_pretrained` read."""
        tensors = {name: np.ascontiguousarray(self.backend.to_numpy(w)) for name, w in self._weights.items()}
        checkpoint.write(Path(path), self.config.to_dict(self.dtype), tensors)

    @property
    def spec(self) -> CacheSpec:
        """The CacheSpec that this model's cache needs."""
        config = self.config
        return CacheSpec(config.num_kv_heads, config.head_dim, config.num_layers, self.dtype)

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(w.shape)) for w in self._weights.values())

    def __repr__(self) -> str:
        c = self.config
        return (
            f"Transformer({c.architecture}, {self.num_parameters / 1e6:.1f} M parameters, "
            f"{c.num_layers} layers, {c.num_heads}:{c.num_kv_heads} heads of {c.head_dim}, "
            f"{self.dtype} on {self.backend.name})"
        )

    def __call__(
        self,
        tokens: Array | Sequence[Sequence[int]],
        cache: KVCache | None = None,
        seqs: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> Array:
        """Logits for the token that follows each of ``tokens``.

        Args:
            tokens: (B, T) integers, the next T tokens of B sequences: an array, a tensor or nested lists.
            cache: a KVCache for `spec`, or anything with its ``append``, ``attend`` and ``lengths``.
                Positions go on from ``cache.lengths``, which may differ between sequences. None: from 0.
            seqs: the B sequences of the cache to continue; None means all open ones.
            last_only: compute the logits of the last position only, which is all that generation needs.

        Returns:
            (B, T, vocab_size) float32 on the model's backend; (B, 1, vocab_size) if ``last_only``.

        Raises:
            TypeError, ValueError, KeyError: tokens, cache or sequences do not fit (the message says how).
            CacheFull: from the cache. Whatever is raised, the cache is truncated to what it held before.
        """
        ids = self._checked_tokens(tokens)
        seqs, starts = self._checked_sequences(ids, cache, seqs)
        positions = starts[:, None] + np.arange(ids.shape[1])
        self._check_window(positions)
        cos, sin = cos_sin(positions, self._turn, self._rope_scale, self.backend)

        x = self._embedding[self.backend.asarray(ids)]
        try:
            x = self._run_layers(x, cos, sin, cache, seqs)
        except BaseException:  # interrupted between two layers, the cache would hold a step that some lack
            if hasattr(cache, "truncate"):
                for seq, start in zip(seqs, starts.tolist(), strict=True):
                    cache.truncate(seq, start)
            raise
        if last_only:
            x = x[:, -1:]
        x = rms_norm(x, self._weights["model.norm.weight"], self.config.rms_norm_eps)
        return self.backend.astype(linear(x, {"output.weight": self._output}, "output"), "float32")

    def _run_layers(self, x: Array, cos: Array, sin: Array, cache: KVCache | None, seqs: list[int] | None) -> Array:
        eps = self.config.rms_norm_eps
        for layer, w in enumerate(self._layers):
            q, k, v = self._project(rms_norm(x, w["input_layernorm.weight"], eps), w, cos, sin)
            if cache is None:
                heads = _dense_float32(q, k, v)
            else:
                cache.append(k, v, layer=layer, seqs=seqs)
                heads = cache.attend(q, layer=layer, seqs=seqs)
            x = x + linear(_join_heads(heads), w, "self_attn.o_proj")
            x = x + swiglu(rms_norm(x, w["post_attention_layernorm.weight"], eps), w)
        return x

    def _project(self, x: Array, w: Weights, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """x (B, T, d) -> q (B, Hq, T, D), k and v (B, Hkv, T, D); q and k normalised (Qwen3) and rotated."""
        q, k, v = (_split_heads(linear(x, w, f"self_attn.{n}_proj"), self.config.head_dim) for n in "qkv")
        if self.config.qk_norm:
            q = rms_norm(q, w["self_attn.q_norm.weight"], self.config.rms_norm_eps)
            k = rms_norm(k, w["self_attn.k_norm.weight"], self.config.rms_norm_eps)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _checked_tokens(self, tokens: Any) -> np.ndarray:
        ids = backend_of(tokens).to_numpy(tokens) if hasattr(tokens, "detach") else tokens
        try:
            ids = np.asarray(ids)
        except ValueError as error:
            raise ValueError(
                "tokens must be (B, T): every sequence of one call has the same number of new tokens"
            ) from error
        if ids.ndim != 2 or ids.size == 0:
            raise ValueError(f"tokens must be (B, T) with at least one token, got shape {ids.shape}")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"tokens must be integers, got {ids.dtype}")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            bad = ids[(ids < 0) | (ids >= self.config.vocab_size)][0]
            raise ValueError(
                f"token {bad} is outside the vocabulary: ids run from 0 to {self.config.vocab_size - 1}"
            )
        return ids.astype(np.int64)

    def _checked_sequences(self, ids: np.ndarray, cache: Any, seqs: Any) -> tuple[list[int] | None, np.ndarray]:
        """The sequences that the rows of ``ids`` continue, and how many tokens each has seen."""
        if cache is None:
            if seqs is not None:
                raise ValueError(f"seqs={seqs} names sequences of a cache, and there is none: pass cache=")
            return None, np.zeros(len(ids), np.int64)
        if missing := [name for name in ("append", "attend", "lengths") if not hasattr(cache, name)]:
            raise TypeError(f"cache must be a KVCache; a {type(cache).__name__} has no {', '.join(missing)}")
        spec, lengths = getattr(cache, "spec", self.spec), cache.lengths
        if _shape(spec) != _shape(self.spec):
            raise ValueError(f"the cache was built for another model: it has {spec}, this model needs {self.spec}")
        seqs = list(lengths) if seqs is None else [operator.index(seq) for seq in seqs]
        if unknown := [seq for seq in seqs if seq not in lengths]:
            raise KeyError(f"sequences {unknown} are not open; open sequences: {list(lengths)}")
        if len(seqs) != len(ids):
            raise ValueError(
                f"tokens has {len(ids)} rows for {len(seqs)} sequences of the cache ({seqs}); one row each"
            )
        return seqs, np.array([lengths[seq] for seq in seqs], np.int64)

    def _check_window(self, positions: np.ndarray) -> None:
        window = self.config.sliding_window
        if window is not None and positions.max() >= window:
            raise ValueError(
                f"position {positions.max()} is past this model's sliding_window={window}, not supported yet"
            )


# -- the parts of a layer --------------------------------------------------------------------------------


def linear(x: Array, w: Weights, name: str) -> Array:
    """x (..., inputs) -> x W^T + b (..., outputs). W is stored as (outputs, inputs); b may be absent."""
    rows = x.reshape(-1, x.shape[-1]) @ w[f"{name}.weight"].mT  # one matrix product, whatever the batch
    if f"{name}.bias" in w:
        rows = rows + w[f"{name}.bias"]
    return rows.reshape(*x.shape[:-1], -1)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x over its root mean square, times ``weight`` (RMSNorm, Zhang & Sennrich 2019, arXiv:1910.07467)."""
    backend = backend_of(x)
    wide = backend.astype(x, "float32")
    mean_square = backend.xp.mean(wide * wide, axis=-1, keepdims=True)
    return weight * backend.astype(wide / backend.xp.sqrt(mean_square + eps), backend.dtype_name(x))


def swiglu(x: Array, w: Weights) -> Array:
    """down(silu(gate(x)) * up(x)): the feed-forward block (Shazeer 2020, arXiv:2002.05202)."""
    return linear(silu(linear(x, w, "mlp.gate_proj")) * linear(x, w, "mlp.up_proj"), w, "mlp.down_proj")


def silu(x: Array) -> Array:
    """x * sigmoid(x) = x / (1 + e^-x), in the dtype of x."""
    backend = backend_of(x)
    wide = backend.astype(x, "float32")
    growth = backend.xp.exp(backend.xp.clip(-wide, None, 80.0))  # e^80 fits float32; beyond, silu is under 1e-32
    return backend.astype(wide / (1 + growth), backend.dtype_name(x))


def _dense_float32(q: Array, k: Array, v: Array) -> Array:
    backend = backend_of(q)
    out = dense(*(backend.astype(x, "float32") for x in (q, k, v)))
    return backend.astype(out, backend.dtype_name(q))


def _split_heads(x: Array, head_dim: int) -> Array:
    """(B, T, H * D) -> (B, H, T, D)."""
    return x.reshape(*x.shape[:2], -1, head_dim).swapaxes(1, 2)


def _join_heads(x: Array) -> Array:
    """(B, H, T, D) -> (B, T, H * D)."""
    batch, heads, tokens, width = x.shape
    return x.swapaxes(1, 2).reshape(batch, tokens, heads * width)


def _below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _shape(spec: CacheSpec) -> tuple[int, int, int, int, int | None]:
    return spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.value_dim, spec.latent
