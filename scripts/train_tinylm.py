"""Train the bundled byte-level Llama of ``kvlib/data/tinylm`` on the standard library's source and on recall lines.

Text alone gives a model that cares only about the last few dozen bytes, and a cache that drops or rounds old tokens
would cost it nothing. So lines such as ``key_417 = "xq7z"`` are scattered in the text and asked later:
``key_417 -> "xq7z"``. The order of lessons matters. A model shown everything at once never learns to recall;
here it first sees nothing but short, dense recall (gated: it moves on only when recall works), then text in windows
of 256, 512 and 1024 bytes, with some dense recall kept to the end.

    python scripts/train_tinylm.py                     # under an hour on two CPU cores, minutes on a GPU
    python scripts/train_tinylm.py --resume            # go on after an interruption
    python scripts/train_tinylm.py --evaluate-only     # measure an exported directory again
"""
from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import sys
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
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
DISTANCES = (64, 128, 256, 512, 900)
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=256, hidden_size=256, intermediate_size=640,
    num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=32, max_position_embeddings=1024,
    hidden_act="silu", rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=True, attention_bias=False,
    mlp_bias=False, bos_token_id=None, eos_token_id=None, pad_token_id=None, torch_dtype="float16")


# ------------------------------------------------------------------ the model, with Hugging Face's names
class Attention(nn.Module):
    def __init__(self, d: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(d, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(d, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(d, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, self.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, t, self.kv_heads, self.head_dim).transpose(1, 2)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(o.transpose(1, 2).reshape(b, t, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on halves (x[i] pairs with x[i + head_dim / 2]), as in Hugging Face's Llama."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: dict) -> None:
        super().__init__()
        d, eps = c["hidden_size"], c["rms_norm_eps"]
        self.self_attn = Attention(d, c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"])
        self.mlp = MLP(d, c["intermediate_size"])
        self.input_layernorm = nn.RMSNorm(d, eps)
        self.post_attention_layernorm = nn.RMSNorm(d, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLM(nn.Module):
    """A Llama decoder over bytes: ids (batch, time) in 0..255 to logits (batch, time, 256); embeddings tied."""

    def __init__(self, c: dict) -> None:
        super().__init__()
        d, half = c["hidden_size"], c["head_dim"] // 2
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(c["vocab_size"], d),
            layers=nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"])),
            norm=nn.RMSNorm(d, c["rms_norm_eps"])))
        for name, p in self.named_parameters():
            if p.ndim == 2:  # residual outputs start at zero, so that every layer starts as the identity
                nn.init.zeros_(p) if "o_proj" in name or "down_proj" in name else nn.init.normal_(p, std=0.5 / d**0.5)
        angle = torch.outer(torch.arange(c["max_position_embeddings"]),
                            c["rope_theta"] ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x, t = self.model["embed_tokens"](ids), ids.shape[1]
        for layer in self.model["layers"]:
            x = layer(x, self.cos[:t], self.sin[:t])
        return F.linear(self.model["norm"](x), self.model["embed_tokens"].weight)


# ------------------------------------------------------------------ the data
def standard_library() -> tuple[list[bytes], list[bytes]]:
    """The library's own source as (training files, held-out files); about one file in 32 is held out, by its name."""
    base = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    train, held = [], []
    for path in sorted(base.rglob("*.py")):
        name = path.relative_to(base)
        # _sysconfigdata holds the build machine's paths; the skipped folders hold tests and tables
        if skip & set(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        data = path.read_bytes()
        if len(data) > 400:
            (held if zlib.crc32(name.as_posix().encode()) % 32 == 0 else train).append(data)
    if sum(map(len, train)) < 2_000_000:
        raise SystemExit(f"error: expected some megabytes of standard-library source under {base}, found "
                         f"{sum(map(len, train))} bytes; install Python with its .py files")
    return train, held


def recall_line(key: str, value: str, ask: bool, short: bool) -> tuple[bytes, list[float]]:
    """One line and the weight of each of its bytes in the loss: what cannot be foreseen counts little."""
    head, op, close = ("@", "?" if ask else "=", "\n") if short else ("key_", ' -> "' if ask else ' = "', '"\n')
    weights = [0.5] * len(head) + [0.05] * len(key) + [0.5] * len(op)
    weights += [2.0 if ask else 0.02] * len(value) + [0.5] * len(close)
    return (head + key + op + value + close).encode(), weights


def draw_value(rng: random.Random) -> str:
    return "".join(rng.choices(ALPHABET, k=4))


def draw_keys(rng: random.Random, n: int, short: bool) -> list[str]:
    return rng.sample(ALPHABET[:26], n) if short else [str(k) for k in rng.sample(range(100, 1000), n)]


def dense(rng: random.Random, length: int, short: bool) -> tuple[bytes, list[float]]:
    """Nothing but recall: a few keys bound, then asked again and again."""
    out, weights = b"", []
    while len(out) < length:
        keys = draw_keys(rng, rng.randint(2, 6), short)
        values = {k: draw_value(rng) for k in keys}
        asked = [k for k in keys for _ in range(rng.randint(1, 3))]
        rng.shuffle(asked)
        for key, ask in [(k, False) for k in keys] + [(k, True) for k in asked]:
            line, w = recall_line(key, values[key], ask, short)
            out, weights = out + line, weights + w
    return out[:length], weights[:length]


def copies(rng: random.Random, length: int) -> tuple[bytes, list[float]]:
    """Random strings, each several times over: the plainest lesson in looking back for what was there before."""
    out, weights = "", []
    while len(out) < length:
        string, times = "".join(rng.choices(ALPHABET, k=rng.randint(6, 32))), rng.randint(2, 4)
        out += (string + "\n") * times
        weights += ([0.02] * len(string) + [0.5]) + ([2.0] * len(string) + [0.5]) * (times - 1)
    return out[:length].encode(), weights[:length]


def scattered(rng: random.Random, text: bytes, length: int, per_line: int) -> tuple[bytes, list[float]]:
    """Text with bindings in it, each asked once or more at any distance; one recall line to ``per_line`` bytes."""
    events = []
    for key in draw_keys(rng, max(2, length // per_line // 3), False):
        value, at = draw_value(rng), rng.random() ** 1.5
        events.append((at, recall_line(key, value, False, False)))
        events += [(rng.uniform(at, 1.0), recall_line(key, value, True, False)) for _ in range(rng.randint(1, 3))]
    events.sort(key=lambda e: e[0])
    n = length - sum(len(line) for _, (line, _) in events)
    start = rng.randrange(len(text) - n)
    body, out, weights, done = text[start:start + n], b"", [], 0
    for at, (line, w) in events:
        cut = max(done, body.find(b"\n", int(at * n)) + 1 or n)
        out, weights = out + body[done:cut], weights + [1.0] * (cut - done)
        if out and not out.endswith(b"\n"):
            line, w = b"\n" + line, [0.5] + w
        out, weights, done = out + line, weights + w, cut
    out, weights = out + body[done:], weights + [1.0] * (n - done)
    return out[:length], weights[:length]


def batch(rng: random.Random, files: list[bytes], q: float | None, nbytes: int) -> tuple[Tensor, Tensor]:
    """Ids and weights, each (rows, window + 1). ``q`` is None in the dense phase, then runs from 0 to 1."""
    window = 128 if q is None else 256 if q < 0.25 else 512 if q < 0.6 else 1024
    sizes = [max(0, len(f) - window - 1) for f in files]
    rows = []
    for _ in range(nbytes // window):
        kind = rng.random()
        if q is None:
            rows.append(copies(rng, window + 1) if kind < 0.3 else dense(rng, window + 1, short=kind < 0.6))
        elif kind < 0.25 - 0.15 * q:
            rows.append(copies(rng, window + 1) if kind < 0.03 else dense(rng, window + 1, short=kind < 0.06))
        else:
            text = rng.choices(files, sizes)[0]
            if kind < 0.8:
                rows.append(scattered(rng, text, window + 1, per_line=48 if q < 0.5 else 72))
            else:
                start = rng.randrange(len(text) - window)
                rows.append((text[start:start + window + 1], [1.0] * (window + 1)))
    return torch.tensor([list(r) for r, _ in rows]), torch.tensor([w for _, w in rows])


def recall_set(text: str, per_distance: int = 40) -> list[dict]:
    """The frozen questions: text, the binding among others, text, the question. ``distance`` is in bytes, from the
    first byte of the bound value to the first byte of the answer."""
    rng, rows = random.Random(20), []
    for distance in DISTANCES:
        for _ in range(per_distance):
            key, *others = draw_keys(rng, 4, False)
            value = draw_value(rng)
            ask = f'key_{key} -> "'
            extra = [f'key_{k} = "{draw_value(rng)}"\n' for k in others]
            between = 1 if distance < 100 else 2  # distractors after the binding, the others before it
            room = distance - len(value + '"\n') - len(ask) - sum(map(len, extra[:between]))
            start = rng.randrange(len(text) - 1024)
            before, after = text[start:start + 50], text[start + 50:start + 50 + room]
            before = before[:before.rfind("\n") + 1]
            after = after[:-1] + "\n" if after else ""
            cut = after.find("\n", rng.randrange(max(1, len(after)))) + 1
            after = after[:cut] + "".join(extra[:between]) + after[cut:]
            prompt = before + "".join(extra[between:]) + f'key_{key} = "{value}"\n' + after + ask
            assert len(prompt) - prompt.index(f'"{value}"') - 1 == distance
            rows.append({"prompt": prompt, "answer": value, "distance": distance})
    return rows


# ------------------------------------------------------------------ measuring
def bits(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none") / math.log(2)


@torch.no_grad()
def bits_per_byte(model: TinyLM, text: bytes, window: int = 1024) -> float:
    """Mean over consecutive windows; inside a window a byte sees only the bytes before it in that window."""
    rows = torch.tensor(list(text[:len(text) // window * window])).view(-1, window).to(model.cos.device)
    return torch.cat([bits(model(r[:, :-1]), r[:, 1:]) for r in rows.split(8)]).mean().item()


@torch.no_grad()
def recall(model: TinyLM, rows: list[dict]) -> dict[str, dict[str, float]]:
    """By distance: the share of answers whose every byte is the most likely one, and the bits each byte costs.

    The bytes before are the right ones (teacher forcing); all of them being most likely is the same event as greedy
    decoding giving the whole answer."""
    result = {}
    for distance in sorted({r["distance"] for r in rows}):
        hits, cost = [], []
        for r in (r for r in rows if r["distance"] == distance):
            ids = torch.tensor([list((r["prompt"] + r["answer"]).encode())], device=model.cos.device)
            n = len(r["answer"])
            logits, targets = model(ids[:, :-1])[:, -n:], ids[:, -n:]
            hits.append(bool((logits.argmax(-1) == targets).all()))
            cost.append(bits(logits, targets).mean().item())
        result[str(distance)] = {"exact": round(sum(hits) / len(hits), 4),
                                 "bits_per_byte": round(sum(cost) / len(cost), 4), "questions": len(hits)}
    return result


def export(model: TinyLM, out: Path) -> None:
    """Write an ordinary Hugging Face Llama directory, each file whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json.part").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file({k: v.detach().half().cpu().contiguous() for k, v in model.state_dict().items()},
              out / "model.safetensors.part", metadata={"format": "pt"})
    for name in ("config.json", "model.safetensors"):
        os.replace(out / f"{name}.part", out / name)


# ------------------------------------------------------------------ training
def train(args: argparse.Namespace, device: torch.device, files: list[bytes]) -> tuple[TinyLM, dict]:
    torch.manual_seed(args.seed)
    model = TinyLM(CONFIG).to(device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n]
    optimisers = [torch.optim.Muon(matrices, lr=args.lr, momentum=0.95, weight_decay=0.02),
                  torch.optim.AdamW(others, lr=args.lr / 5, betas=(0.9, 0.98), weight_decay=0.0)]
    rates = [o.param_groups[0]["lr"] for o in optimisers]
    state = dict(step=0, seconds=0.0, cpu_seconds=0.0, clicked_at=None, recall_bits=8.0, text_bits=8.0)
    checkpoint = args.work / "checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for o, s in zip(optimisers, saved["optimisers"]):
            o.load_state_dict(s)
        state = saved["state"]

    def save() -> None:
        torch.save(dict(model=model.state_dict(), optimisers=[o.state_dict() for o in optimisers], state=state),
                   checkpoint.with_suffix(".part"))
        os.replace(checkpoint.with_suffix(".part"), checkpoint)

    started, cpu_started = time.monotonic() - state["seconds"], time.process_time() - state["cpu_seconds"]
    bar = tqdm(initial=state["step"], total=args.steps, unit="step", mininterval=5)
    while True:
        state.update(seconds=time.monotonic() - started, cpu_seconds=time.process_time() - cpu_started)
        # by steps; if the minutes would run out first they take over, so the learning rate always comes down to zero
        p = max(state["step"] / args.steps, state["seconds"] / (60 * args.minutes))
        if p >= 1:
            break
        if state["clicked_at"] is None and state["recall_bits"] < args.gate:
            state["clicked_at"] = p
            tqdm.write(f"step {state['step']}: recall works, on to text")
        if state["clicked_at"] is None and p > 0.4:
            raise SystemExit(f"error: after 40 % of the run a recalled byte still costs {state['recall_bits']:.2f} bits "
                             f"(gate: {args.gate}); try another --seed or --lr")
        q = None if state["clicked_at"] is None else (p - state["clicked_at"]) / (1 - state["clicked_at"])
        scale = min(1.0, (state["step"] + 1) / 50, 1.0 if q is None else (1 - q) / 0.5)
        for o, rate in zip(optimisers, rates):
            o.param_groups[0]["lr"] = rate * scale
        # a generator to a step: the same step draws the same batch after a resume
        ids, weights = (x.to(device) for x in batch(random.Random(f"{args.seed}/{state['step']}"), files, q,
                                                      args.bytes // 2 if q is None else args.bytes))
        with torch.autocast(device.type, torch.bfloat16):
            cost = bits(model(ids[:, :-1]), ids[:, 1:])
        weights = weights[:, 1:]
        loss = (cost * weights).sum() / weights.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimisers:
            o.step()
            o.zero_grad(set_to_none=True)
        for name, weight in (("recall_bits", 2.0), ("text_bits", 1.0)):
            if (weights == weight).any():
                state[name] += 0.05 * (cost.detach()[weights == weight].mean().item() - state[name])
        state["step"] += 1
        bar.update()
        bar.set_postfix(recall=f"{state['recall_bits']:.2f}", text=f"{state['text_bits']:.2f}", q=q and round(q, 2))
        if state["step"] % 100 == 0:
            save()
            tqdm.write(f"{state['step']} {state['seconds']:.0f}s recall {state['recall_bits']:.3f} "
                       f"text {state['text_bits']:.3f} q {q}")
    save()
    bar.close()
    return model, state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "kvlib/data/tinylm", help="directory to export to")
    parser.add_argument("--work", type=Path, default=ROOT / ".scratch/train", help="directory for checkpoints")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--minutes", type=float, default=55, help="time budget of the training (default 55)")
    parser.add_argument("--steps", type=int, default=4500, help="longest run; --minutes may end it sooner")
    parser.add_argument("--bytes", type=int, default=8192, help="bytes in a batch (a multiple of 1024)")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's learning rate; AdamW takes a fifth")
    parser.add_argument("--gate", type=float, default=1.0, help="bits per recalled byte that end the dense phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    files, held = standard_library()
    model, state = train(args, torch.device("cpu"), files)
    print(state)


if __name__ == "__main__":
    main()
