"""Tiny models that transformers builds and saves, with transformers' own answers to compare with."""

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

import kvlib

VOCAB, PROMPT, NEW = 128, 60, 48
CHUNKS = (23, 1, 30, 1, 1, 4)  # of the prompt: long, single, ragged

SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    bos_token_id=None,
    eos_token_id=None,  # nothing ends a generation early
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)

# name: (transformers' prefix, what differs from SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biased": (
        "Llama",
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=24, rope_parameters=LLAMA3),
    ),
    "qwen2": ("Qwen2", dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(head_dim=32, num_attention_heads=8, tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(sliding_window=None, num_key_value_heads=1, rope_parameters=LINEAR)),
}

WINDOW = 16  # the prompt is longer, and so is one of its chunks
MLA = dict(
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=12,
    v_head_dim=10,
    moe_intermediate_size=24,
    n_routed_experts=8,
    n_shared_experts=2,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    first_k_dense_replace=1,
)
# what is not a plain stack of equal layers: latents, windows, sinks, experts
MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral-window": ("Mistral", dict(sliding_window=WINDOW)),
    "qwen3-window": (
        "Qwen3",
        dict(
            head_dim=32,
            use_sliding_window=True,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gemma3": (
        "Gemma3",
        dict(
            num_hidden_layers=4,
            head_dim=16,
            query_pre_attn_scalar=20,
            sliding_window=WINDOW,
            sliding_window_pattern=3,
            rope_scaling=dict(rope_type="linear", factor=4.0),
        ),
    ),
    "gpt-oss": (
        "GptOss",
        dict(
            head_dim=16,
            intermediate_size=40,
            sliding_window=WINDOW,
            num_local_experts=4,
            num_experts_per_tok=2,
            swiglu_limit=1.5,  # so low that it clamps
            rope_parameters={**YARN, "truncate": False},
        ),
    ),
    "deepseek-v3": (
        "DeepseekV3",
        dict(MLA, q_lora_rank=24, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}),
    ),
    "deepseek-v3-other": (
        "DeepseekV3",
        dict(MLA, q_lora_rank=None, rope_interleave=False, norm_topk_prob=False, attention_bias=True),
    ),
    "deepseek-v2": ("DeepseekV2", dict(MLA, q_lora_rank=None, topk_method="group_limited_greedy")),
}


class Reference(NamedTuple):
    """A saved model and what transformers computes with it."""

    path: Path
    model: Any  # the transformers model
    prompt: np.ndarray  # (1, PROMPT)
    logits: np.ndarray  # (PROMPT, vocab), in one pass without a cache
    cached_logits: np.ndarray  # the same in CHUNKS, with transformers' DynamicCache
    generated: list[int]  # NEW tokens, greedy, with its DynamicCache
    recomputed: list[int]  # the same without any cache


PLACES = ["numpy", "torch", pytest.param("cuda", marks=pytest.mark.gpu)]


def loaded(reference: Reference, place: str, torch: ModuleType) -> kvlib.Transformer:
    """kvlib's model of the reference in one of PLACES; a skip where there is no such place."""
    if place != "cuda":
        return kvlib.Transformer.from_pretrained(reference.path, place)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none here")
    return kvlib.Transformer.from_pretrained(reference.path, "torch", "cuda")


def logits_of(model: kvlib.Transformer, tokens: Any, cache: Any = None, **options: Any) -> np.ndarray:
    logits = model(tokens, cache, **options)
    assert model.backend.owns(logits) and model.backend.dtype_name(logits) == "float32"
    return model.backend.to_numpy(logits)


def required(name: str) -> ModuleType:
    """The module, or a skip where it is not installed; with KVLIB_REQUIRE=1 a missing module is an error."""
    if os.environ.get("KVLIB_REQUIRE") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    module = required("torch")
    module.set_num_threads(1)  # the models are tiny: on a busy machine threads that wait for each other cost minutes
    return module


@pytest.fixture(scope="session")
def transformers(torch: ModuleType) -> ModuleType:
    return required("transformers")


SEEDS = {"gemma3": 1}  # with tied embeddings most seeds repeat a few tokens for ever


def build(torch: ModuleType, transformers: ModuleType, family: str) -> Any:
    """A random model in which every parameter matters; transformers starts biases at 0 and norms at 1."""
    prefix, differences = (FAMILIES | MIXED)[family]
    config_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    model = getattr(transformers, f"{prefix}ForCausalLM")(config_class(**{**SIZES, **differences})).eval()
    generator = torch.Generator().manual_seed(SEEDS.get(family, 0))
    gemma = prefix == "Gemma3"  # it adds 1 to the weights of its norms, and multiplies embeddings by 8
    with torch.no_grad():
        for name, parameter in learned(model).items():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_((0 if gemma else 1) + 0.3 * noise)
            elif parameter.ndim == 1 or name.endswith("bias") or "embed" in name or "lm_head" in name:
                parameter.copy_((0.02 if gemma else 0.3) * noise)
            else:  # large enough that attention picks tokens out
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    return model


def learned(model: Any) -> dict[str, Any]:
    """Parameters, and the buffers that a checkpoint holds too."""
    return dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n.endswith("correction_bias")}


def dynamic_logits(torch: ModuleType, transformers: ModuleType, model: Any, prompt: np.ndarray) -> np.ndarray:
    cache, out = transformers.DynamicCache(), []
    for chunk in np.split(prompt, np.cumsum(CHUNKS)[:-1], axis=1):
        out.append(model(torch.from_numpy(chunk), past_key_values=cache).logits[0])
    return torch.cat(out).numpy()


def greedy(
    torch: ModuleType, transformers: ModuleType, model: Any, prompt: np.ndarray, cache: bool
) -> list[int]:
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW, use_cache=cache, eos_token_id=None, pad_token_id=0
    )
    return model.generate(torch.from_numpy(prompt), generation_config=settings)[0, prompt.shape[1] :].tolist()


def answers(torch: ModuleType, transformers: ModuleType, family: str, path: Path) -> Reference:
    """Build the family's model, save it in ``path``, and let transformers answer."""
    model = build(torch, transformers, family)
    model.save_pretrained(path)
    prompt = np.random.default_rng(1).integers(0, VOCAB, (1, PROMPT))
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt), use_cache=False).logits[0].numpy()
        cached = dynamic_logits(torch, transformers, model, prompt)
        generated, recomputed = (greedy(torch, transformers, model, prompt, c) for c in (True, False))
    return Reference(path, model, prompt, logits, cached, generated, recomputed)


@pytest.fixture(scope="session", params=FAMILIES)
def reference(request, torch, transformers, tmp_path_factory) -> Reference:
    return answers(torch, transformers, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session", params=MIXED)
def mixed(request, torch, transformers, tmp_path_factory) -> Reference:
    return answers(torch, transformers, request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def llama_path(torch, transformers, tmp_path_factory) -> Path:
    """A saved Llama to take apart in tests of bad input; copy it before changing it."""
    path = tmp_path_factory.mktemp("llama")
    build(torch, transformers, "llama").save_pretrained(path)
    return path
