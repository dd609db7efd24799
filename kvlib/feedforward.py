"""What follows attention in a layer: a gated feed-forward block, or a mixture of experts."""

import numpy as np

from kvlib.arrays import Array, backend_of
from kvlib.config import ModelConfig
from kvlib.ops import ACTIVATIONS, Weights, linear, sigmoid
from kvlib.parts import Experts


def feed_forward(x: Array, w: Weights, config: ModelConfig, layer: int) -> Array:
    """x (B, T, hidden_size) -> the same shape."""
    if config.experts is not None and layer >= config.experts.first_layer:
        return mixture(x, w, config.experts)
    return gated(x, w, "mlp", config.activation)


def gated(x: Array, w: Weights, name: str, activation: str = "silu") -> Array:
    """down(act(gate(x)) * up(x)) (SwiGLU with silu, GEGLU with gelu: Shazeer 2020, arXiv:2002.05202)."""
    gate = ACTIVATIONS[activation](linear(x, w, f"{name}.gate_proj"))
    return linear(gate * linear(x, w, f"{name}.up_proj"), w, f"{name}.down_proj")


def clamped(x: Array, w: Weights, expert: int, limit: float, alpha: float) -> Array:
    """gpt-oss's expert: down((up + 1) * gate * sigmoid(alpha gate)), where gate and up stay within ``limit``.

    Its experts lie in one tensor each, inputs before outputs, with the columns of gate and up taking turns.
    """
    backend = backend_of(x)
    both = x @ w["mlp.experts.gate_up_proj"][expert] + w["mlp.experts.gate_up_proj_bias"][expert]
    gate, up = (backend.astype(part, "float32") for part in (both[..., 0::2], both[..., 1::2]))
    gate, up = backend.xp.clip(gate, None, limit), backend.xp.clip(up, -limit, limit)
    hidden = backend.astype((up + 1) * gate * sigmoid(alpha * gate), backend.dtype_name(x))
    return hidden @ w["mlp.experts.down_proj"][expert] + w["mlp.experts.down_proj_bias"][expert]


def mixture(x: Array, w: Weights, experts: Experts) -> Array:
    """Each token through the ``per_token`` experts that its router chooses, and through the shared ones.

    Source: Shazeer et al. 2017 (arXiv:1701.06538); shared experts, DeepSeekMoE, Dai et al. 2024 (arXiv:2401.06066).
    """
    backend = backend_of(x)
    rows = x.reshape(-1, x.shape[-1])
    chosen, weights = route(*_router_scores(rows, w, experts.router), experts)
    weights = backend.asarray(weights)
    out = backend.xp.zeros_like(rows)
    for expert in np.unique(chosen).tolist():
        tokens, places = (backend.asarray(index) for index in np.nonzero(chosen == expert))
        if experts.limit is None:
            answer = gated(rows[tokens], w, f"mlp.experts.{expert}")
        else:
            answer = clamped(rows[tokens], w, expert, experts.limit, experts.alpha)
        # no token names an expert twice, so adding by index loses nothing
        out[tokens] += backend.astype(answer * weights[tokens, places][:, None], backend.dtype_name(x))
    out = out.reshape(x.shape)
    return out + gated(x, w, "mlp.shared_experts") if experts.num_shared else out


def route(logits: np.ndarray, correction: np.ndarray | None, experts: Experts) -> tuple[np.ndarray, np.ndarray]:
    """Router logits (N, experts) -> chosen experts and their weights, each (N, per_token).

    Of ``groups`` groups of experts only the best ``groups_per_token`` are open to a token; a group is worth the sum
    of its best ``group_top`` scores. ``correction`` (experts,) takes part in choosing, not in weighing: DeepSeek-V3
    balances its experts by it (arXiv:2412.19437, section 2.1.2).
    """
    if experts.scoring == "sigmoid":
        scores = sigmoid(logits)
    else:
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    choice = scores if correction is None else scores + correction
    if experts.groups > 1:
        grouped = choice.reshape(len(choice), experts.groups, -1)
        worth = np.sort(grouped, axis=-1)[..., -experts.group_top :].sum(-1)
        open_groups = _best(worth, experts.groups_per_token)
        closed = np.ones(worth.shape, bool)
        np.put_along_axis(closed, open_groups, False, axis=-1)
        choice = np.where(closed[..., None], -np.inf, grouped).reshape(choice.shape)
    chosen = _best(choice, experts.per_token)
    weights = np.take_along_axis(scores, chosen, axis=-1)
    if experts.normalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return chosen, (weights * np.float32(experts.scaling)).astype(np.float32)


def _router_scores(rows: Array, w: Weights, router: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits and, where there is one, the correction; in NumPy and float32: a choice of experts is a small decision."""
    backend = backend_of(rows)
    wide = {name: backend.astype(x, "float32") for name, x in w.items() if name.startswith(f"mlp.{router}.")}
    logits = backend.to_numpy(linear(backend.astype(rows, "float32"), wide, f"mlp.{router}"))
    correction = wide.get(f"mlp.{router}.e_score_correction_bias")
    return logits, None if correction is None else backend.to_numpy(correction)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest along the last axis, the largest first."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :count]
