"""Registry: what real models ask a cache to remember, from data/models.json or any Hugging Face config.json."""

import difflib
import functools
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from kvlib.config import ModelConfig
from kvlib.families import FAMILIES, FULL, QWEN, SLIDING, all_but_every, all_layers, upper_layers
from kvlib.spec import FLOAT_BYTES, CacheSpec

# What transformers assumes where config.json is silent, and which layers have a window: for families that kvlib sizes
# but does not run, and what a cache has to know beyond `kvlib.families`.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8},
    "mixtral": {"num_key_value_heads": 8, "sliding_window": None},
    "qwen3_moe": QWEN | {"num_key_value_heads": 4},
    "gemma2": {
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
    },
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "gpt_oss": {"num_attention_heads": 64, "num_key_value_heads": 8},
    "falcon": {"multi_query": True},
    "gpt_bigcode": {"multi_query": True},
}
WINDOWED = {"mixtral": all_layers, "qwen3_moe": upper_layers, "gemma2": all_but_every}
for _family in FAMILIES.values():
    DEFAULTS[_family.model_type] = _family.defaults | DEFAULTS.get(_family.model_type, {})
    if _family.layer_types:
        WINDOWED[_family.model_type] = _family.layer_types
# Silent about num_key_value_heads means as many as query heads.
MULTI_HEAD = {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "llama", "opt", "phi"}
SPELLINGS = {  # the same fields in older families
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads",),
    "hidden_size": ("n_embd", "d_model"),
    "max_position_embeddings": ("n_positions", "max_seq_len"),
}
# Fields of models that keep a state, a second kind of cache or heads of two sizes: a number for them would be wrong.
BEYOND = (
    "attn_layer_period",
    "cross_attention_layers",
    "full_attention_interval",
    "global_head_dim",
    "hybrid_override_pattern",
    "is_encoder_decoder",
    "layers_block_type",
    "ssm_cfg",
)


class LayerGroup(NamedTuple):
    """Layers of a model that cache alike. ``window``: the newest tokens that each of them keeps; None: all of them."""

    spec: CacheSpec
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """What a model asks its cache to remember, and where the numbers come from.

    Attributes:
        groups: its layers, those that cache alike together.
        num_heads: query heads.
        parameters: weights, by count; None if nobody counted them.
        max_positions: the longest context it was made for, in tokens; None if config.json does not say.
        source, checked: where its shape was published, and how far the entry was compared with that; note: a caveat.
        expanded: with multi-head latent attention, the spec of a cache of its heads' own K and V instead.
    """

    name: str
    groups: tuple[LayerGroup, ...]
    num_heads: int | None = None
    parameters: int | None = None
    max_positions: int | None = None
    source: str = ""
    checked: str = ""
    note: str = ""
    expanded: CacheSpec | None = None

    @property
    def num_layers(self) -> int:
        """Layers with a cache of their own."""
        return sum(group.spec.num_layers for group in self.groups)

    @property
    def elements_per_token(self) -> int:
        """Numbers stored for one token, over all layers, as long as no window is full."""
        return sum(group.spec.elements_per_token for group in self.groups)

    @property
    def bytes_per_token(self) -> int:
        """The same in bytes of the model's own dtype: the figure that papers print."""
        return sum(group.spec.bytes_per_token for group in self.groups)


def from_config(config: dict[str, Any], name: str = "config.json", dtype: str | None = None) -> Model:
    """The contents of a Hugging Face config.json. Of a multimodal model, the language model in its ``text_config``.

    ``dtype`` of the uncompressed cache: None means the one in the file, or bfloat16 if it names none. Weights are
    counted (`Model.parameters`) for architectures that kvlib can run.

    Raises:
        ValueError: a size is missing or no positive integer; or layers that keep something else than K and V.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{name}: a config must be a JSON object, got {type(config).__name__}")
    if isinstance(config.get("text_config"), dict):
        outer = {key: config[key] for key in ("dtype", "torch_dtype") if key in config}
        config = outer | config["text_config"]
    return replace(_read(config, name, dtype), parameters=_count(config))


def _read(config: dict[str, Any], name: str, dtype: str | None = None) -> Model:
    """All of a `Model` but the count of its weights."""
    kind = config.get("model_type")
    given = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    config = DEFAULTS.get(kind, {}) | given
    for field, other in SPELLINGS.items():
        config.setdefault(field, next((config[key] for key in other if key in config), None))
    beyond = [key for key in BEYOND if config.get(key)]
    if beyond:
        raise ValueError(f"{name}: {', '.join(beyond)} is beyond kvlib, which counts K and V of decoder layers alone")

    def size(field: str, default: int | None = None) -> int:
        value = default if config.get(field) is None else config[field]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {field} must be a positive integer, got {value!r}")
        return value

    dtype = dtype or str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in FLOAT_BYTES:
        raise ValueError(f"{name}: its dtype is {dtype}; say in which one of {', '.join(FLOAT_BYTES)} K and V are kept")
    num_layers, heads, expanded = size("num_hidden_layers"), size("num_attention_heads"), None
    if "kv_lora_rank" in config:  # one latent for all heads; head_dim, where it is given, says something else
        latent, rope = size("kv_lora_rank"), size("qk_rope_head_dim")
        shape = {"num_kv_heads": 1, "head_dim": latent + rope, "latent": latent}
        key, value = size("qk_nope_head_dim") + rope, size("v_head_dim")
        expanded = CacheSpec(heads, key, num_layers, dtype, v_head_dim=value)
    else:
        if config.get("multi_query") and not config.get("new_decoder_architecture"):
            groups = 1
        else:
            groups = size("num_key_value_heads", heads if kind in MULTI_HEAD else None)
        if heads % groups:
            raise ValueError(f"{name}: num_attention_heads={heads} must be a multiple of num_key_value_heads={groups}")
        if config.get("head_dim") is None and size("hidden_size") % heads:
            raise ValueError(f"{name}: without head_dim, hidden_size must divide by num_attention_heads={heads}")
        width = size("head_dim", None if config.get("head_dim") is not None else size("hidden_size") // heads)
        shape = {"num_kv_heads": groups, "head_dim": width}
    windows = Counter(_windows(config, name))
    layers = tuple(LayerGroup(CacheSpec(num_layers=n, dtype=dtype, **shape), window) for window, n in windows.items())
    return Model(
        name,
        layers,
        heads,
        max_positions=config["max_position_embeddings"],
        source=name,
        checked="config read",
        expanded=expanded,
    )


def _windows(config: dict[str, Any], name: str) -> list[int | None]:
    """The window of each layer that has a cache of its own; None: it keeps everything."""
    window, layers, types = config.get("sliding_window"), config["num_hidden_layers"], config.get("layer_types")
    by_family = WINDOWED.get(config.get("model_type"))
    if by_family:
        types = by_family(config)
    elif types is None:
        sliding = window is not None and config.get("use_sliding_window") is not False
        types = [SLIDING if sliding else FULL] * layers
    reach = {FULL: None, SLIDING: window, "chunked_attention": config.get("attention_chunk_size")}
    if len(types) != layers or not set(types) <= reach.keys():
        raise ValueError(f"{name}: layer_types must name {layers} layers, each one of {', '.join(reach)}; got {types}")
    for which in set(types) - {FULL}:
        if not isinstance(reach[which], int) or reach[which] < 1:
            raise ValueError(f"{name}: layers of type {which} need a window, a positive integer; got {reach[which]!r}")
    return [reach[which] for which in types[: layers - (config.get("num_kv_shared_layers") or 0)]]


def _count(config: dict[str, Any]) -> int | None:
    """Weights of an architecture that kvlib can load; None for any other."""
    try:
        return sum(math.prod(shape) for shape in ModelConfig.from_dict(config).tensor_shapes().values())
    except ValueError:
        return None


@functools.cache
def registry() -> dict[str, Model]:
    """The models that kvlib knows, by name. Each says where its numbers were published and how they were checked."""
    entries = json.loads(resources.files("kvlib").joinpath("data/models.json").read_text(encoding="utf-8"))
    facts = ("parameters", "source", "checked", "note")
    return {
        name: replace(_read(entry["config"], name), **{fact: entry.get(fact, "") for fact in facts})
        for name, entry in entries.items()
    }


ModelLike = str | Path | dict[str, Any] | CacheSpec | Model


def find(model: ModelLike) -> Model:
    """A `Model` from a registry name, a config.json (its path, its directory or its contents) or a `CacheSpec`.

    Case does not matter in a name, nor an organisation in front of it: "meta-llama/Llama-3.1-8B" is known.

    Raises:
        ValueError: no such name and no such file (the message lists names that are near); see `from_config`.
    """
    if isinstance(model, Model):
        return model
    if isinstance(model, CacheSpec):
        return Model(f"{model.num_layers} layers of {model.num_kv_heads} KV heads", (LayerGroup(model),))
    if isinstance(model, dict):
        return from_config(model)
    if not isinstance(model, str | Path):
        raise TypeError(f"model must be a name, a path, a dict, a CacheSpec or a Model, got {type(model).__name__}")
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if path.is_file():
        try:
            return from_config(json.loads(path.read_text(encoding="utf-8")), str(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    names = {name.lower(): name for name in registry()}
    wanted = str(model).lower()
    for key in (wanted, wanted.rpartition("/")[2]):
        if key in names:
            return registry()[names[key]]
    near = [names[key] for key in difflib.get_close_matches(wanted.rpartition("/")[2], names, n=4, cutoff=0.5)]
    known = f"near it: {', '.join(near)}" if near else f"known: {', '.join(names.values())}"
    raise ValueError(f"no model is called {str(model)!r} and no config.json lies there; {known}")
