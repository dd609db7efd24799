"""Roofline: what a step of a model computes and reads, and how long a device must take for it at least.

>>> from kvlib import roofline
>>> decode = roofline.step("Llama-3.1-8B", new=1, context=8192, batch=16)
>>> round(decode.attention.intensity, 2)
3.99
>>> round(1e3 * roofline.seconds(decode, "H200"), 2)
6.93

Counted are the products with weights and the two products of attention; norms, rotations, softmax and activations
that stay on the chip are not. Every byte is read once: weights once for a whole batch, K and V once for each sequence.

Source of the model: Williams et al. 2009 (doi:10.1145/1498765.1498785).
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

from kvlib.devices import Device, find_device
from kvlib.footprint import model_footprint
from kvlib.registry import LayerGroup, Model, ModelLike, find
from kvlib.spec import is_whole


class Work(NamedTuple):
    """``flops``: floating-point operations, two for a multiply-add; ``bytes``: what is read and written for them."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class Step(NamedTuple):
    """One step of a model: ``linear``, the products with its weights, and ``attention``."""

    linear: Work
    attention: Work

    @property
    def total(self) -> Work:
        return self.linear + self.attention


def linear(parameters: float, tokens: int, bytes_per_weight: float = 2, read: float | None = None) -> Work:
    """Products of ``tokens`` rows with ``parameters`` weights: 2 FLOP each, and every weight read once.

    ``read``: weights that are read, where that is not all that are multiplied: in a mixture of experts a token is
    multiplied with few of them, and a batch reads the experts of all its tokens.
    """
    return Work(2.0 * parameters * tokens, float(bytes_per_weight) * (parameters if read is None else read))


def attention(model: ModelLike, new: int, context: int, batch: int = 1, itemsize: int = 2, **settings: Any) -> Work:
    """Attention of ``batch`` sequences, in all layers: ``new`` queries each, the last of ``context`` tokens.

    Reads what a cache holds of K and V (codes and scales, by ``codec=`` and the other settings of
    `kvlib.footprint.footprint`), writes K and V of the new tokens, reads queries and writes outputs of ``itemsize``
    bytes. A window limits what a query sees.

    Raises ValueError: more new tokens than context, or the number of query heads is not known.
    """
    model = find(model)
    _check(new, context, batch)
    if not model.num_heads:
        raise ValueError(f"the number of query heads of {model.name} is not known: give a registry name or config.json")
    flops = queries = 0.0
    for spec, window in model.groups:
        rows = batch * spec.num_layers * model.num_heads
        flops += 2.0 * rows * pairs(new, context, window) * (spec.head_dim + spec.value_dim)
        queries += itemsize * rows * new * (spec.head_dim + spec.value_dim)
    held = model_footprint(model, context, batch, **settings)
    written = batch * new * model.elements_per_token * held.bits / 8
    return Work(flops, held.stored + written + queries)


def pairs(new: int, context: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees: ``new`` queries, the last of ``context`` positions, causal."""
    reach = context if window is None else window
    full = max(0, min(new, context - reach))  # queries that see ``reach`` keys
    rest = new - full  # the others begin at position context - new and see one key more each
    first = context - new + 1
    return full * reach + rest * first + rest * (rest - 1) // 2


def step(
    model: ModelLike,
    new: int,
    context: int,
    batch: int = 1,
    bytes_per_weight: float = 2,
    parameters: float | None = None,
    active: float | None = None,
    **settings: Any,
) -> Step:
    """One forward pass: ``new`` tokens of each sequence, behind ``context`` - ``new`` that are cached.

    new=1 is decoding, new=context a whole prefill. ``parameters`` None is the model's own count; ``active``: those
    that one token is multiplied with (a mixture of experts), None for all of them. Settings as of `attention`.
    """
    model = find(model)
    parameters = model.parameters if parameters is None else parameters
    if not parameters:
        raise ValueError(f"the number of weights of {model.name} is not known: pass parameters=…")
    work = linear(active or parameters, batch * new, bytes_per_weight, read=parameters)
    return Step(work, attention(model, new, context, batch, **settings))


def seconds(work: Work | Step, device: str | Device, dtype: str | None = None) -> float:
    """The least time: the longer of computing and reading. The two parts of a `Step` run one after the other.

    ``dtype``: of the matrix products; None is bfloat16, or whatever else the device has a rate for.
    """
    device = find_device(device)
    if isinstance(work, Step):
        return sum(seconds(part, device, dtype) for part in work)
    peak = device.peak(dtype or ("bfloat16" if "bfloat16" in device.peaks else next(iter(device.peaks))))
    return max(work.flops / peak, work.bytes / device.memory.bandwidth)


def critical_batch(
    model: ModelLike, context: int, device: str | Device, dtype: str = "bfloat16", whole: bool = True, **settings: Any
) -> int | None:
    """The least batch with which decoding at ``context`` is bound by arithmetic; None: no batch is large enough.

    ``whole``: attention counts too. Each sequence brings its own K and V to read, so what a batch shares is the
    weights alone, and attention's intensity is a limit that no batch exceeds. False asks about the weights only.
    """
    ridge = find_device(device).ridge(dtype)
    one = step(model, 1, context, 1, **settings)
    weights, each, read = one.linear.bytes, one.linear.flops, 0.0
    if whole:
        each, read = each + one.attention.flops, one.attention.bytes
    gain = each - ridge * read  # by how much a sequence brings arithmetic closer to reading, in FLOP
    return math.ceil(ridge * weights / gain) if gain > 0 else None


def grouped(model: ModelLike, num_kv_heads: int) -> Model:
    """``model`` with another number of KV heads: what sharing keys and values does to it.

    Raises ValueError: its query heads do not divide by it, or its layers keep a latent.
    """
    model = find(model)
    if not is_whole(num_kv_heads) or num_kv_heads < 1 or not model.num_heads or model.num_heads % num_kv_heads:
        raise ValueError(f"{model.num_heads} query heads cannot share {num_kv_heads!r} KV heads evenly")
    if any(group.spec.latent for group in model.groups):
        raise ValueError(f"{model.name} keeps a latent, which all of its heads share already")
    groups = tuple(LayerGroup(replace(spec, num_kv_heads=num_kv_heads), window) for spec, window in model.groups)
    return replace(model, name=f"{model.name}, {num_kv_heads} KV heads", groups=groups)


def _check(new: int, context: int, batch: int) -> None:
    for name, value in (("new", new), ("context", context), ("batch", batch)):
        if not is_whole(value) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if new > context:
        raise ValueError(f"the {new} new tokens are part of the context, which has {context}")
