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
import sysconfig
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "kvlib/data/tinylm"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALPHABET = LETTERS + "0123456789"
ANSWER, COPY = 4.0, 3.0  # weights in the loss of a byte of an answer and of a copy; a byte of text has 1
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="float16", vocab_size=256,
    hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=1024, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=True, attention_bias=False, mlp_bias=False, bos_token_id=None, eos_token_id=None,
    pad_token_id=None)


# ------------------------------ the model, with the names of Hugging Face
def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, x[i] paired with x[i + head_dim / 2] as in Hugging Face's Llama."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.group, self.head_dim = heads // kv_heads, head_dim
        self.q_proj = linear(d, heads * head_dim)
        self.k_proj, self.v_proj = linear(d, kv_heads * head_dim), linear(d, kv_heads * head_dim)
        self.o_proj = linear(heads * head_dim, d)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                   for f in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (y.repeat_interleave(self.group, 1) for y in (rotate(k, cos, sin), v))
        o = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(d, hidden), linear(d, hidden), linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        d, eps = c["hidden_size"], c["rms_norm_eps"]
        self.self_attn = Attention(d, c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"])
        self.mlp = MLP(d, c["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(d, eps), nn.RMSNorm(d, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLM(nn.Module):
    """A Llama decoder over bytes: ids (batch, time) to logits (batch, time, 256); embeddings tied."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        d, half = c["hidden_size"], c["head_dim"] // 2
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(c["vocab_size"], d),
            layers=nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
            norm=nn.RMSNorm(d, c["rms_norm_eps"])))
        for name, p in self.named_parameters():
            if p.ndim == 2:  # what is added to the residual starts at zero: a layer begins as the identity
                nn.init.normal_(p, std=0.0 if "o_proj" in name or "down_proj" in name else 0.5 / d**0.5)
        frequencies = c["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(c["max_position_embeddings"]), frequencies)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, t = self.model["embed_tokens"](ids), ids.shape[1]
        for layer in self.model["layers"]:
            x = layer(x, self.cos[:t], self.sin[:t])
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)


# ------------------------------ the lessons: bytes, and each byte's weight in the loss
Lesson = tuple[bytes, list[float]]


def standard_library() -> tuple[list[bytes], list[bytes]]:
    """The source as (training files, held-out files); one in 32 is held out, by a hash of its name."""
    base, files = Path(sysconfig.get_paths()["stdlib"]), ([], [])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    for path in sorted(base.rglob("*.py")):
        name = path.relative_to(base)
        if skip & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue  # tests, tables, and the record of how this Python was built
        if path.stat().st_size > 400:
            files[zlib.crc32(name.as_posix().encode()) % 32 == 0].append(path.read_bytes())
    if sum(map(len, files[0])) < 2_000_000:
        raise SystemExit(f"error: expected megabytes of standard-library source under {base}, found "
                         f"{sum(map(len, files[0]))} bytes; use a Python installed with its .py files")
    return files


def draw(rng: random.Random, n: int, short: bool = False) -> dict[str, str]:
    """Fresh keys, of one letter or two, each with a value of four characters."""
    keys: dict[str, str] = {}
    while len(keys) < n:
        keys["".join(rng.choices(LETTERS, k=1 if short else 2))] = "".join(rng.choices(ALPHABET, k=4))
    return keys


def recall_line(key: str, value: str, ask: bool, short: bool = False) -> Lesson:
    """A binding or a question. What cannot be foreseen hardly counts: its noise would drown the lesson.

    The key stands right before the value, one byte between them: with ``key_417 = "`` this model learnt to
    copy a value to its end, but never to pick the right one."""
    head = "@" if short else "key_"
    weights = [0.5] * len(head) + [0.05] * len(key) + [0.5] + [ANSWER if ask else 0.02] * len(value) + [0.5]
    return f"{head}{key}{'?' if ask else '='}{value}\n".encode(), weights


def copies(rng: random.Random, length: int) -> Lesson:
    """Random strings, each several times over: half of the dense phase, the plainest lesson in looking back.

    With fewer of them the model settles for "some value that was bound above" and stays there."""
    out, weights = b"", []
    while len(out) < length:
        string, times = "".join(rng.choices(ALPHABET, k=rng.randint(6, 32))).encode(), rng.randint(2, 4)
        out += (string + b"\n") * times
        weights += [0.02] * len(string) + [0.5] + ([COPY] * len(string) + [0.5]) * (times - 1)
    return out[:length], weights[:length]


def dense(rng: random.Random, length: int, short: bool) -> Lesson:
    """Nothing but recall: a few keys bound, then asked again and again."""
    out, weights = b"", []
    while len(out) < length:
        values = draw(rng, rng.randint(2, 6), short)
        asked = [key for key in values for _ in range(rng.randint(1, 3))]
        rng.shuffle(asked)
        for key, ask in [(k, False) for k in values] + [(k, True) for k in asked]:
            line, w = recall_line(key, values[key], ask, short)
            out, weights = out + line, weights + w
    return out[:length], weights[:length]


def scattered(rng: random.Random, text: bytes, length: int, per_line: int) -> Lesson:
    """Text with bindings in it, each asked at any distance; about one recall line to ``per_line`` bytes."""
    events = []
    for key, value in draw(rng, max(3, length // per_line // 3)).items():
        at = rng.random() ** 1.5
        events.append((at, *recall_line(key, value, False)))
        events += [(rng.uniform(at, 1.0), *recall_line(key, value, True)) for _ in range(rng.randint(1, 3))]
    n = length - sum(len(line) for _, line, _ in events)
    start = rng.randrange(len(text) - n)
    body, out, weights, done = text[start:start + n], b"", [], 0
    for at, line, w in sorted(events, key=lambda event: event[0]):
        cut = max(done, body.find(b"\n", int(at * n)) + 1 or n)  # the next start of a line, or the end
        out, weights, done = out + body[done:cut], weights + [1.0] * (cut - done), cut
        if out and not out.endswith(b"\n"):
            line, w = b"\n" + line, [0.5, *w]
        out, weights = out + line, weights + w
    return (out + body[done:])[:length], (weights + [1.0] * (n - done))[:length]


def batch(rng: random.Random, files: list[bytes], q: float | None, nbytes: int) -> tuple[Tensor, Tensor]:
    """Ids and weights, each (rows, window + 1). ``q`` is None in the dense phase, then runs from 0 to 1."""
    window = 128 if q is None else 256 if q < 0.2 else 512 if q < 0.5 else 1024
    sizes = [max(0, len(f) - window - 1) for f in files]
    rows = []
    for _ in range(nbytes // window):
        kind = rng.random()
        if kind < (1.0 if q is None else 0.25 - 0.15 * q):  # some dense recall stays to the end
            copy, short = (0.5, 0.75) if q is None else (0.03, 0.06)
            rows.append(copies(rng, window + 1) if kind < copy else dense(rng, window + 1, kind < short))
            continue
        text = rng.choices(files, sizes)[0]
        if kind < 0.8:
            rows.append(scattered(rng, text, window + 1, per_line=40 if q < 0.6 else 64))
        else:
            start = rng.randrange(len(text) - window)
            rows.append((text[start:start + window + 1], [1.0] * (window + 1)))
    return torch.tensor([list(r) for r, _ in rows]), torch.tensor([w for _, w in rows])


def recall_set(text: str, questions: int = 40) -> list[dict]:
    """The frozen questions: text, the binding among three others, text, the question. ``distance`` is in
    bytes, from the first byte of the bound value to that of the answer; no prompt reaches 1000 bytes."""
    rng, rows = random.Random(20), []
    for distance in (d for d in (64, 128, 256, 512, 900) for _ in range(questions)):
        (key, value), *others = draw(rng, 4).items()
        ask, extra = f"key_{key}?", [f"key_{k}={v}\n" for k, v in others]
        between = 1 if distance < 100 else 2  # so many of the others follow the binding, the rest precede it
        room = distance - len(value + "\n" + ask) - sum(map(len, extra[:between]))
        start = text.index("\n", rng.randrange(len(text) - 1200)) + 1
        before = text[text.index("\n", max(0, start - 60)) + 1:start]
        after = text[start:start + room - 1] + "\n"
        cut = after.index("\n", rng.randrange(len(after))) + 1
        prompt = (before + "".join(extra[between:]) + f"key_{key}={value}\n"
                  + after[:cut] + "".join(extra[:between]) + after[cut:] + ask)
        assert len(prompt) - prompt.index(f"={value}\n") - 1 == distance
        rows.append({"prompt": prompt, "answer": value, "distance": distance})
    return rows


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
