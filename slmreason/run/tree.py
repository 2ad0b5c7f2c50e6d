"""A tree of tensors and plain values as one file that holds no code: safetensors, with the rest as JSON inside it.

Lightning's checkpoints are pickles by default; `SafetensorsIO` writes and reads the same dictionaries in this form.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slmreason.run.files import write_file

log = logging.getLogger(__name__)
TREE = "tree"
"""Name of the tensor whose bytes are the JSON: safetensors bounds its own header, and a run's history may be long."""


def save_tree(path: Path, tree: Any) -> None:
    """Writes nested dicts (of text or whole-number keys), lists, tuples, tensors and plain values.

    The file is there whole or not at all. Tensors that are one and the same are written once.

    Raises:
        TypeError: a value is of another kind; the message says where it stands.
        OSError: it cannot be written, e.g. since the disk is full.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(tree, tensors, {}, "")).encode()
    tensors[TREE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    write_file(path, lambda temporary: save_file(tensors, temporary))


def load_tree(path: Path, with_tensors: bool = True) -> Any:
    """Reads what `save_tree` wrote.

    Args:
        with_tensors: False leaves tensors out (None stands in their place), so that a look at the rest is quick.

    Raises:
        ValueError: the file is not there, is torn, or is something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tree = json.loads(file.get_tensor(TREE).numpy().tobytes())
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint, or a torn one ({error})") from error
    return _unpacked(tree, tensors)


class SafetensorsIO(CheckpointIO):
    """Lightning checkpoints without pickle, each written whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_tree(Path(path), self._savable(checkpoint))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return dict(load_tree(Path(path)))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)

    def _savable(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Without what a callback put in that cannot be kept: a run does not end for it, and is told so once."""
        kept = {name: value for name, value in checkpoint.items() if name in OWN or self._is_kept(name, value)}
        callbacks = checkpoint.get("callbacks")
        if isinstance(callbacks, Mapping):
            kept["callbacks"] = {name: s for name, s in callbacks.items() if self._is_kept(f"callbacks/{name}", s)}
        return kept

    def _is_kept(self, name: str, value: Any) -> bool:
        if (location := unsavable(value)) is None:
            return True
        if name not in _TOLD:
            _TOLD.add(name)
            log.warning("checkpoint: %s is left out, so a run that goes on begins it anew: %s", name, location)
        return False


_TOLD: set[str] = set()
OWN = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "run", "callbacks")
"""Parts of a checkpoint that must be whole."""


def unsavable(value: Any) -> str | None:
    """What in a tree of values cannot be kept, and where it stands; None when all of it can."""
    try:
        _packed(value, {}, {}, "")
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    return None


def _packed(value: Any, tensors: dict[str, Tensor], names: dict[Any, str], location: str) -> Any:
    """The JSON form of a value; what JSON lacks is a dict with one `$` key."""
    if isinstance(value, Tensor):
        same = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else location
        if same not in names:
            names[same] = location
            # A view would drag its whole storage along, and safetensors refuses two names for one storage.
            shared = value.untyped_storage().nbytes() != value.numel() * value.element_size()
            tensors[location] = value.detach().clone() if shared else value.detach().contiguous()
        return {"$tensor": names[same]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _packed(item, tensors, names, f"{location}/{key}") for key, item in value.items()}
        pairs = [[_packed(k, tensors, names, location), _packed(v, tensors, names, f"{location}/{k}")]
                 for k, v in value.items()]  # fmt: skip
        return {"$dict": pairs}
    if isinstance(value, tuple):
        return {"$tuple": [_packed(item, tensors, names, f"{location}/{i}") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_packed(item, tensors, names, f"{location}/{i}") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value.value if isinstance(value, Enum) else value  # an enum of texts is its text
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if (written := _as_plain(value)) is not None:
        kind, plain = written
        return {f"${kind}": _packed(plain, tensors, names, location)}
    raise TypeError(f"checkpoint{location}: a {type(value).__name__} cannot be kept without pickle")


def _as_plain(value: Any) -> tuple[str, Any] | None:
    """(kind, plain values) of what callbacks keep beside plain values; None for what is of no such kind."""
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in "biufcmMSU":
            return None
        array = np.ascontiguousarray(value)
        raw = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.nbytes else torch.empty(0)
        return "array", [array.dtype.str, list(np.shape(value)), raw, isinstance(value, np.generic)]
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(value, key=repr)
    if isinstance(value, bytes | bytearray):
        return "bytes", value.hex()
    if isinstance(value, datetime):
        return "datetime", value.isoformat()
    if isinstance(value, date):
        return "date", value.isoformat()
    if isinstance(value, timedelta):
        return "timedelta", [value.days, value.seconds, value.microseconds]
    if isinstance(value, deque):
        return "deque", [list(value), value.maxlen]
    if isinstance(value, complex):
        return "complex", [value.real, value.imag]
    return None


def _array(kept: Sequence[Any]) -> Any:
    dtype, shape, raw, is_scalar = kept
    if raw is None:  # read without tensors
        return None
    array = np.frombuffer(raw.numpy().tobytes(), dtype=np.dtype(dtype)).reshape(shape).copy()
    return array[()] if is_scalar else array


_MAKE: dict[str, Callable[[Any], Any]] = {
    "array": _array,
    "set": set,
    "frozenset": frozenset,
    "bytes": bytes.fromhex,
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "timedelta": lambda parts: timedelta(*parts),
    "deque": lambda parts: deque(parts[0], parts[1]),
    "complex": lambda parts: complex(*parts),
}
"""What `_as_plain` wrote, from its plain values."""


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors.get(value["$tensor"])
    if "$tuple" in value:
        return tuple(_unpacked(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        return {_unpacked(key, tensors): _unpacked(item, tensors) for key, item in value["$dict"]}
    [kind] = [key.removeprefix("$") for key in value if key.startswith("$")] or [""]
    if kind in _MAKE:
        return _MAKE[kind](_unpacked(value[f"${kind}"], tensors))
    return {key: _unpacked(item, tensors) for key, item in value.items()}
