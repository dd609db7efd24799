"""The architectures that kvlib reads, as data: what a name says that config.json need not.

An architecture's name in config.json stands for code elsewhere. What that code decides is written down here, so that
reading, writing and computing know parts alone: biases, norms, windows, latents, experts.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

SLIDING, FULL = "sliding_attention", "full_attention"


NOTHING: Mapping[str, Any] = MappingProxyType({})


class Family(NamedTuple):
    """One architecture.

    model_type: its other name.
    fixed: fields of `ModelConfig` that it decides.
    defaults: settings of config.json that may be left out, and what they then are.
    only: settings of which kvlib knows these values alone; the first is what it writes.
    layer_types: config.json -> which layers have a sliding window; None: none has.
    experts: fields of `Experts` -> their names in config.json; None: no experts.
    fixed_experts: fields of `Experts` that the architecture decides.
    latent: it has multi-head latent attention.
    """

    model_type: str
    fixed: Mapping[str, Any] = NOTHING
    defaults: Mapping[str, Any] = NOTHING
    only: Mapping[str, tuple[Any, ...]] = MappingProxyType({"hidden_act": ("silu",)})
    layer_types: Callable[[dict[str, Any]], list[str]] | None = None
    experts: dict[str, str] | None = None
    fixed_experts: Mapping[str, Any] = NOTHING
    latent: bool = False


def all_layers(config: dict[str, Any]) -> list[str]:
    """Mistral: every layer has the window, if there is one, or those that ``layer_types`` names."""
    kind = FULL if config["sliding_window"] is None else SLIDING
    return config.get("layer_types") or [kind] * config["num_hidden_layers"]


def upper_layers(config: dict[str, Any]) -> list[str]:
    """Qwen: those that ``layer_types`` names, or all from ``max_window_layers`` on; none if it is switched off."""
    layers, first = config["num_hidden_layers"], config["max_window_layers"]
    if not config["use_sliding_window"] or config["sliding_window"] is None:
        return [FULL] * layers
    return config.get("layer_types") or [SLIDING if i >= first else FULL for i in range(layers)]


def all_but_every(config: dict[str, Any]) -> list[str]:
    """Gemma 3, gpt-oss: those that ``layer_types`` names, or all but every ``sliding_window_pattern``-th."""
    period = config["sliding_window_pattern"]
    pattern = [SLIDING if (i + 1) % period else FULL for i in range(config["num_hidden_layers"])]
    return config.get("layer_types") or pattern


NO_BIAS = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
DEEPSEEK_EXPERTS = {
    "count": "n_routed_experts",
    "per_token": "num_experts_per_tok",
    "width": "moe_intermediate_size",
    "first_layer": "first_k_dense_replace",
    "num_shared": "n_shared_experts",
    "groups": "n_group",
    "groups_per_token": "topk_group",
    "scaling": "routed_scaling_factor",
}
GPT_OSS_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral", NO_BIAS, {"sliding_window": 4096}, layer_types=all_layers),
    "Qwen2ForCausalLM": Family("qwen2", NO_BIAS | {"qkv_bias": True}, QWEN, layer_types=upper_layers),
    "Qwen3ForCausalLM": Family(
        "qwen3", {"mlp_bias": False, "qk_norm": True}, QWEN | {"head_dim": 128}, layer_types=upper_layers
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        fixed={
            "mlp_bias": False,
            "qk_norm": True,
            "norm_offset": 1.0,
            "sandwich_norms": True,
            "scaled_embedding": True,
            "activation": "gelu_tanh",
        },
        defaults={
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        only={
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        layer_types=all_but_every,
    ),
    "GptOssForCausalLM": Family(
        "gpt_oss",
        fixed={"mlp_bias": False, "sinks": True},
        defaults={
            "head_dim": 64,
            "attention_bias": True,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_parameters": GPT_OSS_YARN,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
        },
        layer_types=all_but_every,
        experts={
            "count": "num_local_experts",
            "per_token": "num_experts_per_tok",
            "width": "intermediate_size",
            "limit": "swiglu_limit",
            "alpha": "swiglu_alpha",
        },
        fixed_experts={"router": "router", "router_bias": True, "scoring": "softmax", "normalise": True},
    ),
    "DeepseekV2ForCausalLM": Family(
        "deepseek_v2",
        fixed={"mlp_bias": False, "rope_interleaved": True},
        defaults={
            "q_lora_rank": 1536,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "routed_scaling_factor": 1.0,
        },
        only={
            "hidden_act": ("silu",),
            "topk_method": ("group_limited_greedy", "greedy"),
            "scoring_func": ("softmax",),
            "norm_topk_prob": (False,),
            "moe_layer_freq": (1,),
        },
        experts=DEEPSEEK_EXPERTS,
        fixed_experts={"router": "gate", "scoring": "softmax", "group_top": 1, "normalise": False},
        latent=True,
    ),
    "DeepseekV3ForCausalLM": Family(
        "deepseek_v3",
        fixed={"mlp_bias": False},
        defaults={
            "q_lora_rank": 1536,
            "rope_interleave": True,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
        },
        only={
            "hidden_act": ("silu",),
            "topk_method": ("noaux_tc",),
            "scoring_func": ("sigmoid",),
            "moe_layer_freq": (1,),
        },
        experts=DEEPSEEK_EXPERTS | {"normalise": "norm_topk_prob"},
        fixed_experts={"router": "gate", "corrected": True, "scoring": "sigmoid", "group_top": 2},
        latent=True,
    ),
}

# architectures that hold a supported model and more; what to say of the rest
NEARLY = {
    "Gemma3ForConditionalGeneration": "it holds an image encoder beside its text model, and kvlib reads text models "
    "alone: save the text part as Gemma3ForCausalLM",
}
