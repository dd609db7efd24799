"""The bundled model: transformers loads the same directory and gives the same answers."""

import numpy as np
import pytest

import kvlib
from kvlib.generation import TINYLM

TEXT = '''import os

key_417 = "xq7z"


def read_lines(path):
    """Return the lines of the file at *path*."""
    with open(path) as file:
        return [line.rstrip() for line in file]


key_417 -> "'''
NEW = 48
CACHES = {"contiguous": {}, "paged": {"block_size": 16}}


@pytest.fixture(scope="module")
def theirs(torch, transformers):
    model = transformers.AutoModelForCausalLM.from_pretrained(TINYLM, dtype=torch.float32).eval()
    ids = torch.tensor([list(TEXT.encode())])
    settings = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
    )
    with torch.no_grad():
        return model(ids).logits[0].numpy(), model.generate(ids, generation_config=settings)[
            0, ids.shape[1] :
        ].tolist()


@pytest.fixture(params=["numpy", "torch"])
def model(request):
    return kvlib.tinylm(request.param)


@pytest.mark.parametrize("kind", ["none", *CACHES])
def test_logits(model, kind, theirs):
    cache = None
    if kind != "none":
        cache = kvlib.KVCache(model.spec, max_tokens=512, backend=model.backend.name, **CACHES[kind])
    got = np.asarray(model([list(TEXT.encode())], cache))[0]
    np.testing.assert_allclose(got, theirs[0], rtol=0, atol=1e-4)


def test_logits_of_held_out_text(model, torch, transformers):
    """At single positions float32 is worth about 1e-4, in transformers too; over a text that averages out."""
    held_out = (
        np.frombuffer((TINYLM / "heldout.txt").read_bytes()[:4000], np.uint8)
        .astype(np.int64)
        .reshape(10, 400)
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TINYLM, dtype=torch.float32)
    with torch.no_grad():
        difference = np.asarray(model(held_out)) - theirs(torch.from_numpy(held_out)).logits.numpy()
    assert np.sqrt(np.mean(difference**2)) < 2e-5


@pytest.mark.parametrize("kind", ["none", *CACHES])
def test_greedy_generation(model, kind, theirs):
    cache = False
    if kind != "none":
        cache = kvlib.KVCache(model.spec, max_tokens=512, backend=model.backend.name, **CACHES[kind])
    assert list(kvlib.generate(model, list(TEXT.encode()), NEW, cache=cache)) == theirs[1]


def test_text_in_text_out(model, theirs):
    assert "".join(kvlib.generate(model, TEXT, NEW)) == bytes(theirs[1]).decode(errors="replace")


def test_it_is_what_the_design_asks_for(model):
    config = model.config
    assert config.architecture == "LlamaForCausalLM" and config.vocab_size == 256
    assert config.num_heads >= 4 * config.num_kv_heads
    files = {file.name: file.stat().st_size for file in TINYLM.iterdir()}
    assert files["model.safetensors"] < 10e6
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]


def test_a_missing_model_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("kvlib.generation.TINYLM", tmp_path / "tinylm")
    with pytest.raises(FileNotFoundError, match=r"bundled model is not in .*tinylm.*scripts/train_tinylm.py"):
        kvlib.tinylm()
