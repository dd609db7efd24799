"""Well-known systems as KVCache keyword arguments."""

from kvlib.codecs import Int, Rotated
from kvlib.eviction import HeavyHitter, SlidingWindow, SnapKV

CATALOGUE: dict[str, dict] = {
    # One array per sequence, as long as the sequence may become: StaticCache of Hugging Face transformers.
    "contiguous": {"block_size": None},
    # Blocks of 16 tokens behind a block table: vLLM's default (Kwon et al. 2023, section 7.2).
    "paged": {"block_size": 16},
    # Blocks of a single token: SGLang's token pool with its default page size (Zheng et al. 2024).
    "paged-token": {"block_size": 1},
    # A scale and an offset for each token and head, blocks of 64: LMDeploy's quant_policy=8.
    "paged-int8": {"block_size": 64, "codec": "int8"},
    # The same with half the bits: LMDeploy's quant_policy=4.
    "paged-int4": {"block_size": 64, "codec": Int(4)},
    # Keys per channel and values per token in groups of 32, the last 128 tokens exact (Liu et al. 2024, section 4.1).
    "kivi-4bit": {"block_size": 32, "codec": "kivi-4bit"},
    "kivi-2bit": {"block_size": 32, "codec": "kivi-2bit"},
    # vLLM's kv_cache_dtype="fp8", which is e4m3 (Micikevicius et al. 2022); there one scale serves a whole layer.
    "fp8": {"block_size": 16, "codec": "fp8"},
    # TensorRT-LLM's NVFP4 cache in blocks of its default 32 tokens (NVIDIA 2025, arXiv:2509.25149).
    "nvfp4": {"block_size": 32, "codec": "nvfp4"},
    # Rotated to tame outliers, then 4 bits with a scale for 128 numbers, a row of head_dim 128 (Ashkboos et al. 2024).
    "quarot": {"block_size": 16, "codec": Rotated(Int(4))},
    # Mistral 7B's window (Jiang et al. 2023, table 1).
    "sliding-window": {"block_size": 16, "eviction": SlidingWindow(4096)},
    # StreamingLLM's 4 sinks and 1,020 recent tokens (Xiao et al. 2023, table 1).
    "streaming-llm": {"block_size": 16, "eviction": SlidingWindow(1020, sinks=4)},
    # H2O with a fifth of 4,096 tokens, half of it recent (Zhang et al. 2023).
    "h2o": {"block_size": 16, "eviction": HeavyHitter(820)},
    # SnapKV with a window of 32, kernel 7, and 1,024 tokens of the prompt (Li et al. 2024).
    "snapkv": {"block_size": 16, "eviction": SnapKV(1024)},
}
