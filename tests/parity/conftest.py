"""Tiny models that transformers builds and saves, with transformers' own answers to compare with."""

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

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
        dict(
            attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=24, rope_parameters=LLAMA3
        ),
    ),
    "qwen2": ("Qwen2", dict(rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(head_dim=32, num_attention_heads=8, tie_word_embeddings=True)),
    "mistral": ("Mistral", dict(sliding_window=None, num_key_value_heads=1, rope_parameters=LINEAR)),
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


def required(name: str) -> ModuleType:
    """The module, or a skip where it is not installed; with KVLIB_REQUIRE=1 a missing module is an error."""
    if os.environ.get("KVLIB_REQUIRE") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    return required("torch")


@pytest.fixture(scope="session")
def transformers(torch: ModuleType) -> ModuleType:
    return required("transformers")


def build(torch: ModuleType, transformers: ModuleType, family: str, seed: int = 0) -> Any:
    """A random model in which every parameter matters; transformers starts biases at 0 and norms at 1."""
    prefix, differences = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**SIZES, **differences})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias") or "embed" in name or "lm_head" in name:
                parameter.copy_(0.3 * noise)
            else:  # large enough that attention picks tokens out
                parameter.copy_(1.5 * noise / parameter.shape[1] ** 0.5)
    return model


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


@pytest.fixture(scope="session", params=FAMILIES)
def reference(request, torch, transformers, tmp_path_factory) -> Reference:
    model = build(torch, transformers, request.param)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    prompt = np.random.default_rng(1).integers(0, VOCAB, (1, PROMPT))
    with torch.no_grad():
        logits = model(torch.from_numpy(prompt), use_cache=False).logits[0].numpy()
        cached = dynamic_logits(torch, transformers, model, prompt)
        generated, recomputed = (greedy(torch, transformers, model, prompt, c) for c in (True, False))
    return Reference(path, model, prompt, logits, cached, generated, recomputed)


@pytest.fixture(scope="session")
def llama_path(torch, transformers, tmp_path_factory) -> Path:
    """A saved Llama to take apart in tests of bad input; copy it before changing it."""
    path = tmp_path_factory.mktemp("llama")
    build(torch, transformers, "llama").save_pretrained(path)
    return path
