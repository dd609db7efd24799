"""What a GPU makes of the paged kernels: ``python benchmarks/gpu.py``, under eight minutes.

Decoding, prefill chunks and appends through `kvlib.kernels`, beside the device's own copy bandwidth, torch's SDPA and
FlexAttention on contiguous memory, and FlashInfer where it is installed. Every case is compared with float64 before it
is timed. Times are medians of CUDA events; the blocks that are read change from call to call, so that what one call
left in L2 is of no use to the next. Writes results/<device>.json.

    --only decode,codecs    some of: copy, decode, codecs, blocks, prefill, append
    --tiny                  sizes for Triton's interpreter, no CUDA needed: does everything run?
"""

import argparse
import functools
import itertools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_rivals import rivals
from recording import print_table, save

import kvlib
from kvlib.codecs import Plain
from kvlib.kernels import paged, quantize
from kvlib.storage import BlockStorage

WIDTH, KV_HEADS = 128, 8
GROUPS = {"GQA 8": 8, "MHA": 1}  # query heads to a KV head
CODECS = {
    "bf16": kvlib.Split(Plain("bfloat16"), Plain("bfloat16")),
    "int8": kvlib.Split(kvlib.Int(8), kvlib.Int(8)),
    "int4": kvlib.Split(kvlib.Int(4, group_size=32), kvlib.Int(4, group_size=32)),
    "KIVI-4": kvlib.KIVI(4),
    "KIVI-2": kvlib.KIVI(2),
}  # of KIVI what lies in blocks: the exact tail is no part of the kernel


class Sizes(NamedTuple):
    """What is measured. ``rounds``: timed calls a case, at most; ``past_l2``: bytes that rotate."""

    batches: tuple[int, ...] = (1, 16, 64)
    contexts: tuple[int, ...] = (2048, 8192, 32_768, 131_072)
    chunks: tuple[int, ...] = (128, 512, 2048, 8192)
    block_sizes: tuple[int, ...] = (16, 32, 64, 128)
    typical: tuple[int, int] = (16, 32_768)
    rounds: int = 50
    past_l2: int = 512 << 20
    copied: int = 4 << 30


TINY = Sizes((1,), (48, 64), (8,), (16, 32), (2, 50), rounds=2, past_l2=1 << 16, copied=1 << 20)


class Bench:
    """One device, its clock, and the rows of the tables so far."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.device, self.sizes = torch.device(device), sizes
        self.cuda = self.device.type == "cuda"
        self.room = torch.cuda.mem_get_info()[0] * 0.8 if self.cuda else 1e9
        self.copy_bandwidth = math.nan
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def seconds(self, runs: list[Callable[[], Any]]) -> float:
        """The median of single calls, which take turns among ``runs``: the same work on different memory."""
        turns = itertools.cycle(runs)
        for _ in range(3):
            next(turns)()
        once = self._timed(next(turns))
        rounds = max(2, min(self.sizes.rounds, int(1.0 / max(once, 1e-6))))  # about a second a case
        return statistics.median(self._timed(next(turns)) for _ in range(rounds))

    def _timed(self, run: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "12")
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def row(self, table: str, **values: Any) -> None:
        self.tables.setdefault(table, []).append(
            {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}
        )

    def measure_copy(self) -> None:
        """Bytes read and written per second by torch's copy of one large tensor into another."""
        source = torch.empty(self.sizes.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.copy_bandwidth = 2 * source.numel() / self.seconds([lambda: target.copy_(source)])
        self.row("copy", gigabytes=source.numel() / 1e9, gigabytes_per_second=self.copy_bandwidth / 1e9)


class Case:
    """A pool of blocks in random order, more than L2 holds, and tables that read other blocks from call to call."""

    def __init__(self, bench: Bench, codec: kvlib.Split, batch: int, context: int, block_size: int = 16) -> None:
        self.batch, self.context, self.device = batch, context, bench.device
        per_sequence = -(-context // block_size)
        planes = [plane for side in (codec.k, codec.v) for plane in side.planes(WIDTH).values()]
        row = sum(plane.columns * getattr(torch, plane.dtype).itemsize / plane.tokens for plane in planes)
        block = int(KV_HEADS * block_size * row)  # bytes
        self.read = block * per_sequence * batch
        self.turns = max(1, math.ceil(bench.sizes.past_l2 / self.read))
        blocks = per_sequence * batch * self.turns
        self.fits = block * blocks < bench.room
        if not self.fits:
            return
        spec = kvlib.CacheSpec(KV_HEADS, WIDTH, dtype="bfloat16")
        backend = kvlib.arrays.get_backend("torch", str(self.device))
        self.storage = BlockStorage(spec, blocks, block_size, codec, backend)
        fill(self.storage)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).to(torch.int32)
        self.tables = order.to(self.device).view(self.turns, batch, per_sequence)
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device=self.device)

    def queries(self, group: int, tokens: int = 1) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(1)
        shape = (self.batch, KV_HEADS, group * tokens, WIDTH)
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device, generator=generator) / WIDTH**0.5

    def runs(self, q: torch.Tensor, tokens: int = 1) -> list[Callable[[], Any]]:
        def attend(table: torch.Tensor) -> Callable[[], Any]:
            return lambda: paged.attend_blocks(
                q, self.storage, 0, table, self.lengths, self.lengths, tokens, self.context
            )

        return [attend(table) for table in self.tables]

    def error(self, q: torch.Tensor, tokens: int = 1) -> float:
        """The largest difference to float64 attention over the decoded rows of the first sequence."""
        table = self.tables[0][:1]
        one = self.lengths[:1]
        found = paged.attend_blocks(q[:1], self.storage, 0, table, one, one, tokens, self.context).normalise()[0]
        k, v = self.storage.read(0, table[0].cpu().numpy(), 0, self.context, "float64")
        rows = q[0].double()
        positions = self.context - tokens + torch.arange(rows.shape[1], device=self.device) % tokens
        scores = rows @ k.mT
        scores.masked_fill_(torch.arange(self.context, device=self.device) > positions[:, None], -math.inf)
        return float((torch.softmax(scores, -1) @ v - found).abs().max())


def fill(storage: BlockStorage) -> None:
    """Numbers of size one in every block, made where they lie."""
    generator = torch.Generator(storage.backend.device).manual_seed(2)
    for codec, planes in ((storage.codec.k, storage.k), (storage.codec.v, storage.v)):
        if isinstance(codec, Plain):
            planes["payload"].normal_(generator=generator)
        else:  # every code, evenly between -2 and 2
            planes["payload"].random_(generator=generator)
            planes["scale"].fill_(4 / (2**codec.bits - 1))
            planes["offset"].fill_(-2)


TOLERANCE = 0.02  # bfloat16 rounds weights and values to 2^-9, and outputs have the size of one


def cases(bench: Bench, codec: str, shapes: Iterator, **options: Any) -> Iterator[Case]:
    for batch, context in shapes:
        case = Case(bench, CODECS[codec], batch, context, **options)
        if case.fits:
            yield case


def checked(error: float) -> float:
    if not error < TOLERANCE:
        raise SystemExit(f"off by {error:.3g} from float64, more than {TOLERANCE}: nothing is timed that is wrong")
    return error


def measure_decode(bench: Bench) -> None:
    sizes = bench.sizes
    for case in cases(bench, "bf16", itertools.product(sizes.batches, sizes.contexts)):
        for name, group in GROUPS.items():
            q = case.queries(group)
            error, took = checked(case.error(q)), bench.seconds(case.runs(q))
            others = rivals(case.storage, q, case.tables, case.context, bench) if bench.room > 3 * case.read else {}
            rate = case.read / took
            bench.row("decode", heads=name, batch=case.batch, context=case.context, microseconds=1e6 * took,
                      gigabytes_per_second=rate / 1e9, of_copy=rate / bench.copy_bandwidth, error=error,
                      **{f"{other}_microseconds": 1e6 * t for other, t in others.items()})  # fmt: skip


def measure_codecs(bench: Bench) -> None:
    plain: dict[tuple, float] = {}
    contexts = bench.sizes.contexts[1:]
    for codec in CODECS:
        for case in cases(bench, codec, itertools.product(bench.sizes.batches[-2:], contexts), block_size=32):
            q = case.queries(8)
            error, took = checked(case.error(q)), bench.seconds(case.runs(q))
            shape = case.batch, case.context
            plain.setdefault(shape, took)
            of_copy = case.read / took / bench.copy_bandwidth
            bench.row("codecs", codec=codec, batch=case.batch, context=case.context, microseconds=1e6 * took,
                      times_as_fast=plain[shape] / took, of_copy=of_copy, error=error)  # fmt: skip


def measure_blocks(bench: Bench) -> None:
    for block_size in bench.sizes.block_sizes:
        for case in cases(bench, "bf16", [bench.sizes.typical], block_size=block_size):
            q = case.queries(8)
            error, took = checked(case.error(q)), bench.seconds(case.runs(q))
            bench.row("blocks", block_size=block_size, microseconds=1e6 * took,
                      of_copy=case.read / took / bench.copy_bandwidth, error=error)  # fmt: skip


def measure_prefill(bench: Bench) -> None:
    """One chunk, the last of a prompt: what a chunk size costs where the context is long already."""
    for case in cases(bench, "bf16", [(1, max(bench.sizes.chunks))]):
        for chunk in bench.sizes.chunks:
            q = case.queries(8, chunk)
            error, took = checked(case.error(q, chunk)), bench.seconds(case.runs(q, chunk))
            pairs = chunk * case.context - chunk * (chunk - 1) // 2
            flop = 4 * WIDTH * 8 * KV_HEADS * pairs
            bench.row("prefill", context=case.context, chunk=chunk, microseconds=1e6 * took,
                      teraflop_per_second=flop / took / 1e12, error=error)  # fmt: skip


def measure_append(bench: Bench) -> None:
    """One token of each sequence into int8 blocks: in one kernel, and by encoding first and writing then."""
    codec = CODECS["int8"]
    for batch in bench.sizes.batches:
        case = Case(bench, codec, batch, bench.sizes.contexts[0])
        x = torch.randn(batch, KV_HEADS, 1, WIDTH, dtype=torch.bfloat16, device=bench.device)
        slots = (case.tables[0][:, :1] * case.storage.block_size).long()
        arguments = x, codec.k, case.storage.k, 0, slots
        kernel = bench.seconds([functools.partial(quantize.append_tokens, *arguments)])
        plain = bench.seconds([functools.partial(quantize.reference, *arguments)])
        bench.row("append", batch=batch, microseconds=1e6 * kernel, torch_microseconds=1e6 * plain)


PARTS = {"decode": measure_decode, "codecs": measure_codecs, "blocks": measure_blocks, "prefill": measure_prefill,
         "append": measure_append}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="small sizes, in Triton's interpreter, without CUDA")
    parser.add_argument("--to", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device. `--tiny` tries everything without one, and measures nothing.")
    bench = Bench("cpu" if options.tiny else "cuda", TINY if options.tiny else Sizes())
    bench.measure_copy()
    for part in options.only.split(","):
        PARTS[part](bench)
    for name, rows in bench.tables.items():
        print(f"\n{name}")
        columns = list(dict.fromkeys(column for row in rows for column in row))
        print_table(columns, [[row.get(column) for column in columns] for row in rows])
    if options.tiny and options.to is None:
        return print("\nThese are not measurements: they are not written.")
    device = "tiny" if options.tiny else torch.cuda.get_device_name()
    name = re.sub(r"\W+", "-", device.lower()).strip("-") + ".json"
    record = {"device": device, "cuda": torch.version.cuda, "tables": bench.tables}
    path = save(options.to.resolve() if options.to else name, record, ("torch", "triton"))
    print(f"\nwrote {path.name}")


if __name__ == "__main__":
    main()
