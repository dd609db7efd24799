"""config.json of every family: read as transformers reads it, written so that it reads the same; what is refused."""

import numpy as np
import pytest

from kvlib.config import ModelConfig
from kvlib.feedforward import route
from kvlib.parts import Experts

from .conftest import FAMILIES, MIXED, MLA, SIZES

WINDOWS = {
    "mistral-default": ("Mistral", {}),
    "mistral-none": ("Mistral", dict(sliding_window=None)),
    "qwen2-upper": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen2-none-high-enough": ("Qwen2", dict(use_sliding_window=True, sliding_window=8)),
    "qwen3-off": ("Qwen3", dict(sliding_window=8)),
    "qwen3-default-width": ("Qwen3", dict(use_sliding_window=True, max_window_layers=0)),
    "gemma3-default": ("Gemma3", dict(num_hidden_layers=13)),
    "gemma3-pattern": ("Gemma3", dict(num_hidden_layers=7, sliding_window=5, sliding_window_pattern=3)),
    "gpt-oss-default": ("GptOss", dict(num_hidden_layers=5)),
    "gpt-oss-types": ("GptOss", dict(sliding_window=7, layer_types=["full_attention"] * 2 + ["sliding_attention"])),
}


def settings_of(transformers, prefix: str, differences: dict) -> dict:
    """The config.json of a model of transformers, without building one."""
    kind = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    return kind(**{**SIZES, **differences}).to_dict() | {"architectures": [f"{prefix}ForCausalLM"]}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows(case, transformers):
    prefix, differences = WINDOWS[case]
    settings = settings_of(transformers, prefix, differences)
    kinds = settings.get("layer_types")
    if kinds is None:  # Mistral: all layers alike
        kinds = ["full_attention" if settings["sliding_window"] is None else "sliding_attention"] * 3
    expected = tuple(settings["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)
    config = ModelConfig.from_dict(settings)
    assert config.windows == expected
    # what the Hub holds says less: the rule must give the same
    shorter = {k: v for k, v in settings.items() if k != "layer_types" or k in differences}
    assert ModelConfig.from_dict(shorter).windows == expected
    assert ModelConfig.from_dict(config.to_dict("float32")) == config


@pytest.mark.parametrize("family", [*FAMILIES, *MIXED])
def test_written_and_read_again(family, transformers):
    config = ModelConfig.from_dict(settings_of(transformers, *(FAMILIES | MIXED)[family]))
    assert ModelConfig.from_dict(config.to_dict("float32")) == config
    assert config.cache_spec("float16").bytes_per_token == 2 * config.cache_spec("float32").elements_per_token


def test_gemma_as_the_hub_spells_it(transformers):
    """google/gemma-3-1b-it: two bases of rotation in the older spelling, and much left to defaults."""
    hub = dict(
        architectures=["Gemma3ForCausalLM"],
        model_type="gemma3_text",
        hidden_activation="gelu_pytorch_tanh",
        hidden_size=1152,
        intermediate_size=6912,
        vocab_size=262144,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=32768,
        rope_local_base_freq=10000,
        rope_theta=1000000,
        rope_scaling=None,
        sliding_window=512,
        sliding_window_pattern=6,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    )
    config = ModelConfig.from_dict(hub)
    theirs = transformers.Gemma3TextConfig(**hub).to_dict() | {"architectures": ["Gemma3ForCausalLM"]}
    assert config == ModelConfig.from_dict(theirs | {n: None for n in ("bos_token_id", "eos_token_id", "pad_token_id")})
    assert config.windows == (512,) * 5 + (None,) + (512,) * 5 + (None,) + (512,) * 5 + (None,) + (512,) * 5 + (
        None, 512, 512
    )  # fmt: skip
    assert config.rope == {"rope_type": "default", "rope_theta": 1e6}
    assert config.local_rope == {"rope_type": "default", "rope_theta": 1e4}
    assert config.tied_embeddings and config.head_dim == 256 and config.attention_scale == 1 / 16
    # 26 layers, one KV head of 256: 26 KiB a token in bfloat16, and 999,885,952 parameters (its model card: 1B)
    assert config.cache_spec("bfloat16").bytes_per_token == 26 * 1024
    assert sum(int(np.prod(shape)) for shape in config.tensor_shapes().values()) == 999_885_952


def test_deepseek_v3_as_published(transformers):
    """Defaults of transformers are those of the 671B model: 576 columns in one head, and 671.0 billion parameters."""
    settings = transformers.DeepseekV3Config().to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    config = ModelConfig.from_dict(settings)
    spec = config.cache_spec("bfloat16")
    assert (spec.num_kv_heads, spec.head_dim, spec.latent, spec.num_layers) == (1, 576, 512, 61)
    assert spec.bytes_per_token == 70_272
    parameters = sum(int(np.prod(shape)) for shape in config.tensor_shapes().values())
    assert round(parameters / 1e9, 1) == 671.0


V2 = {"topk_method": "greedy", "q_lora_rank": None}


@pytest.mark.parametrize(
    ("prefix", "changes", "message"),
    [
        ("Gemma3", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0 is not supported; supported: None"),
        ("Gemma3", dict(final_logit_softcapping=30.0), "final_logit_softcapping 30.0 is not supported"),
        ("Gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention True is not supported"),
        ("Gemma3", dict(hidden_activation="gelu"), "hidden_activation 'gelu' is not supported; supported: gelu_py"),
        ("Gemma3", dict(query_pre_attn_scalar=0), "query_pre_attn_scalar must be a positive number, got 0"),
        ("Gemma3", dict(sliding_window=None), "sliding_window must be a positive integer, got None"),
        (
            "Gemma3",
            dict(rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            "layers with a window have rope_type 'default' alone, got 'linear'",
        ),
        ("Gemma3", dict(rope_parameters={"rope_theta": 1e4}), "rope_parameters has rope_theta; expected full_"),
        ("GptOss", dict(layer_types=["chunked_attention"] * 3), "layer_types holds 'chunked_attention', which is not"),
        ("GptOss", dict(layer_types=["full_attention"]), "layer_types has 1 entries for 3 layers"),
        ("GptOss", dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
        ("GptOss", dict(swiglu_limit=0), "swiglu_limit must be a positive number, got 0"),
        ("GptOss", dict(num_experts_per_tok=200), "a token chooses 200 experts, and only 128 are open"),
        ("DeepseekV3", dict(MLA, topk_method="greedy"), "topk_method 'greedy' is not supported; supported: noaux_tc"),
        ("DeepseekV3", dict(MLA, scoring_func="softmax"), "scoring_func 'softmax' is not supported"),
        ("DeepseekV3", dict(MLA, moe_layer_freq=2), "moe_layer_freq 2 is not supported; supported: 1"),
        ("DeepseekV3", dict(MLA, num_key_value_heads=2), "num_key_value_heads=2 must be num_attention_heads=4"),
        ("DeepseekV3", dict(MLA, qk_rope_head_dim=7), "qk_rope_head_dim=7 must be even"),
        ("DeepseekV3", dict(MLA, kv_lora_rank=0), "kv_lora_rank must be a positive integer, got 0"),
        ("DeepseekV3", dict(MLA, q_lora_rank="24"), "q_lora_rank must be a positive integer, got '24'"),
        ("DeepseekV3", dict(MLA, n_group=3), "8 experts in 3 groups, 2 of them open"),
        ("DeepseekV3", dict(MLA, n_group=8), "8 experts in 8 groups.* of at least 2 experts"),
        ("DeepseekV3", dict(MLA, topk_group=5), "8 experts in 4 groups, 5 of them open"),
        ("DeepseekV3", dict(MLA, num_experts_per_tok=5), "chooses 5 experts, and only 4 are open to it"),
        ("DeepseekV3", dict(MLA, first_k_dense_replace=-1), "first_k_dense_replace must be an integer of at least 0"),
        ("DeepseekV3", dict(MLA, norm_topk_prob="yes"), "norm_topk_prob must be of type bool, got 'yes'"),
        ("DeepseekV2", dict(MLA, **V2, norm_topk_prob=True), "norm_topk_prob True is not supported; supported: False"),
        ("DeepseekV2", dict(MLA, **V2, routed_scaling_factor=-1), "routed_scaling_factor must be a positive number"),
    ],
)
def test_what_is_refused(transformers, prefix, changes, message):
    settings = settings_of(transformers, prefix, MLA if prefix.startswith("Deepseek") else {})
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(settings | changes)


def test_greedy_routing_has_no_groups(transformers):
    """DeepSeek-V2-Lite: n_group is there and means nothing."""
    settings = settings_of(transformers, "DeepseekV2", MLA | V2)
    experts = ModelConfig.from_dict(settings).experts
    assert (experts.groups, experts.groups_per_token) == (1, 1)
    assert ModelConfig.from_dict(settings | {"topk_method": "group_limited_greedy"}).experts.groups == 4


def test_routing_by_hand():
    """Six experts in three groups, two groups open; the best expert of all, 4, sits in a closed group."""
    experts = Experts(6, 2, 1, "gate", "sigmoid", True, scaling=2.0, groups=3, groups_per_token=2, group_top=2)
    scores = np.array([[0.5, 0.4, 0.6, 0.5, 0.7, 0.1]])
    logits = np.log(scores / (1 - scores)).astype(np.float32)
    chosen, weights = route(logits, None, experts)
    assert chosen.tolist() == [[2, 0]]  # 3 ties with 0, and 0 comes first
    np.testing.assert_allclose(weights, [[2 * 0.6 / 1.1, 2 * 0.5 / 1.1]], rtol=1e-6)
    correction = np.array([0, 0, 0, 0, 0, 0.9], np.float32)  # opens the third group, and weighs nothing
    chosen, weights = route(logits, correction, experts)
    assert chosen.tolist() == [[5, 4]]
    np.testing.assert_allclose(weights, [[2 * 0.1 / 0.8, 2 * 0.7 / 0.8]], rtol=1e-6)
