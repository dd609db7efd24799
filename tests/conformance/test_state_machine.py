"""Any sequence of operations on any composition, against a shadow that keeps every token.

Small pools, so that `CacheFull` happens; layers that run ahead of each other; sequences that share blocks; policies
that move tokens about in them. After every step each slot that nobody can see is filled with NaN: no stale read can
pass for an answer.
"""

import math
from collections import Counter

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvlib
from tests.conformance.compositions import BLOCKS, CODECS, POLICIES, Composition
from tests.conformance.graph import changed, snapshot
from tests.conformance.story import Story

PICK = st.integers(0, 11)
SEQUENCES = 5  # open at once, at most


class CacheMachine(RuleBasedStateMachine):
    """`Story` does what the rules say, and its shadows check what comes out."""

    policy, backend = "all", "numpy"

    @initialize(
        block=st.sampled_from([*BLOCKS, "three groups"]),
        codec=st.sampled_from(list(CODECS)),
        layers=st.integers(1, 3),
        batch=st.integers(0, 3),
        tokens=st.integers(8, 160),
        max_tokens=st.integers(18, 40),
    )
    def build(self, block, codec, layers, batch, tokens, max_tokens):
        """A pool for ``tokens`` tokens, or a few more."""
        self.composition = Composition("16" if block == "three groups" else block, codec, self.policy, self.backend)
        spec = kvlib.CacheSpec(2, 32, layers, "float32")
        self.settings = {"spec": spec, "max_tokens": max_tokens, "batch": batch}
        if block == "three groups":
            self.settings["block_size"] = 3 * self.composition.cache(**self.settings).codec.group
        size = self.composition.cache(**self.settings).block_size
        self.story = Story(self.composition, **self.settings, num_blocks=math.ceil(tokens / size))
        self.opened = batch

    @property
    def cache(self) -> kvlib.KVCache:
        return self.story.cache

    @property
    def shadows(self) -> dict:
        return self.story.shadows

    @property
    def layers(self) -> int:
        return self.settings["spec"].num_layers

    def pick(self, number: int) -> int:
        return list(self.shadows)[number % len(self.shadows)]

    # -- operations --------------------------------------------------------------------------------

    @precondition(lambda self: len(self.shadows) < SEQUENCES)
    @rule()
    def open(self):
        assert self.story.open() == self.opened
        self.opened += 1

    @precondition(lambda self: 0 < len(self.shadows) < SEQUENCES)
    @rule(number=PICK)
    def fork(self, number):
        assert self.story.fork(self.pick(number)) == self.opened
        self.opened += 1

    @precondition(lambda self: self.shadows)
    @rule(number=PICK)
    def close(self, number):
        self.story.close(self.pick(number))

    @precondition(lambda self: self.shadows)
    @rule(number=PICK, back=st.integers(0, 40))
    def truncate(self, number, back):
        """A few tokens back, as a rollback does, or many."""
        seq = self.pick(number)
        self.story.truncate(seq, max(0, self.shadows[seq].length - back))

    @rule(really=st.integers(0, 9))
    def reset(self, really):
        if really == 0:  # rarely: it throws away what made the state interesting
            self.cache.reset()
            self.story.restart()
            self.opened = self.settings["batch"]

    @precondition(lambda self: self.shadows)
    @rule(numbers=st.lists(PICK, min_size=1, max_size=4), tokens=st.integers(1, 21), layer=st.integers(0, 2))
    def append(self, numbers, tokens, layer):
        """To one layer of some sequences, wherever that layer stands."""
        self.step(list(dict.fromkeys(map(self.pick, numbers))), tokens, [layer % self.layers])

    @precondition(lambda self: self.shadows)
    @rule(tokens=st.sampled_from([1, 1, 1, 3]), steps=st.integers(1, 4), attend=st.booleans())
    def decode(self, tokens, steps, attend):
        """To every layer of every sequence, as a model does."""
        for _ in range(steps):
            self.step(list(self.shadows), tokens, range(self.layers), attend)

    def step(self, seqs, tokens, layers, attend=False):
        for layer in layers:
            k, v = self.story.tokens(len(seqs), tokens)
            before, free = snapshot(self.cache), self.cache.num_free_blocks
            slots = max(self.shadows[seq].slots_after(layer, tokens) for seq in seqs)
            needed = None if self.cache.eviction else self.blocks_needed(seqs, layer, tokens)
            try:
                self.story.append_to(layer, seqs, k, v)
            except kvlib.CacheFull as error:
                event("CacheFull")
                assert changed(before, snapshot(self.cache)) == []
                assert error.free == free < error.needed
                assert needed in (None, error.needed)
                self.check_that_needed_blocks_would_do((k, v, layer, seqs), error.needed - free)
                return
            except ValueError as error:
                event("max_tokens")
                assert "max_tokens" in str(error)
                assert changed(before, snapshot(self.cache)) == []
                assert slots > self.cache.max_tokens
                return
            assert slots <= self.cache.max_tokens
            assert needed in (None, free - self.cache.num_free_blocks)
            if attend:
                self.story.attend(tokens, seqs, layer)

    def blocks_needed(self, seqs, layer, tokens) -> int:
        """Counted from the block tables: blocks past the end of each, and copies of shared blocks.

        A shared block that is written costs one copy per writer, less one if everybody who holds it writes. What waits
        in a tail has its slots already, so that closing a group never fails.
        """
        holders = Counter(block for seq in self.shadows for block in self.cache.block_table(seq))
        writers, grow, size = Counter(), 0, self.cache.block_size
        for seq in seqs:
            table, start = self.cache.block_table(seq), self.shadows[seq].layers[layer]
            touched = range(start.closed // size, math.ceil((start.seen + tokens) / size))
            grow += sum(index >= len(table) for index in touched)
            writers.update(table[index] for index in touched if index < len(table))
        return grow + sum(min(count, holders[block] - 1) for block, count in writers.items())

    def check_that_needed_blocks_would_do(self, step, missing):
        """The same story in a pool that is larger by what was missing ends well; by one block less, it
        does not.
        """
        for extra, fits in ((missing, True), (missing - 1, False)):
            other = self.composition.cache(**self.settings, num_blocks=self.cache.num_blocks + extra)
            for act in self.story.acts:
                act(other)
            try:
                self.story.tell(other, *step)
            except kvlib.CacheFull:
                assert not fits
            else:
                assert fits

    @precondition(lambda self: self.shadows)
    @rule(numbers=st.lists(PICK, min_size=1, max_size=4), tokens=st.integers(1, 18), layer=st.integers(0, 2))
    def attend(self, numbers, tokens, layer):
        layer %= self.layers
        held = {seq: max(map(len, shadow.stored(layer))) for seq, shadow in self.shadows.items()}
        seqs = [seq for seq in dict.fromkeys(map(self.pick, numbers)) if held[seq]]
        if not seqs:
            return
        before = snapshot(self.cache)
        self.story.attend(min(tokens, *(held[seq] for seq in seqs)), seqs, layer)
        if not (self.cache.eviction and self.cache.eviction.observe != 0):
            assert changed(before, snapshot(self.cache)) == []

    # -- what must always hold ---------------------------------------------------------------------

    @invariant()
    def everything_is_as_the_shadow_says(self):
        if hasattr(self, "story"):
            self.story.check()


def machine(policy: str, backend: str, steps: int) -> type:
    """The machine for one policy: hypothesis would rather draw some of them than others."""
    name = f"{policy} {backend}".title().replace(" ", "").replace(",", "")
    case = type(f"{name}Machine", (CacheMachine,), {"policy": policy, "backend": backend}).TestCase
    case.settings = settings(stateful_step_count=steps, max_examples=math.ceil(settings.default.max_examples / 5))
    return case


TestAllNumpy, TestAllTorch = machine("all", "numpy", 30), machine("all", "torch", 15)
TestWindowNumpy, TestWindowTorch = machine("window", "numpy", 30), machine("window", "torch", 15)
TestSinksNumpy, TestSinksTorch = machine("window, sinks", "numpy", 30), machine("window, sinks", "torch", 15)
TestH2ONumpy, TestH2OTorch = machine("h2o", "numpy", 30), machine("h2o", "torch", 15)
TestSnapKVNumpy, TestSnapKVTorch = machine("snapkv", "numpy", 30), machine("snapkv", "torch", 15)
TestLastQueryNumpy, TestLastQueryTorch = machine("last query", "numpy", 30), machine("last query", "torch", 15)
TestEveryThirdNumpy, TestEveryThirdTorch = machine("every third", "numpy", 30), machine("every third", "torch", 15)


def test_every_policy_has_its_machines():
    cases = [case for name, case in globals().items() if name.startswith("Test")]
    assert len(cases) == len(POLICIES) * 2
