"""Hugging Face model directories: ``config.json`` beside ``*.safetensors``, in one file or in shards."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from kvlib.arrays import Array, Backend

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXACT = "e_score_correction_bias"  # stays float32 in a half-precision model: it decides between near ties
FLOATS = ("F64", "F32", "F16", "BF16")
NEEDS = f"a model directory holds config.json and {WEIGHTS} (or its shards beside {INDEX})"


def read_config(directory: Path) -> dict[str, Any]:
    """The contents of ``directory``/config.json.

    Raises:
        FileNotFoundError: there is none; the message says what a model directory needs.
        ValueError: it is not a JSON object.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {directory}: {NEEDS}")
    return _read_json(directory / "config.json")


def read_tensors(
    directory: Path, shapes: dict[str, tuple[int, ...]], backend: Backend, dtype: str, spare: tuple[str, ...] = ()
) -> dict[str, Array]:
    """The tensors named in ``shapes``, in ``dtype`` on ``backend``; all names and shapes are checked first.

    ``spare``: beginnings of the names of tensors that may be there and are not wanted.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: the weights are a pickle, a file is damaged, or a tensor is missing, unexpected, of the
            wrong shape or not of a floating-point dtype.
    """
    from safetensors import SafetensorError, safe_open

    framework, device = ("numpy", "cpu") if backend.name == "numpy" else ("pt", str(backend.device))
    with ExitStack() as stack:
        handles: dict[str, Any] = {}
        for file in _weight_files(directory):
            try:
                handle = stack.enter_context(safe_open(file, framework, device=device))
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error
            handles |= dict.fromkeys(handle.keys(), handle)
        _drop_redundant(handles, shapes, spare)
        _check(directory, shapes, {name: handle.get_slice(name) for name, handle in handles.items()}, backend)
        dtypes = {name: "float32" if name.endswith(EXACT) else dtype for name in shapes}
        return {name: backend.astype(handles[name].get_tensor(name), dtypes[name]) for name in shapes}


def write(directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write config.json and model.safetensors; each appears under its name only when it is whole."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    parts = {name: directory / f"{name}.part" for name in (WEIGHTS, "config.json")}
    try:
        save_file(tensors, parts[WEIGHTS], metadata={"format": "pt"})  # transformers asks for this mark
        parts["config.json"].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, part in parts.items():
            os.replace(part, directory / name)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(content).__name__}")
    return content


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        weight_map = _read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{directory / INDEX} has no weight_map from tensor names to files")
        shards = sorted(set(weight_map.values()))
        if outside := [name for name in shards if Path(name).name != name]:
            raise ValueError(f"{INDEX} may name files of its own directory only, got {outside}")
        if missing := [name for name in shards if not (directory / name).is_file()]:
            raise FileNotFoundError(f"{INDEX} names {', '.join(missing)}, and {directory} does not hold it")
        return [directory / name for name in shards]
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
    if pickles:
        raise ValueError(
            f"{directory} holds its weights as a pickle ({', '.join(pickles)}); unpickling runs code from "
            f"the file, so kvlib never does. Look for the safetensors version of the model: {NEEDS}"
        )
    raise FileNotFoundError(f"no weights in {directory}: {NEEDS}")


def _drop_redundant(handles: dict[str, Any], shapes: dict[str, tuple[int, ...]], spare: tuple[str, ...]) -> None:
    """Forget what some checkpoints carry for nothing: RoPE tables, a copy of the tied output embedding, spares."""
    for name in [name for name in handles if name.endswith("rotary_emb.inv_freq") or name.startswith(spare)]:
        del handles[name]
    tied, source = "lm_head.weight", "model.embed_tokens.weight"
    if tied in handles and tied not in shapes and source in handles:
        output, embedding = handles[tied].get_tensor(tied), handles[source].get_tensor(source)
        if output.shape == embedding.shape and bool((output == embedding).all()):
            del handles[tied]


def _check(
    directory: Path, shapes: dict[str, tuple[int, ...]], found: dict[str, Any], backend: Backend
) -> None:
    if missing := [name for name in shapes if name not in found]:
        raise ValueError(f"{directory} lacks {_some(missing)}; config.json asks for {len(shapes)} tensors")
    if extra := [name for name in found if name not in shapes]:
        raise ValueError(f"{directory} holds {_some(extra)}, which config.json does not ask for")
    for name, shape in shapes.items():
        if tuple(found[name].get_shape()) != shape:
            raise ValueError(
                f"{name} has shape {tuple(found[name].get_shape())}; config.json makes it {shape}"
            )
        if found[name].get_dtype() not in FLOATS:
            raise ValueError(
                f"{name} is stored as {found[name].get_dtype()}; kvlib reads {', '.join(FLOATS)}"
            )
    if backend.name == "numpy" and any(tensor.get_dtype() == "BF16" for tensor in found.values()):
        backend.dtype("bfloat16")  # makes NumPy know the name, which is all that safetensors asks


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
