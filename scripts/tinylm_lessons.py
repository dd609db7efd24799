"""What tinylm is taught: Python's own source, and lines that must be recalled.

A lesson is some bytes and the weight of each of them in the loss.
"""

import random
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALPHABET = LETTERS + "0123456789"
ANSWER, COPY = 4.0, 3.0  # weights in the loss of a byte of an answer and of a copy; a byte of text has 1
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
