"""A decoder on either backend: norm, attention, norm, feed-forward, and again.

Reads and writes Hugging Face directories of the architectures in `kvlib.families`. Inference only. Activations are
(B, T, hidden_size). What differs from one architecture to the next is in `kvlib.heads` and `kvlib.feedforward`.
"""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvlib import checkpoint
from kvlib.arrays import Array, Backend, backend_of, get_backend
from kvlib.cache import KVCache
from kvlib.config import ModelConfig
from kvlib.feedforward import feed_forward
from kvlib.groups import GroupedCache
from kvlib.heads import Angles, Forgetful, Recall, grouped_heads, latent_heads
from kvlib.ops import Weights, linear, rms_norm
from kvlib.rope import cos_sin, frequencies
from kvlib.settings import drafting_layers
from kvlib.spec import CacheSpec


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
        self._attention = latent_heads if config.latent else grouped_heads
        turned = config.latent.qk_rope_head_dim if config.latent else config.head_dim
        ropes = [frequencies(rope, turned) for rope in (config.rope, config.local_rope) if rope]
        self._ropes = [(backend.asarray(turn), scale) for turn, scale in ropes]  # of layers without and with a window

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
        settings = checkpoint.read_config(directory)
        config = ModelConfig.from_dict(settings)
        spare = tuple(f"model.layers.{config.num_layers + i}." for i in range(drafting_layers(settings)))
        weights = checkpoint.read_tensors(directory, config.tensor_shapes(), kind, dtype, spare)
        return cls(config, weights, kind, dtype)

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers and `from_pretrained` read."""
        tensors = {name: np.ascontiguousarray(self.backend.to_numpy(w)) for name, w in self._weights.items()}
        checkpoint.write(Path(path), self.config.to_dict(self.dtype), tensors)

    @property
    def spec(self) -> CacheSpec:
        """The CacheSpec that this model's cache needs."""
        return self.config.cache_spec(self.dtype)

    def new_cache(
        self, batch: int = 1, max_tokens: int = 4096, chunk: int = 512, **settings: Any
    ) -> KVCache | GroupedCache:
        """A cache on this model's backend whose layers keep what they can see, and no more.

        ``chunk``: where layers have a sliding window, the most tokens of one call; elsewhere it does not matter.
        ``settings``: ``block_size``, ``num_blocks``, ``codec`` of `KVCache`. `KVCache` (`spec`) gives the same answers,
        and keeps everything in every layer.
        """
        settings |= {"backend": self.backend.name, "device": self.backend.device and str(self.backend.device)}
        if self.config.sliding_window is None:
            return KVCache(self.spec, batch, max_tokens, **settings)
        return GroupedCache.for_windows(self.spec, self.config.windows, batch, max_tokens, chunk, **settings)

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
        cache: KVCache | GroupedCache | None = None,
        seqs: Sequence[int] | None = None,
        last_only: bool = False,
    ) -> Array:
        """Logits for the token that follows each of ``tokens``.

        Args:
            tokens: (B, T) integers, the next T tokens of B sequences: an array, a tensor or nested lists.
            cache: from `new_cache`, a KVCache for `spec`, or anything with its ``append``, ``attend`` and
                ``lengths``. Positions go on from ``cache.lengths``, which may differ between sequences. None: from 0.
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

        x = self._embedding[self.backend.asarray(ids)]
        if self.config.scaled_embedding:  # by a number that is rounded as the weights are
            x = x * self.backend.astype(self.backend.asarray(np.sqrt(x.shape[-1])), self.dtype)
        try:
            x = self._run_layers(x, positions, cache, seqs)
        except BaseException:  # interrupted between two layers, the cache would hold a step that some lack
            if hasattr(cache, "truncate"):
                for seq, start in zip(seqs, starts.tolist(), strict=True):
                    cache.truncate(seq, start)
            raise
        if last_only:
            x = x[:, -1:]
        x = self._norm(x, self._weights["model.norm.weight"])
        return self.backend.astype(linear(x, {"output.weight": self._output}, "output"), "float32")

    def _run_layers(self, x: Array, positions: np.ndarray, cache: KVCache | None, seqs: list[int] | None) -> Array:
        angles = [cos_sin(positions, turn, scale, self.backend) for turn, scale in self._ropes]
        cache = Forgetful(self.spec.latent) if cache is None else cache
        for layer, window in enumerate(self.config.windows):
            recall = Recall(cache, layer, seqs, window)
            x = self._layer(x, layer, angles[0 if window is None else -1], recall)
        return x

    def _layer(self, x: Array, layer: int, angles: Angles, recall: Recall) -> Array:
        """x plus attention, plus feed-forward: each behind a norm, or between two (Gemma 3)."""
        w, config = self._layers[layer], self.config
        sandwich = config.sandwich_norms
        y = self._attention(self._norm(x, w["input_layernorm.weight"]), w, config, angles, recall)
        x = x + (self._norm(y, w["post_attention_layernorm.weight"]) if sandwich else y)
        before = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"  # the same place, two names
        y = feed_forward(self._norm(x, w[f"{before}.weight"]), w, config, layer)
        return x + (self._norm(y, w["post_feedforward_layernorm.weight"]) if sandwich else y)

    def _norm(self, x: Array, weight: Array) -> Array:
        return rms_norm(x, weight, self.config.rms_norm_eps, self.config.norm_offset)

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


def _below(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _shape(spec: CacheSpec) -> tuple[int, int, int, int, int | None]:
    return spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.value_dim, spec.latent
