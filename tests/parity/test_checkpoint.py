"""Hugging Face directories: read, written, read back by transformers; every broken one says what is wrong."""

import json
import shutil

import numpy as np
import pytest

import kvlib

BACKENDS = ["numpy", "torch"]
PROMPT = np.arange(2, 40)[None]


@pytest.fixture
def broken(llama_path, tmp_path):
    """A copy of a good directory, to be damaged, with helpers that rewrite its parts."""

    class Broken:
        path = tmp_path / "model"

        def config(self, **changes):
            """Set entries of config.json; ... removes one."""
            config = json.loads((self.path / "config.json").read_text()) | changes
            kept = {name: value for name, value in config.items() if value is not ...}
            (self.path / "config.json").write_text(json.dumps(kept))

        def tensors(self, change):
            from safetensors.numpy import load_file, save_file

            tensors = load_file(self.path / "model.safetensors")
            change(tensors)
            save_file(tensors, self.path / "model.safetensors", metadata={"format": "pt"})

        def load(self, backend="numpy", **options):
            return kvlib.Transformer.from_pretrained(self.path, backend, **options)

        def refuses(self, message, error=ValueError):
            for backend in BACKENDS:
                with pytest.raises(error, match=message):
                    self.load(backend)

    shutil.copytree(llama_path, Broken.path)
    return Broken()


# -- what works --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_round_trip(reference, backend, tmp_path, torch, transformers):
    """What kvlib writes, transformers reads, and gives the same logits; nothing of the config is lost.

    transformers spells rope its own new way, kvlib the old way: both are read here.
    """
    model = kvlib.Transformer.from_pretrained(reference.path, backend)
    model.save_pretrained(tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert type(theirs) is type(reference.model) and theirs.dtype == torch.float32
    assert not any(report.values()), report
    with torch.no_grad():
        logits = theirs(torch.from_numpy(reference.prompt)).logits[0].numpy()
    np.testing.assert_allclose(logits, reference.logits, rtol=0, atol=1e-6)

    spelled = [json.loads((path / "config.json").read_text()) for path in (reference.path, tmp_path / "out")]
    assert ["rope_parameters" in config for config in spelled] == [True, False]
    again = kvlib.Transformer.from_pretrained(tmp_path / "out", backend)
    assert again.config == model.config
    assert np.array_equal(*(np.asarray(m(reference.prompt)) for m in (model, again)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards(reference, backend, tmp_path):
    reference.model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    whole, sharded = (kvlib.Transformer.from_pretrained(p, backend) for p in (reference.path, tmp_path))
    assert np.array_equal(np.asarray(whole(reference.prompt)), np.asarray(sharded(reference.prompt)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(reference, backend, dtype, tmp_path, torch, transformers):
    """bfloat16 files load on NumPy too, as the same numbers in float32."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    load(reference.path, dtype=getattr(torch, dtype)).save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = load(tmp_path, dtype=torch.float32)
        expected = theirs(torch.from_numpy(reference.prompt)).logits[0].numpy()
    assert abs(expected - reference.logits).max() > 1e-3  # the file does hold rounded weights
    model = kvlib.Transformer.from_pretrained(tmp_path, backend)
    assert model.dtype == model.spec.dtype == "float32"
    np.testing.assert_allclose(np.asarray(model(reference.prompt))[0], expected, rtol=0, atol=1e-4)


def test_half_precision_round_trip(reference, tmp_path, torch, transformers):
    model = kvlib.Transformer.from_pretrained(reference.path, "torch", dtype="bfloat16")
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == torch.bfloat16
    weight = reference.model.model.embed_tokens.weight
    assert torch.equal(theirs.model.embed_tokens.weight, weight.to(torch.bfloat16))


def test_a_copy_of_the_tied_embedding_is_no_surprise(broken):
    expected = broken.load()
    broken.config(tie_word_embeddings=True)
    broken.tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    tied = broken.load()
    assert tied.num_parameters == expected.num_parameters - 128 * 64


def test_rope_tables_of_old_checkpoints_are_skipped(broken):
    broken.tensors(
        lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    )
    assert broken.load()(PROMPT).shape == (1, 38, 128)


def test_saving_replaces_whole_files_or_nothing(broken, monkeypatch):
    before = {file.name: file.read_bytes() for file in broken.path.iterdir()}
    model = broken.load()

    def full(*args, **kwargs):
        args[1].write_bytes(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(broken.path)
    assert {file.name: file.read_bytes() for file in broken.path.iterdir()} == before


def test_saving_over_a_file_that_is_being_read(broken):
    """It takes the old one's name; whoever holds the old one open, a memory map included, keeps it."""
    model = broken.load("torch", dtype="bfloat16")
    logits, weights = model(PROMPT), broken.path / "model.safetensors"
    with weights.open("rb") as held:
        before = weights.read_bytes()
        model.save_pretrained(broken.path)
        assert held.read() == before != weights.read_bytes()
    again = broken.load("torch", dtype="bfloat16")
    assert np.array_equal(logits.numpy(), model(PROMPT).numpy())
    assert np.array_equal(logits.numpy(), again(PROMPT).numpy())


def test_a_window_as_long_as_the_context(broken):
    """Positions behind the context are no error, here as in transformers; from there on the window counts."""
    broken.config(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=256)
    model = broken.load()
    cache = kvlib.KVCache(model.spec, max_tokens=300)
    tokens = np.random.default_rng(0).integers(0, 128, (1, 260))
    model(tokens[:, :250], cache, last_only=True)
    got = model(tokens[:, 250:], cache)
    np.testing.assert_allclose(got, model(tokens)[:, 250:], rtol=0, atol=1e-4)
    assert np.abs(got[0, -1] - broken.load()(tokens[:, 4:])[0, -1]).max() > 1e-3  # not a cut: layers reach further


@pytest.mark.parametrize(
    "changes",
    [dict(use_sliding_window=False), dict(use_sliding_window=True, max_window_layers=3)],
    ids=["switched-off", "no-layer-has-it"],
)
def test_qwen_windows_that_are_not_used(broken, changes):
    broken.config(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", sliding_window=16, head_dim=16, **changes
    )
    norms = {
        f"model.layers.{i}.self_attn.{n}_norm.weight": np.ones(16, np.float32) for i in range(3) for n in "qk"
    }
    broken.tensors(lambda t: t.update(norms))
    assert broken.load().config.sliding_window is None


# -- what is refused -----------------------------------------------------------------------------------------


def test_no_directory(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no config.json in .*nowhere.*holds config.json and model.safetensors"
    ):
        kvlib.Transformer.from_pretrained(tmp_path / "nowhere")


def test_no_config(broken):
    (broken.path / "config.json").unlink()
    broken.refuses("no config.json in .*holds config.json and model.safetensors", FileNotFoundError)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[1]", "must hold a JSON object, got a list")]
)
def test_config_is_not_json(broken, text, message):
    (broken.path / "config.json").write_text(text)
    broken.refuses(message)


def test_no_weights(broken):
    (broken.path / "model.safetensors").unlink()
    broken.refuses("no weights in .*model.safetensors", FileNotFoundError)


def test_pickles_are_never_opened(broken):
    """A pickle that would run code when opened: it is refused by its name alone."""
    (broken.path / "model.safetensors").unlink()
    ran = broken.path / "ran"
    (broken.path / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {ran}'\ntR.".encode())
    broken.refuses(r"weights as a pickle \(pytorch_model.bin\).*never does.*safetensors")
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"", b"not a header", b"\x08\x00\x00\x00\x00\x00\x00\x00{broken}"])
def test_damaged_weights(broken, content):
    (broken.path / "model.safetensors").write_bytes(content)
    broken.refuses("model.safetensors is damaged or not a safetensors file")


def test_truncated_weights(broken):
    content = (broken.path / "model.safetensors").read_bytes()
    (broken.path / "model.safetensors").write_bytes(content[:-100])
    broken.refuses("model.safetensors is damaged")


def test_missing_shard(broken):
    (broken.path / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (broken.path / "model.safetensors.index.json").write_text(json.dumps(index))
    broken.refuses("names model-00001-of-00001.safetensors, and .* does not hold it", FileNotFoundError)


def test_index_without_a_map(broken):
    (broken.path / "model.safetensors").unlink()
    (broken.path / "model.safetensors.index.json").write_text("{}")
    broken.refuses("model.safetensors.index.json has no weight_map")


def test_index_that_points_outside(broken):
    (broken.path / "model.safetensors").rename(broken.path.parent / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (broken.path / "model.safetensors.index.json").write_text(json.dumps(index))
    broken.refuses("files of its own directory only")


def test_missing_tensor(broken):
    broken.tensors(lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    broken.refuses("lacks model.layers.1.mlp.up_proj.weight;")


def test_many_missing_tensors(broken):
    broken.config(attention_bias=True)
    broken.refuses("lacks model.layers.0.self_attn.q_proj.bias, .* and 9 more")


def test_unexpected_tensor(broken):
    broken.tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}))
    broken.refuses("holds model.layers.0.self_attn.q_proj.bias, which config.json does not ask for")


def test_tied_embeddings_that_differ(broken):
    broken.config(tie_word_embeddings=True)
    broken.refuses("holds lm_head.weight, which config.json does not ask for")


def test_wrong_shape(broken):
    broken.tensors(lambda t: t.update({"model.norm.weight": np.ones(63, np.float32)}))
    broken.refuses(r"model.norm.weight has shape \(63,\); config.json makes it \(64,\)")


def test_integer_weights(broken):
    broken.tensors(lambda t: t.update({"model.norm.weight": np.ones(64, np.int8)}))
    broken.refuses("model.norm.weight is stored as I8; kvlib reads F64, F32, F16, BF16")


SUPPORTED = "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(architectures=["GPT2LMHeadModel"]),
            f"architecture GPT2LMHeadModel is not supported; {SUPPORTED}",
        ),
        (
            dict(architectures=None, model_type="gemma"),
            f"architecture model_type 'gemma' is not supported; {SUPPORTED}",
        ),
        (dict(architectures=..., model_type=...), f"model_type None is not supported; {SUPPORTED}"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu' is not supported; supported: silu"),
        (dict(quantization_config={"quant_method": "gptq"}), "quant_method 'gptq'.* not supported"),
        (dict(hidden_size=...), "hidden_size must be a positive integer, got None"),
        (dict(vocab_size=0), "vocab_size must be a positive integer, got 0"),
        (dict(num_hidden_layers="3"), "num_hidden_layers must be a positive integer, got '3'"),
        (dict(max_position_embeddings=...), "max_position_embeddings must be a positive integer, got None"),
        (dict(num_key_value_heads=3), "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        (dict(head_dim=15), "head_dim=15 must be even"),
        (dict(head_dim=32), r"q_proj.weight has shape \(64, 64\); config.json makes it \(128, 64\)"),
        (dict(rope_parameters={"rope_type": "dynamic"}), "rope_type 'dynamic' is not supported"),
        (dict(rms_norm_eps=0), "rms_norm_eps must be a positive number, got 0"),
        (dict(rms_norm_eps=-1e-5), "rms_norm_eps must be a positive number, got -1e-05"),
        (dict(rms_norm_eps="1e-5"), "rms_norm_eps must be a positive number, got '1e-5'"),
        (dict(tie_word_embeddings="false"), "tie_word_embeddings must be of type bool, got 'false'"),
        (dict(attention_bias=1), "attention_bias must be of type bool, got 1"),
        (dict(num_hidden_layers=True), "num_hidden_layers must be a positive integer, got True"),
        (
            dict(architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3"),
            "Gemma3ForConditionalGeneration is not supported: it holds an image encoder.*Gemma3ForCausalLM",
        ),
        (
            dict(architectures=["GptOssForCausalLM"], quantization_config={"quant_method": "mxfp4"}),
            r"quantised weights \(quant_method 'mxfp4'\) are not supported.*dequantised",
        ),
    ],
)
def test_configurations_that_are_refused(broken, changes, message):
    broken.config(**changes)
    broken.refuses(message)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("numpy", dict(dtype="float16"), "dtype must be float32 on the numpy backend, got 'float16'"),
        ("torch", dict(dtype="int8"), "float32 or float16 or bfloat16 on the torch backend, got 'int8'"),
        ("jax", {}, "'numpy' or 'torch', got 'jax'"),
        ("numpy", dict(device="cuda"), "got device='cuda'"),
    ],
)
def test_options_that_are_refused(broken, backend, options, message):
    with pytest.raises(ValueError, match=message):
        broken.load(backend, **options)
