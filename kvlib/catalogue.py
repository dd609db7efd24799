"""Well-known systems as KVCache keyword arguments."""

CATALOGUE: dict[str, dict] = {
    # One array per sequence, as long as the sequence may become: StaticCache of Hugging Face transformers.
    "contiguous": {"block_size": None},
    # Blocks of 16 tokens behind a block table: vLLM's default (Kwon et al. 2023, section 7.2).
    "paged": {"block_size": 16},
    # Blocks of a single token: SGLang's token pool with its default page size (Zheng et al. 2024).
    "paged-token": {"block_size": 1},
}
