"""Any order of requests, evictions and releases, against a shadow: a dict of all published prefixes.

The shadow looks at everything each time: the least recently used tail is found by comparing every prefix with every
other, a block counts as protected if any prefix that begins with its own is held. Small pools: blocks are soon reused.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvlib.blocks import BlockPool, CacheFull
from kvlib.prefix import HashChain, PrefixIndex, RadixTree

Prefix = tuple  # (salt, token, token, …)
# prompts that begin alike: zeros, then ones, then zeros
TOKENS = st.builds(lambda a, b, c: ([0] * a + [1] * b + [0] * c) or [1], *[st.integers(0, 5)] * 3)
SALTS = st.sampled_from(["", "", "", "another"])
PICK = st.integers(0, 9)


@dataclass
class Request:
    tokens: list[int]
    salt: str
    blocks: list[int]
    computed: int


@dataclass
class Shadow:
    """``blocks`` and ``used`` tell of each published prefix where its last block is, and when it was last wanted."""

    size: int
    blocks: dict[Prefix, int] = field(default_factory=dict)
    used: dict[Prefix, int] = field(default_factory=dict)
    now: int = 0

    def prefixes(self, tokens: list[int], salt: str) -> list[Prefix]:
        return [(salt, *tokens[:end]) for end in range(self.size, len(tokens) + 1, self.size)]

    def touch(self, prefixes: list[Prefix]) -> None:
        self.now += 1
        self.used.update(dict.fromkeys(prefixes, self.now))

    def match(self, tokens: list[int], salt: str) -> list[int]:
        known = [p for p in self.prefixes(tokens[:-1], salt) if p in self.blocks]
        self.touch(known)
        return [self.blocks[p] for p in known]

    def protected(self, held: Counter) -> set[Prefix]:
        return {p for p in self.blocks for q, block in self.blocks.items() if held[block] and q[: len(p)] == p}

    def evict(self, count: int, held: Counter) -> list[int]:
        gone = []
        while len(gone) < count:
            tails = [p for p in self.blocks if not any(q != p and q[: len(p)] == p for q in self.blocks)]
            tails = [p for p in tails if not held[self.blocks[p]]]
            if not tails:
                break
            oldest = min(tails, key=self.used.__getitem__)
            gone.append(self.blocks.pop(oldest))
        return gone


class World:
    """Requests on one pool and one index; every method tells the shadow too, and compares."""

    def __init__(self, index_class: type[PrefixIndex], blocks: int, size: int) -> None:
        self.pool = BlockPool(blocks)
        self.index = index_class(self.pool, size)
        self.shadow = Shadow(size)
        self.size = size
        self.requests: list[Request] = []
        self.others: list[int] = []  # held by somebody who does not publish
        self.content: dict[int, Prefix] = {}  # what was computed into a block since it was last taken
        self.seen: Counter = Counter()  # so that a test can ask whether anything happened at all

    @property
    def held(self) -> Counter:
        return Counter(self.others) + Counter(block for request in self.requests for block in request.blocks)

    def take(self, count: int) -> list[int] | None:
        """Allocate, and foretell what must be evicted for it; None if that cannot be enough."""
        held, free = self.held, self.pool.num_free
        evictable = len(self.shadow.blocks) - len(self.shadow.protected(held))
        if count > free + evictable:
            self.seen["full"] += 1
            self.seen["full, though some were evictable"] += evictable > 0
            refs = self.pool.refs.copy()
            with pytest.raises(CacheFull):
                self.pool.allocate(count)
            assert (self.pool.refs == refs).all()
            return None
        self.seen["reclaimed"] += count > free
        gone = self.shadow.evict(count - free, held)
        ids = self.pool.allocate(count).tolist()
        assert set(gone) <= set(ids)
        for block in ids:
            self.content.pop(block, None)
        return ids

    # -- requests ------------------------------------------------------------------------------------------------------

    def admit(self, tokens: list[int], salt: str) -> Request | None:
        found = self.index.match(tokens, salt)
        assert found == self.shadow.match(tokens, salt)
        assert len(found) * self.size < len(tokens)
        for count, block in enumerate(found, 1):
            assert self.content[block] == (salt, *tokens[: count * self.size])
        self.pool.share(found)
        request = Request(tokens, salt, found, len(found) * self.size)
        self.requests.append(request)
        rest = self.take(math.ceil(len(tokens) / self.size) - len(found))
        if rest is None:
            self.finish(request)
            return None
        request.blocks = found + rest
        self.seen["matched"] += bool(found)
        return request

    def grow(self, request: Request, more: list[int]) -> None:
        tokens = request.tokens + more
        rest = self.take(math.ceil(len(tokens) / self.size) - len(request.blocks))
        if rest is not None:
            request.tokens, request.blocks = tokens, request.blocks + rest

    def compute(self, request: Request, some: int) -> None:
        request.computed = min(request.computed + some, len(request.tokens))
        known = self.shadow.prefixes(request.tokens[: request.computed], request.salt)
        for block, prefix in zip(request.blocks, known, strict=False):
            assert self.content.setdefault(block, prefix) == prefix

    def publish(self, request: Request, remap: bool) -> None:
        prefixes = self.shadow.prefixes(request.tokens[: request.computed], request.salt)
        own = dict(zip(prefixes, request.blocks, strict=False))
        new = [p for p in prefixes if p not in self.shadow.blocks]
        self.shadow.blocks |= {p: own[p] for p in new}
        self.shadow.touch(prefixes)
        published = self.index.insert(request.tokens, request.blocks, request.computed, request.salt)
        assert published.blocks == [self.shadow.blocks[p] for p in prefixes]
        assert published.new == [own[p] for p in new]
        assert published.duplicates == {
            own[p]: self.shadow.blocks[p] for p in prefixes if own[p] != self.shadow.blocks[p]
        }
        self.seen["published"] += bool(new)
        self.seen["published below others"] += 0 < len(new) < len(prefixes)
        self.seen["duplicates"] += bool(published.duplicates)
        if remap:
            for mine, other in published.duplicates.items():
                self.pool.share([other])
                request.blocks[request.blocks.index(mine)] = other
                self.pool.release([mine])

    def finish(self, request: Request) -> None:
        self.requests.remove(request)
        self.pool.release(request.blocks)

    def finish_but_keep_the_end(self, request: Request, at: int) -> None:
        """As a window might: the blocks above those that are held are nobody's."""
        self.requests.remove(request)
        self.others += request.blocks[at:]
        self.pool.release(request.blocks[:at])

    # -- everybody else ------------------------------------------------------------------------------------------------

    def squat(self, count: int) -> None:
        self.others += self.take(count) or []

    def fork(self, request: Request) -> None:
        self.pool.share(request.blocks)
        self.others += request.blocks

    def leave(self) -> None:
        self.pool.release(self.others)
        self.others = []

    def look(self, tokens: list[int], salt: str) -> None:
        assert self.index.match(tokens, salt) == self.shadow.match(tokens, salt)

    def evict(self, count: int) -> None:
        free = self.pool.num_free
        gone = self.shadow.evict(count, self.held)
        assert self.index.evict(count) == len(gone)
        assert self.pool.num_free == free + len(gone)
        assert not self.pool.refs[gone].any()
        self.seen["evicted"] += bool(gone)
        self.seen["not enough to evict"] += len(gone) < count

    # -- what always holds ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What always holds."""
        self.blocks_are_conserved()
        self.sizes_add_up()
        self.every_published_prefix_is_found_and_no_other()
        self.the_queue_is_as_long_as_there_are_leaves()
        self.lookups_know_the_published_blocks_alone()

    def blocks_are_conserved(self) -> None:
        published = Counter(self.shadow.blocks.values())
        assert set(published.values()) <= {1}
        expected = self.held + published
        assert self.pool.refs.tolist() == [expected[block] for block in range(len(self.pool))]
        assert self.pool.num_free == len(self.pool) - len(expected)

    def sizes_add_up(self) -> None:
        index, protected = self.index, self.shadow.protected(self.held)
        assert index.num_blocks == len(self.shadow.blocks) == index.evictable + index.protected
        assert index.protected == len(protected)
        self.seen["protected, but not held"] += any(not self.held[self.shadow.blocks[p]] for p in protected)

    def every_published_prefix_is_found_and_no_other(self) -> None:
        for prefix in self.shadow.blocks:
            salt, *tokens = prefix
            path = [self.shadow.blocks[p] for p in self.shadow.prefixes(tokens, salt)]
            for next_block in ([0] * self.size, [1] * self.size):
                keys = self.index.keys(tokens + next_block, salt)
                further = self.shadow.blocks.get((salt, *tokens, *next_block))
                assert self.index._find(keys) == path + ([] if further is None else [further])

    def the_queue_is_as_long_as_there_are_leaves(self) -> None:
        assert len(self.index._queue) <= self.index.num_blocks
        assert len({block for _, block in self.index._queue}) == len(self.index._queue)

    def lookups_know_the_published_blocks_alone(self) -> None:
        published = sorted(self.shadow.blocks.values())
        if isinstance(self.index, HashChain):
            assert sorted(self.index._block.values()) == sorted(self.index._key) == published
        else:
            runs = [(run, None) for run in self.index._root.children.values()]
            seen = []
            for run, parent in runs:  # grows while it is walked
                assert len(run.keys) == len(run.blocks) > 0
                assert parent is None or run.parent is parent
                assert len(run.children) != 1, "a run that does not branch is one run"
                assert all(self.index._run[block] is run for block in run.blocks)
                assert all(key == child.keys[0] for key, child in run.children.items())
                runs += [(child, run) for child in run.children.values()]
                seen += run.blocks
                self.seen["branches"] += bool(run.children)
            assert sorted(seen) == sorted(self.index._run) == published


class PrefixMachine(RuleBasedStateMachine):
    index_class: type[PrefixIndex]

    @initialize(blocks=st.integers(4, 16), size=st.integers(1, 3))
    def build(self, blocks, size):
        self.world = World(self.index_class, blocks, size)

    @rule(tokens=TOKENS, salt=SALTS, some=st.integers(0, 12), remap=st.booleans(), stay=st.booleans())
    def serve(self, tokens, salt, some, remap, stay):
        request = self.world.admit(tokens, salt)
        if request is not None:
            self.world.compute(request, 12 - some)
            self.world.publish(request, remap)
            if not stay:
                self.world.finish(request)

    @rule(pick=PICK, more=TOKENS, remap=st.booleans(), end=st.sampled_from([None, 0, 1, 2, 3]))
    def go_on(self, pick, more, remap, end):
        if self.world.requests:
            request = self.world.requests[pick % len(self.world.requests)]
            self.world.grow(request, more[:5])
            self.world.compute(request, 4)
            self.world.publish(request, remap)
            if end == 0:
                self.world.finish(request)
            elif end == 3:
                self.world.fork(request)
            elif end is not None:
                self.world.finish_but_keep_the_end(request, end)

    @rule(count=st.integers(0, 4))
    def squat(self, count):
        self.world.squat(count)

    @rule()
    def leave(self):
        self.world.leave()

    @rule(tokens=TOKENS, salt=SALTS)
    def look(self, tokens, salt):
        self.world.look(tokens, salt)

    @rule(count=st.integers(0, 5))
    def evict(self, count):
        self.world.evict(count)

    @invariant()
    def holds(self):
        if hasattr(self, "world"):
            self.world.check()


class HashChainMachine(PrefixMachine):
    index_class = HashChain


class RadixTreeMachine(PrefixMachine):
    index_class = RadixTree


TestHashChain = HashChainMachine.TestCase
TestRadixTree = RadixTreeMachine.TestCase
TestHashChain.settings = TestRadixTree.settings = settings(stateful_step_count=40)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("index_class", [HashChain, RadixTree])
def test_a_long_day(index_class, size):
    """1500 steps on one pool: everything that can happen does, and often."""
    world, rng = World(index_class, 16, size), np.random.default_rng(size)
    for _ in range(1500):
        tokens = np.repeat([0, 1, 0], rng.integers(0, 3 * size + 1, 3)).tolist() or [0]
        act, number = rng.integers(12), int(rng.integers(12))
        request = world.requests[number % len(world.requests)] if world.requests else None
        if act < 4:
            request = world.admit(tokens, "" if number else "another")
            if request is not None and number % 2:
                world.compute(request, 12)
                world.publish(request, remap=number % 3 == 0)
        elif act == 4:
            world.evict(number % 4)
        elif act == 5:
            world.look(tokens, "")
        elif act == 6:
            world.squat(number % 4) if number % 2 else world.leave()
        elif request is not None and act < 9:
            world.grow(request, tokens[: number % 3])
            world.compute(request, 2 * number)
            world.publish(request, remap=number % 3 == 0)
        elif request is not None and act == 9:
            world.finish_but_keep_the_end(request, 1 + number % 3) if number % 4 else world.fork(request)
        elif request is not None:
            world.finish(request)
        world.check()
    expected = ["full", "full, though some were evictable", "reclaimed", "evicted", "not enough to evict", "matched"]
    expected += ["published", "published below others", "duplicates", "protected, but not held"]
    expected += ["branches"] if index_class is RadixTree else []
    assert min(world.seen[event] for event in expected) >= 20, world.seen
