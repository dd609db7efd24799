"""Train the bundled byte-level Llama of ``kvlib/data/tinylm`` on Python's own source and on recall.

Text alone gives a model that looks back a few dozen bytes, and a cache that drops or rounds old tokens would
cost it nothing. So bindings such as ``key_bq=x27z`` are scattered in the text and asked later, as in
``key_bq?x27z``. The order of lessons matters: shown everything at once, the model never learns to recall.
It first sees nothing but short, dense recall (and moves on only when that works), then text in windows of
256, 512 and 1024 bytes, with some dense recall kept to the end.

    python scripts/train_tinylm.py                   # under an hour on two CPU cores
    python scripts/train_tinylm.py --resume          # go on after an interruption
    python scripts/train_tinylm.py --evaluate-only   # measure the exported directory again
"""
from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tinylm_lessons import ANSWER, batch, recall_set, standard_library
from tinylm_model import CONFIG, TinyLM
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "kvlib/data/tinylm"


# ------------------------------ measuring
def bits(logits: Tensor, targets: Tensor) -> Tensor:
    nats = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return nats.view_as(targets) / math.log(2)


@torch.no_grad()
def bits_per_byte(model: TinyLM, text: bytes, window: int = 1024) -> float:
    """Mean over consecutive windows; a byte sees only the bytes before it in its window."""
    rows = torch.tensor(list(text[:len(text) // window * window])).view(-1, window).to(model.cos.device)
    return torch.cat([bits(model(r[:, :-1]), r[:, 1:]) for r in rows.split(8)]).mean().item()


@torch.no_grad()
def recall(model: TinyLM, rows: list[dict]) -> dict[str, dict[str, float]]:
    """By distance: the share of answers whose every byte is the most likely one, and the bits a byte costs.

    The answer's earlier bytes are given, yet "exact" means the same as in greedy decoding."""
    result: dict[str, dict[str, float]] = {}
    for distance in sorted({r["distance"] for r in rows}):
        hits, cost = [], []
        for r in (r for r in rows if r["distance"] == distance):
            n, text = len(r["answer"]), (r["prompt"] + r["answer"]).encode()
            ids = torch.tensor([list(text)], device=model.cos.device)
            logits, targets = model(ids[:, :-1])[:, -n:], ids[:, -n:]
            hits.append(float((logits.argmax(-1) == targets).all()))
            cost.append(bits(logits, targets).mean().item())
        result[str(distance)] = dict(exact=round(sum(hits) / len(hits), 4), questions=len(hits),
                                     bits_per_recalled_byte=round(sum(cost) / len(cost), 4))
    return result


def export(model: TinyLM, out: Path) -> None:
    """Write an ordinary Hugging Face Llama directory in fp16, each file whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    half = {name: x.detach().half().cpu().contiguous() for name, x in model.state_dict().items()}
    save_file(half, out / "model.safetensors.part", metadata={"format": "pt"})
    (out / "model.safetensors.part").chmod(0o644)
    (out / "config.json.part").write_text(json.dumps(CONFIG, indent=2) + "\n")
    for name in ("config.json", "model.safetensors"):
        os.replace(out / f"{name}.part", out / name)


def report(out: Path, device: torch.device, held: list[bytes], training: dict | None) -> None:
    """Measure the exported, rounded model, print what it can do, and write training.json beside it."""
    model = TinyLM(CONFIG).to(device).eval()
    model.load_state_dict(load_file(out / "model.safetensors"))
    text, questions = DATA / "heldout.txt", DATA / "recall.jsonl"
    if not questions.exists():
        questions.write_text("".join(json.dumps(r) + "\n" for r in recall_set(text.read_text("ascii"))))
    record = dict(
        parameters=sum(p.numel() for p in model.parameters()),
        bits_per_byte={"heldout.txt": round(bits_per_byte(model, text.read_bytes()), 4),
                       "standard library, held-out files": round(bits_per_byte(model, b"".join(held)), 4)},
        recall_by_distance=recall(model, [json.loads(line) for line in questions.read_text().splitlines()]),
        training=training)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    size = (out / "model.safetensors").stat().st_size
    print(f"{out}: a Llama of {record['parameters']:,} parameters over bytes, {size / 1e6:.1f} MB")
    for name, value in record["bits_per_byte"].items():
        print(f"  {value:6.3f} bits per byte: {name}")
    for distance, r in record["recall_by_distance"].items():
        print(f"  recall at {distance:>3} bytes: {r['exact']:6.1%} of {r['questions']} answers exact, "
              f"{r['bits_per_recalled_byte']:.3f} bits per recalled byte")


# ------------------------------ training
def train(args: argparse.Namespace, device: torch.device, files: list[bytes]) -> tuple[TinyLM, dict]:
    torch.manual_seed(args.seed)
    model, checkpoint = TinyLM(CONFIG).to(device), args.work / "checkpoint.pt"
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    optimisers = [torch.optim.Muon(matrices, lr=args.lr, momentum=0.95, weight_decay=0.02),
                  torch.optim.AdamW(others, lr=args.lr / 5, betas=(0.9, 0.98), weight_decay=0.0)]
    rates = [args.lr, args.lr / 5]
    state = dict(step=0, bytes=0, seconds=0.0, cpu_seconds=0.0, clicked_at=None, dense_steps=None,
                 recall_bits=8.0, text_bits=8.0)
    if args.resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimiser, s in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(s)
        state = saved["state"]

    def save() -> None:
        whole = dict(model=model.state_dict(), optimisers=[o.state_dict() for o in optimisers], state=state)
        torch.save(whole, checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)

    started, cpu_started = time.monotonic() - state["seconds"], time.process_time() - state["cpu_seconds"]
    bar = tqdm(initial=state["step"], total=args.steps, unit="step", mininterval=5)
    while True:
        state.update(seconds=time.monotonic() - started, cpu_seconds=time.process_time() - cpu_started)
        # by steps; should the minutes run out first they take over, so the rate always comes down to zero
        p = max(state["step"] / args.steps, state["seconds"] / (60 * args.minutes))
        if p >= 1:
            break
        if state["clicked_at"] is None and state["recall_bits"] < args.gate:
            state.update(clicked_at=p, dense_steps=state["step"])
            tqdm.write(f"step {state['step']}: dense recall works, on to text")
        if state["clicked_at"] is None and p > 0.5:
            raise SystemExit(
                f"error: half of the run is over and a recalled byte costs {state['recall_bits']:.2f} bits, "
                f"more than --gate {args.gate}; delete {checkpoint} and try another --seed or --lr")
        q = None if state["clicked_at"] is None else (p - state["clicked_at"]) / (1 - state["clicked_at"])
        scale = min(1.0, (state["step"] + 1) / 50, 1.0 if q is None else 2 - 2 * q)
        for optimiser, rate in zip(optimisers, rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * scale
        rng = random.Random(f"{args.seed}/{state['step']}")  # by the step: the same draws after --resume
        ids, weights = (x.to(device) for x in batch(rng, files, q, args.bytes))
        with torch.autocast(device.type, torch.bfloat16):
            cost, weights = bits(model(ids[:, :-1]), ids[:, 1:]), weights[:, 1:]
        ((cost * weights).sum() / weights.sum()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        for name, chosen in (("recall_bits", weights == ANSWER), ("text_bits", weights == 1.0)):
            if chosen.any():
                state[name] += 0.05 * (cost.detach()[chosen].mean().item() - state[name])
        state["step"] += 1
        state["bytes"] += ids.numel()
        bar.update()
        bar.set_postfix({k: f"{state[k]:.2f}" for k in ("recall_bits", "text_bits")}, done=f"{p:.0%}")
        if state["step"] % 50 == 0:
            save()
    save()
    bar.close()
    return model, state


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} CPUs"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=DATA, help="directory to export to (default kvlib/data/tinylm)")
    add("--work", type=Path, default=ROOT / ".scratch/train", help="directory for checkpoints")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--minutes", type=float, default=55, help="time budget of the training (default 55)")
    add("--steps", type=int, default=9000, help="longest run; --minutes may end it sooner")
    add("--bytes", type=int, default=4096, help="bytes in a batch, a multiple of 1024")
    add("--lr", type=float, default=0.02, help="Muon's learning rate; AdamW takes a fifth of it")
    add("--gate", type=float, default=0.4, help="bits per recalled byte that end the dense phase")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on from the checkpoint in --work")
    add("--evaluate-only", action="store_true", help="measure the model in --out again")
    args = parser.parse_args()
    checkpoint = args.work / "checkpoint.pt"
    problems = {
        f"torch {torch.__version__} sees no CUDA device; use --device cpu":
            args.device == "cuda" and not torch.cuda.is_available(),
        "--minutes, --steps, --lr and --gate must be above 0":
            min(args.minutes, args.steps, args.lr, args.gate) <= 0,
        f"--bytes must be a multiple of 1024, not {args.bytes}": args.bytes < 1024 or args.bytes % 1024 != 0,
        f"nothing to resume: {checkpoint} does not exist": args.resume and not checkpoint.exists(),
        f"{checkpoint} holds an unfinished run; go on with --resume, or delete it to start afresh":
            not (args.resume or args.evaluate_only) and checkpoint.exists(),
        f"no model to measure in {args.out}":
            args.evaluate_only and not (args.out / "model.safetensors").exists(),
        f"the evaluation text {DATA / 'heldout.txt'} does not exist": not (DATA / "heldout.txt").exists()}
    for message in (m for m, found in problems.items() if found):
        parser.error(message)
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    files, held = standard_library()
    if args.evaluate_only:
        before = args.out / "training.json"
        training = json.loads(before.read_text())["training"] if before.exists() else None
        return report(args.out, device, held, training)
    args.work.mkdir(parents=True, exist_ok=True)
    model, state = train(args, device, files)
    export(model, args.out)
    report(args.out, device, held, dict(
        date=datetime.date.today().isoformat(), device=machine(device), threads=torch.get_num_threads(),
        python=platform.python_version(), torch=torch.__version__, seed=args.seed, steps=state["step"],
        dense_steps=state["dense_steps"], bytes_seen=state["bytes"], bytes_of_source=sum(map(len, files)),
        minutes=round(state["seconds"] / 60, 1), cpu_minutes=round(state["cpu_seconds"] / 60, 1),
        settings={name: getattr(args, name) for name in ("minutes", "steps", "bytes", "lr", "gate")}))
    checkpoint.replace(checkpoint.with_name("finished.pt"))


if __name__ == "__main__":
    main()
