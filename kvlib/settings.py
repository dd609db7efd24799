"""The settings of a config.json: which architecture it is, and whether every setting is of the kind it must be."""

import math
from typing import Any

from kvlib.families import FAMILIES, NEARLY
from kvlib.spec import is_whole

# what a setting must be where it is there and not null; sizes and numbers are checked one by one
TYPES: dict[str, type] = {
    "architectures": list,
    "quantization_config": dict,
    "rope_scaling": dict,
    "rope_parameters": dict,
    "layer_types": list,
    "tie_word_embeddings": bool,
    "attention_bias": bool,
    "mlp_bias": bool,
    "use_sliding_window": bool,
    "norm_topk_prob": bool,
    "rope_interleave": bool,
    "sliding_window": int,
    "max_window_layers": int,
}
NULL_HAS_MEANING = ("sliding_window", "q_lora_rank")  # elsewhere null is as good as nothing


def read_settings(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture's name, and its defaults overlaid with what ``config`` says.

    Raises:
        ValueError: an architecture or a value that kvlib lacks, quantised weights, a setting of the wrong type.
    """
    for name, kind in TYPES.items():
        if config.get(name) is not None and not isinstance(config[name], kind):
            raise ValueError(f"config.json: {name} must be of type {kind.__name__}, got {config[name]!r}")
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    for name, supported in family.only.items():
        if name in config and config[name] not in (*supported, None):
            known = ", ".join(map(str, supported))
            raise ValueError(f"{name} {config[name]!r} is not supported; supported: {known}")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown")
        raise ValueError(
            f"quantised weights (quant_method {method!r}) are not supported; use the plain checkpoint, or let "
            f"transformers load this one with its weights dequantised and save it again"
        )
    given = {name: value for name, value in config.items() if value is not None or name in NULL_HAS_MEANING}
    return architecture, family.defaults | given


def size(settings: dict[str, Any], name: str, default: int | None = None, least: int = 1) -> int:
    """A setting that must be an integer of at least ``least``."""
    value = settings.get(name, default)
    if not is_whole(value) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"config.json: {name} must be {wanted}, got {value!r}")
    return int(value)


def number(settings: dict[str, Any], name: str, default: float | None = None) -> float:
    """A setting that must be a positive number; an integer stays one."""
    value = settings.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {name} must be a positive number, got {value!r}")
    return value


def drafting_layers(config: dict[str, Any]) -> int:
    """Layers that a checkpoint may hold behind the last one, to guess ahead (DeepSeek-V3); kvlib leaves them out."""
    return size({"num_nextn_predict_layers": 0} | config, "num_nextn_predict_layers", least=0)


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures") or []
    if not names:  # a config that was never saved with a model says only its type
        names = [name for name, family in FAMILIES.items() if family.model_type == config.get("model_type")]
    found = str(names[0]) if names else f"model_type {config.get('model_type')!r}"
    if found in NEARLY:
        raise ValueError(f"architecture {found} is not supported: {NEARLY[found]}")
    if found not in FAMILIES:
        raise ValueError(f"architecture {found} is not supported; supported: {', '.join(FAMILIES)}")
    return found
