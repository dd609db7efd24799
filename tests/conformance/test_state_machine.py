"""Any sequence of operations, against a shadow that keeps every token in plain lists.

Small pools, so that `CacheFull` happens; layers that run ahead of each other; sequences that share blocks.
After every step each slot that nobody can see is filled with NaN: no stale read can pass for an answer.
"""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvlib
from tests.conformance import bounds, reference
from tests.conformance.conftest import Setup
from tests.conformance.graph import changed, snapshot
from tests.conformance.test_sequences import conserved, poison

HEADS, WIDTH = 2, 4
PICK = st.integers(0, 11)


@dataclass(frozen=True)
class Step:
    """One append that worked, so that it can be told again to another cache."""

    seqs: tuple[int, ...]
    layer: int
    k: np.ndarray
    v: np.ndarray


class CacheMachine(RuleBasedStateMachine):
    """The shadow: ``rows[seq][layer]`` is the list of (K row, V row) that the sequence ought to hold."""

    place = "numpy"

    @initialize(
        block_size=st.sampled_from([None, 1, 3, 4, 16]),
        layers=st.integers(1, 3),
        batch=st.integers(0, 3),
        blocks=st.integers(1, 12),
        max_tokens=st.integers(5, 18),
    )
    def build(self, block_size, layers, batch, blocks, max_tokens):
        self.setup = Setup("paged", self.place, "float32")
        spec = kvlib.CacheSpec(HEADS, WIDTH, layers, "float32")
        self.settings = {"spec": spec, "batch": batch, "max_tokens": max_tokens, "block_size": block_size}
        self.cache = self.setup.cache(**self.settings, num_blocks=blocks)
        self.size = block_size or max_tokens
        self.rng = np.random.default_rng(layers)
        self.restart()

    def restart(self):
        self.rows = {seq: [[] for _ in range(self.layers)] for seq in range(self.settings["batch"])}
        self.next_id = self.settings["batch"]
        self.story: list = []  # what was done since the last reset

    @property
    def layers(self) -> int:
        return self.settings["spec"].num_layers

    def pick(self, number: int) -> int:
        return list(self.rows)[number % len(self.rows)]

    def length(self, seq: int) -> int:
        return max(map(len, self.rows[seq]))

    # -- operations --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.rows) < 6)
    @rule()
    def open(self):
        assert self.cache.open() == self.next_id
        self.rows[self.next_id] = [[] for _ in range(self.layers)]
        self.next_id += 1
        self.story.append(lambda cache: cache.open())

    @precondition(lambda self: 0 < len(self.rows) < 6)
    @rule(number=PICK)
    def fork(self, number):
        seq = self.pick(number)
        assert self.cache.fork(seq) == self.next_id
        self.rows[self.next_id] = [list(layer) for layer in self.rows[seq]]
        self.next_id += 1
        self.story.append(lambda cache: cache.fork(seq))

    @precondition(lambda self: self.rows)
    @rule(number=PICK)
    def close(self, number):
        seq = self.pick(number)
        self.cache.close(seq)
        del self.rows[seq]
        self.story.append(lambda cache: cache.close(seq))

    @precondition(lambda self: self.rows)
    @rule(number=PICK, n=st.integers(0, 18))
    def truncate(self, number, n):
        seq = self.pick(number)
        n = n % (self.length(seq) + 1)
        self.cache.truncate(seq, n)
        self.rows[seq] = [layer[:n] for layer in self.rows[seq]]
        self.story.append(lambda cache: cache.truncate(seq, n))

    @rule(really=st.integers(0, 5))
    def reset(self, really):
        if really == 0:  # rarely: it throws away what made the state interesting
            self.cache.reset()
            self.restart()

    @precondition(lambda self: self.rows)
    @rule(numbers=st.lists(PICK, min_size=1, max_size=4), tokens=st.integers(1, 9), layer=st.integers(0, 2))
    def append(self, numbers, tokens, layer):
        """To one layer of some sequences, wherever that layer stands."""
        self.step(tuple(dict.fromkeys(map(self.pick, numbers))), tokens, [layer % self.layers])

    @precondition(lambda self: self.rows)
    @rule(tokens=st.integers(1, 3))
    def decode(self, tokens):
        """To every layer of every sequence, as a model does."""
        self.step(tuple(self.rows), tokens, range(self.layers))

    def step(self, seqs, tokens, layers):
        for layer in layers:
            k, v = self.rng.standard_normal((2, len(seqs), HEADS, tokens, WIDTH)).astype(np.float32)
            step = Step(seqs, layer, k, v)
            before = snapshot(self.cache)
            if any(len(self.rows[seq][layer]) + tokens > self.settings["max_tokens"] for seq in seqs):
                with pytest.raises(ValueError, match="max_tokens"):
                    self.tell(self.cache, step)
                assert changed(before, snapshot(self.cache)) == []
                return
            needed, free = self.blocks_needed(step, tokens), self.cache.num_free_blocks
            try:
                self.tell(self.cache, step)
            except kvlib.CacheFull as error:
                event("CacheFull")
                assert (error.needed, error.free) == (needed, free)
                assert needed > free
                assert changed(before, snapshot(self.cache)) == []
                self.check_that_needed_blocks_would_do(step, needed - free)
                return
            assert needed <= free
            assert self.cache.num_free_blocks == free - needed
            for row, seq in enumerate(seqs):
                self.rows[seq][layer] += [(k[row, :, t], v[row, :, t]) for t in range(tokens)]
            self.story.append(lambda cache, step=step: self.tell(cache, step))

    def tell(self, cache, step):
        cache.append(
            self.setup.array(step.k), self.setup.array(step.v), layer=step.layer, seqs=list(step.seqs)
        )

    def blocks_needed(self, step, tokens) -> int:
        """Counted from the block tables: blocks past the end of each, and copies of shared blocks.

        A shared block that is written costs one copy per writer, less one if everybody who holds it writes.
        """
        holders = Counter(block for seq in self.rows for block in self.cache.block_table(seq))
        writers, grow = Counter(), 0
        for seq in step.seqs:
            table, start = self.cache.block_table(seq), len(self.rows[seq][step.layer])
            touched = range(start // self.size, math.ceil((start + tokens) / self.size))
            grow += sum(index >= len(table) for index in touched)
            writers.update(table[index] for index in touched if index < len(table))
        return grow + sum(min(count, holders[block] - 1) for block, count in writers.items())

    def check_that_needed_blocks_would_do(self, step, missing):
        """The same story in a pool that is larger by what was missing ends well; by one block less, it
        does not.
        """
        for extra, fits in ((missing, True), (missing - 1, False)):
            other = self.setup.cache(**self.settings, num_blocks=self.cache.num_blocks + extra)
            for act in self.story:
                act(other)
            try:
                self.tell(other, step)
            except kvlib.CacheFull:
                assert not fits
            else:
                assert fits

    @precondition(lambda self: self.rows)
    @rule(
        numbers=st.lists(PICK, min_size=1, max_size=4),
        tokens=st.integers(1, 18),
        layer=st.integers(0, 2),
        group=st.integers(1, 2),
    )
    def attend(self, numbers, tokens, layer, group):
        layer %= self.layers
        seqs = [seq for seq in dict.fromkeys(map(self.pick, numbers)) if self.rows[seq][layer]]
        if not seqs:
            return
        tokens = min(tokens, *(len(self.rows[seq][layer]) for seq in seqs))
        q = self.rng.standard_normal((len(seqs), HEADS * group, tokens, WIDTH)).astype(np.float32)
        before = snapshot(self.cache)
        out = self.setup.host(self.cache.attend(self.setup.array(q), layer=layer, seqs=seqs))
        assert changed(before, snapshot(self.cache)) == []
        for row, seq in enumerate(seqs):
            k, v = (np.stack(x, axis=1) for x in zip(*self.rows[seq][layer], strict=True))
            expected = reference.attention(q[row], k, v)
            # of the largest value: a sum of a few values may cancel to almost nothing
            assert np.abs(out[row] - expected).max() <= bounds.ARITHMETIC["float32"] * np.abs(v).max()

    # -- what must always hold ---------------------------------------------------------------------

    @invariant()
    def blocks_are_conserved(self):
        conserved(self.cache)
        for seq in self.rows:
            assert len(self.cache.block_table(seq)) == math.ceil(self.length(seq) / self.size)

    @invariant()
    def reads_equal_the_shadow(self):
        poison(self.cache)
        assert self.cache.lengths == {seq: self.length(seq) for seq in self.rows}
        for seq, layers in self.rows.items():
            for layer, rows in enumerate(layers):
                k, v, positions = self.cache.read(seq, layer)
                assert positions.tolist() == list(range(len(rows)))
                if rows:
                    for out, exact in zip((k, v), zip(*rows, strict=True), strict=True):
                        assert np.array_equal(self.setup.host(out), np.stack(exact, axis=1))


class TorchCacheMachine(CacheMachine):
    place = "torch"


TestNumpyCache = CacheMachine.TestCase
TestNumpyCache.settings = settings(stateful_step_count=40)
TestTorchCache = TorchCacheMachine.TestCase
TestTorchCache.settings = settings(stateful_step_count=20)
