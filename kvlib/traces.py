"""What prefix reuse would have saved on recorded traffic: block hashes alone, no text, no keys and values."""

import json
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from kvlib.blocks import BlockPool
from kvlib.prefix import HashChain, PrefixIndex


class Prompt(NamedTuple):
    """A request as recorded: the hash of each block, the partial last one included, and its length in tokens."""

    hashes: Sequence[Hashable]
    length: int


class HitStatistics(NamedTuple):
    """What a replay counted. A block is requested if it is complete; hits and tokens follow `PrefixIndex.match`."""

    prompts: int
    tokens: int
    hit_tokens: int
    blocks: int  # complete blocks requested
    hit_blocks: int
    evicted_blocks: int

    @property
    def token_hit_rate(self) -> float:
        """The share of all prompt tokens that need not be computed."""
        return self.hit_tokens / self.tokens if self.tokens else 0.0

    @property
    def block_hit_rate(self) -> float:
        """The share of all complete blocks that need not be computed."""
        return self.hit_blocks / self.blocks if self.blocks else 0.0


def replay(
    trace: Iterable[Prompt], capacity: int, block_size: int, index: type[PrefixIndex] = HashChain
) -> HitStatistics:
    """Serve the prompts one after another from ``capacity`` blocks, and count what is found.

    A prompt holds its blocks while it is served, and nothing afterwards: what it generates is not recorded, so it is
    not reused either. The partial last block takes no room. Of a prompt that exceeds the capacity the beginning stays.

    Raises ValueError: a prompt's hashes do not fit its length and ``block_size``.
    """
    pool = BlockPool(capacity)
    published = index(pool, block_size)
    prompts = tokens = blocks = hits = new = 0
    for hashes, length in trace:
        found = published.match_keys(hashes, length)
        pool.share(found)
        complete = length // block_size
        room = pool.num_free + published.evictable
        held = found + pool.allocate(min(complete - len(found), room)).tolist()
        new += len(published.insert_keys(hashes, held, len(held) * block_size).new)
        pool.release(held)
        prompts, tokens, blocks, hits = prompts + 1, tokens + length, blocks + complete, hits + len(found)
    return HitStatistics(prompts, tokens, hits * block_size, blocks, hits, new - published.num_blocks)


def read_mooncake(lines: Iterable[str]) -> list[Prompt]:
    """The prompts of a trace in Mooncake's format: one JSON object per line, blocks of 512 tokens.

    Source: Qin et al. 2024 (arXiv:2407.00079); https://github.com/kvcache-ai/Mooncake, FAST25-release.
    """
    records = (json.loads(line) for line in lines if line.strip())
    return [Prompt(record["hash_ids"], record["input_length"]) for record in records]
