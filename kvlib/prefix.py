"""Prefix reuse: which blocks already hold the beginning of a prompt.

`HashChain` and `RadixTree` answer it in two ways, behind one interface: match, insert, evict. Both hold one reference
on each block that they have published, so that the `BlockPool` cannot hand it out again while it can be found; a block
loses its key and that reference in one step. A reference of anybody else's is a lock. Three rules make a hit safe:

* A block is published when it is complete and computed in every layer, not when it is planned.
* The last, partial block of a sequence is never published: more tokens will be written into it.
* The last token of a prompt is never matched: its logits are still wanted, so something must be left to compute.

Sources: Kwon et al. 2023 (arXiv:2309.06180), section 4.4; vLLM, "Automatic Prefix Caching"
(https://docs.vllm.ai/en/latest/design/prefix_caching.html); Zheng et al. 2024, RadixAttention (arXiv:2312.07104).
"""

import hashlib
from collections.abc import Hashable, Sequence

from kvlib.blocks import BlockPool
from kvlib.index import PrefixIndex, Published

__all__ = ["HashChain", "PrefixIndex", "Published", "RadixTree"]


class HashChain(PrefixIndex):
    """One dictionary: a block's key is a hash of its tokens and of the key before it, so it names the whole prefix.

    SHA-256, because a collision would serve one prompt with another's keys and values, and because Python's own hash()
    differs between processes. Keys from elsewhere must name whole prefixes too: ValueError if one turns up behind two.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        super().__init__(pool, block_size)
        self._block: dict[Hashable, int] = {}
        self._key: dict[int, Hashable] = {}  # its inverse

    def keys(self, tokens: Sequence[int], salt: str = "") -> list[Hashable]:
        blocks, keys = self._cut(tokens, salt), []
        key = hashlib.sha256(salt.encode()).digest()
        for block in blocks:
            key = hashlib.sha256(key + block.tobytes()).digest()
            keys.append(key)
        return keys

    def _find(self, keys: Sequence[Hashable]) -> list[int]:
        found, above = [], -1
        for key in keys:
            block = self._block.get(key)
            if block is None or self._above[block] != above:
                break
            found.append(above := block)
        rest = keys[len(found) :]
        if len(set(rest)) < len(rest) or not self._block.keys().isdisjoint(rest):
            raise ValueError("a key stands behind two different prefixes: a HashChain needs keys of whole prefixes")
        return found

    def _link(self, above: int, keys: Sequence[Hashable], blocks: list[int]) -> None:
        self._block.update(zip(keys, blocks, strict=True))
        self._key.update(zip(blocks, keys, strict=True))

    def _unlink(self, block: int) -> None:
        del self._block[self._key.pop(block)]


class _Run:
    """Blocks that follow each other without a branch: an edge of the radix tree and the node at its end."""

    __slots__ = ("blocks", "children", "keys", "parent")

    def __init__(self, keys: list[Hashable], blocks: list[int], parent: "_Run | None") -> None:
        self.keys, self.blocks, self.parent = keys, blocks, parent
        self.children: dict[Hashable, _Run] = {}  # by their first key


class RadixTree(PrefixIndex):
    """A tree whose edges hold runs of blocks; a block's key is its own tokens, compared as they are.

    Runs are split where two sequences part, which is between blocks (block_size=1: between any two tokens, as in
    SGLang), and joined when but one branch is left: the shape follows from what is published, not from its history.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        super().__init__(pool, block_size)
        self._root = _Run([], [], None)
        self._run: dict[int, _Run] = {}  # where each block stands

    def keys(self, tokens: Sequence[int], salt: str = "") -> list[Hashable]:
        keys: list[Hashable] = [tuple(block) for block in self._cut(tokens, salt).tolist()]
        return [(salt, key) for key in keys[:1]] + keys[1:]  # whoever has another first block has another branch

    def runs(self) -> list[tuple[list[Hashable], list]]:
        """The tree, to be drawn: (keys, the runs below) for each run at the top, in the order in which they came."""

        def below(run: _Run) -> list[tuple[list[Hashable], list]]:
            return [(list(child.keys), below(child)) for child in run.children.values()]

        return below(self._root)

    def _find(self, keys: Sequence[Hashable]) -> list[int]:
        found: list[int] = []
        run = self._root
        while len(found) < len(keys) and (run := run.children.get(keys[len(found)])) is not None:
            start, same = len(found), 1
            while same < len(run.keys) and start + same < len(keys) and run.keys[same] == keys[start + same]:
                same += 1
            found += run.blocks[:same]
            if same < len(run.keys):
                break
        return found

    def _link(self, above: int, keys: Sequence[Hashable], blocks: list[int]) -> None:
        run = self._run.get(above, self._root)
        if run is not self._root and run.blocks[-1] != above:
            self._split(run, run.blocks.index(above) + 1)
        if run is self._root or run.children:
            run.children[keys[0]] = run = _Run([], [], run)
        self._extend(run, keys, blocks)

    def _unlink(self, block: int) -> None:
        run = self._run.pop(block)
        run.blocks.pop()
        key = run.keys.pop()
        if not run.blocks:
            parent = run.parent
            del parent.children[key]
            if parent is not self._root and len(parent.children) == 1:
                (only,) = parent.children.values()
                self._extend(parent, only.keys, only.blocks)
                self._adopt(parent, only.children)

    def _split(self, run: _Run, at: int) -> None:
        tail = _Run([], [], run)
        self._adopt(tail, run.children)
        self._extend(tail, run.keys[at:], run.blocks[at:])
        del run.keys[at:], run.blocks[at:]
        run.children = {tail.keys[0]: tail}

    def _extend(self, run: _Run, keys: Sequence[Hashable], blocks: list[int]) -> None:
        run.keys += keys
        run.blocks += blocks
        self._run.update(dict.fromkeys(blocks, run))

    def _adopt(self, run: _Run, children: dict[Hashable, _Run]) -> None:
        run.children = children
        for child in children.values():
            child.parent = run
