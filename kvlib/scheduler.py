"""Scheduler: who runs in a step, with how many tokens, and who has to leave when blocks run out.

There is no prefill phase and no decode phase. Every request has tokens that its cache lacks, and a step hands out a
budget of tokens: one to each request that decodes, in order of arrival, and what is left to those with more than one to
go, as chunks of their prompts. First come, first served: a place is given to the oldest that waits and taken from the
youngest that runs. So the oldest request always moves on, and everybody's turn comes.

The scheduler sees block tables and never a key or a value: it runs on a `KVCache`, and on the
`kvlib.simulation.BareCache` that has nothing but tables.

Sources: iteration-level scheduling, Orca, Yu et al. 2022 (OSDI); paging and preemption, Kwon et al. 2023
(arXiv:2309.06180); chunks beside decodes, Sarathi-Serve, Agrawal et al. 2024 (arXiv:2403.02310).
"""

from collections import deque
from dataclasses import dataclass, field

from kvlib.cache import KVCache
from kvlib.checks import checked_size
from kvlib.index import PrefixIndex
from kvlib.serving import Request
from kvlib.swap import put_back, take_out


@dataclass(frozen=True, slots=True)
class Batching:
    """The rules of the house.

    Attributes:
        token_budget: the most tokens that a step computes. Large: prompts go in whole, and whoever decodes beside one
            waits for it. Small: prompts go in by chunks.
        max_running: the most requests with a place in the cache.
        preempt: what becomes of a request that must leave. "recompute": its blocks are forgotten, its output joins its
            prompt. "swap": its blocks go to host memory and come back.
        reserve: admit only who can stay, with blocks set aside for the longest output. Nobody is preempted, and blocks
            stand empty. Otherwise a request is admitted when there is room for the tokens that it has.
        static: static batching. A batch is admitted, with ``reserve``, and runs until all of it have finished; nobody
            joins it.

    Raises ValueError: a number is not a positive integer, or ``preempt`` is neither.
    """

    token_budget: int = 256
    max_running: int = 64
    preempt: str = "recompute"
    reserve: bool = False
    static: bool = False

    def __post_init__(self) -> None:
        checked_size("token_budget", self.token_budget)
        checked_size("max_running", self.max_running)
        if self.preempt not in ("recompute", "swap"):
            raise ValueError(f"preempt must be 'recompute' or 'swap', got {self.preempt!r}")


@dataclass(slots=True)
class Turn:
    """What the scheduler decided for one step. ``work``: how many tokens each request computes."""

    budget: int  # tokens that nobody has been given
    work: dict[Request, int] = field(default_factory=dict)
    blocks: dict[Request, int] = field(default_factory=dict)  # how many each of them will take from the pool,
    taken: int = 0  # and all of them together
    admitted: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    swapped_out: list[Request] = field(default_factory=list)
    swapped_in: list[Request] = field(default_factory=list)
    moved: int = 0  # tokens that were swapped

    def give(self, request: Request, tokens: int, blocks: int) -> None:
        self.work[request], self.blocks[request] = tokens, blocks
        self.budget -= tokens
        self.taken += blocks

    def take_back(self, request: Request) -> None:
        self.budget += self.work.pop(request, 0)
        self.taken -= self.blocks.pop(request, 0)


class Scheduler:
    """Who waits, who runs, and in which blocks.

    Args:
        cache: a `KVCache` without eviction, or a `BareCache`; all its blocks are for the scheduler to give.
        rules: `Batching`.
        index: a `PrefixIndex` on ``cache.pool``: what requests have computed is published in it, and looked up. None:
            nothing is shared.
    """

    def __init__(self, cache: KVCache, rules: Batching, index: PrefixIndex | None = None) -> None:
        self.cache, self.rules, self.index = cache, rules, index
        self.waiting: deque[Request] = deque()  # the oldest first; all are younger than all that run
        self.running: list[Request] = []  # the oldest first

    def check(self, longest: int) -> None:
        """Raise ValueError if a request that becomes ``longest`` tokens long could never finish."""
        cache = self.cache
        if longest > cache.max_tokens:
            raise ValueError(
                f"prompt and output need {longest} tokens in the cache, and a sequence may hold "
                f"max_tokens={cache.max_tokens}; ask for fewer new tokens, or build the cache with a larger one"
            )
        if self._blocks(longest) > cache.num_blocks:
            raise ValueError(
                f"prompt and output need {self._blocks(longest)} blocks of {cache.block_size} tokens, and the whole "
                f"pool has {cache.num_blocks}; ask for fewer new tokens, or build the cache with a larger num_blocks"
            )

    def schedule(self) -> Turn:
        """Decide on the next step: preempt, admit, hand out the budget. Only sequences are opened, closed and moved."""
        turn = Turn(self.rules.token_budget)
        full = self.rules.static and bool(self.running)
        for request in sorted(self.running, key=lambda request: not request.decoding):  # stable: by age in each
            if not turn.budget:
                break
            if request.seq is not None and not self._continue(request, turn):
                break
        while self.waiting and not full and len(self.running) < self.rules.max_running:
            if not (turn.budget or self.rules.static) or not self._admit(turn):
                break
        return turn

    def publish(self, request: Request) -> None:
        """Let later requests find the blocks of ``request`` that are complete and computed."""
        if self.index is None:
            return
        computed = self.cache.computed(request.seq)
        if computed // self.cache.block_size > request.published:
            table = self.cache.block_table(request.seq)
            found = self.index.insert(request.tokens[: request.computed], table, computed)
            request.published = len(found.blocks)
            if found.duplicates:
                self.cache.adopt(request.seq, found.blocks)

    def leave(self, request: Request) -> None:
        """``request`` gives up its place and its blocks, wherever it stands."""
        if request.seq is not None:
            self.cache.close(request.seq)
        (self.waiting if request.seq is None else self.running).remove(request)
        request.seq = request.swapped = None

    # -- those that run ----------------------------------------------------------------------------------------------

    def _continue(self, request: Request, turn: Turn) -> bool:
        """Give a running request what the budget and the blocks allow; the youngest leave until that is something.

        False if blocks cut it short: then whoever is younger waits behind it.
        """
        want, held = min(request.left, turn.budget), self._held(request)
        need = self._blocks(request.computed + want) - held
        while True:
            free = self._free(turn.taken + need) - turn.taken
            fits = min(want, (held + free) * self.cache.block_size - request.computed)
            if fits > 0:
                turn.give(request, fits, self._blocks(request.computed + fits) - held)
                return fits == want
            youngest = self.running[-1]
            self._preempt(youngest, turn)
            if youngest is request:
                return False

    def _preempt(self, request: Request, turn: Turn) -> None:
        """Take its place from the youngest that runs; it is the oldest that waits now."""
        turn.take_back(request)
        if self.rules.preempt == "swap" and request.computed:
            request.swapped = take_out(self.cache, request.seq)
            turn.swapped_out.append(request)
            turn.moved += request.computed
        else:
            self.cache.close(request.seq)
            request.computed = request.published = 0
        self.running.remove(request)
        request.seq = None
        request.preemptions += 1
        self.waiting.appendleft(request)
        turn.preempted.append(request)

    # -- those that wait ---------------------------------------------------------------------------------------------

    def _admit(self, turn: Turn) -> bool:
        """Give the oldest that waits a place, if there are blocks for it beside those promised to all that run."""
        request = self.waiting[0]
        shared = self._shared(request)
        seq = self.cache.open(shared)  # from now on nobody can take them away
        promised = sum(max(0, self._goal(other) - self._held(other)) for other in self.running)
        need = self._goal(request) - len(shared) + promised
        if need > self._free(need):
            self.cache.close(seq)
            return False
        request.found = len(shared) * self.cache.block_size
        if request.swapped:
            self.cache.close(seq)
            seq, request.swapped = put_back(self.cache, request.swapped), None
            turn.swapped_in.append(request)
            turn.moved += request.computed
        else:
            request.computed, request.published = request.found, len(shared)
            request.reused += request.found
        request.seq = seq
        self.running.append(self.waiting.popleft())
        turn.admitted.append(request)
        if count := min(request.left, turn.budget):
            turn.give(request, count, self._blocks(request.computed + count) - self._held(request))
        return True

    def _shared(self, request: Request) -> list[int]:
        """Published blocks that ``request`` can begin with. A codec's exact tail is in none of them."""
        if self.index is None or request.swapped:
            return []
        found = self.index.match(request.tokens)
        return found[: max(0, len(request.tokens) - self.cache.codec.residual) // self.cache.block_size]

    # -- blocks ------------------------------------------------------------------------------------------------------

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.cache.block_size)  # rounded up

    def _held(self, request: Request) -> int:
        """Blocks of a running request: no more than its tokens need, whether they lie in them or in a tail."""
        return self._blocks(request.computed)

    def _goal(self, request: Request) -> int:
        """Blocks that are set aside for a request that is admitted."""
        whole = self.rules.reserve or self.rules.static
        return self._blocks(request.longest if whole else len(request.tokens))

    def _free(self, enough: int) -> int:
        """Blocks that are free, or can be taken from the index; it is asked only if there are not ``enough``."""
        free = self.cache.pool.num_free
        return free + self.index.evictable if self.index and free < enough else free
