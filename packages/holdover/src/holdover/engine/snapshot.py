"""A stream outside the process that made it: tensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdover.engine import condition as conditions
from holdover.engine.blocks import Block
from holdover.engine.runtime import Runtime
from holdover.engine.streams import BranchRun, ChunkState, Condition, Key, Stream
from holdover.engine.tensor_file import read_tensors, write_tensors
from holdover.method import Entry

FORMAT = "stream 5"

#: Values sampled per parameter to tell one model's weights from another's.
SAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What `Cache.snapshot` took: restore it with `Cache.restore`, here or in another process.

    Attributes:
        policies: the repr of each policy, outermost first; a snapshot restores under the same policies only.
        model: a digest of the slots and of a sample of their weights; in another model no entry is reused.
        streams: per policy everything but tensors, in JSON's terms.
        tensors: the entries' tensors.
    """

    policies: tuple[str, ...]
    model: str
    streams: tuple[Mapping[str, Any], ...]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def plain(self) -> dict[str, Any]:
        """Everything but tensors, in JSON's terms."""
        return {"policies": list(self.policies), "model": self.model, "streams": list(self.streams)}

    @classmethod
    def of(cls, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Snapshot:
        """The reverse of `plain`, with the tensors."""
        policies, streams = tuple(plain["policies"]), tuple(plain["streams"])
        return cls(policies=policies, model=plain["model"], streams=streams, tensors=tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.safetensors`` file, whole or not at all."""
        write_tensors(Path(path), {"format": FORMAT, **self.plain}, self.tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """Read what `save` wrote; tensors come on the CPU, `Cache.restore` moves them.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a snapshot, or of another format.
        """
        header, tensors = read_tensors(Path(path), "write one with cache.snapshot(stream).save(path)", format=FORMAT)
        return cls.of(header, tensors)


def model_digest(blocks: Iterable[Block]) -> str:
    """Tells models apart by the names, shapes and sampled values of their slots' parameters and buffers."""
    sha = hashlib.sha256()
    for block in blocks:
        sha.update(f"{block.name} {type(block.module).__qualname__}".encode())
        for name, tensor in block.module.state_dict().items():
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to("cpu", torch.float32)
            sha.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            sha.update(sample.numpy().tobytes())
    return sha.hexdigest()


def take(runtimes: Sequence[Runtime], stream: str) -> Snapshot:
    """A copy of a stream's state under every policy."""
    encoded = [encode(runtime.streams[stream], f"{n}.") for n, runtime in enumerate(runtimes)]
    return Snapshot(
        policies=_policies(runtimes),
        model=_digest(runtimes),
        streams=tuple(plain for plain, _ in encoded),
        tensors={name: tensor for _, tensors in encoded for name, tensor in tensors.items()},
    )


def put_back(runtimes: Sequence[Runtime], stream: str, snapshot: Snapshot) -> None:
    """Put a stream where a snapshot was taken. In another model the entries give up their tensors.

    Raises:
        ValueError: the snapshot was taken under another policy.
    """
    policies = _policies(runtimes)
    if snapshot.policies != policies:
        raise ValueError(
            f"the snapshot was taken under {', '.join(snapshot.policies)}, attached is {', '.join(policies)}; attach "
            f"with the snapshot's policy"
        )
    other_model = snapshot.model != _digest(runtimes)
    for n, runtime in enumerate(runtimes):
        state = decode(snapshot, n, runtime.blocks)
        if other_model:
            state.entries = {key: entry.voided("snapshot") for key, entry in state.entries.items()}
            state.count_bytes()
        runtime.streams[stream] = state


def _policies(runtimes: Sequence[Runtime]) -> tuple[str, ...]:
    return tuple(repr(runtime.policy) for runtime in runtimes)


def _digest(runtimes: Sequence[Runtime]) -> str:
    return model_digest(block for runtime in runtimes for block in runtime.blocks)


def encode(stream: Stream, prefix: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A stream as JSON and tensors, whose names begin with the prefix; the tensors are copies."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return {"value": value}
        tensors[prefix + name] = value.clone()
        return {"tensor": prefix + name}

    entries = []
    for n, (key, entry) in enumerate(stream.entries.items()):
        entries.append(
            {
                "key": list(key),
                "tensors": {name: put(f"{n}.{name}", tensor) for name, tensor in entry.tensors.items()},
                "extras": {
                    str(block): [put(f"{n}.extra.{block}.{i}", item) for i, item in enumerate(items)]
                    for block, items in entry.extras.items()
                },
                "memory": {
                    str(block): {name: put(f"{n}.memory.{block}.{name}", tensor) for name, tensor in own.items()}
                    for block, own in entry.memory.items()
                },
                "numbers": dict(entry.numbers),
                "chunk": entry.chunk,
                "epoch": entry.epoch,
                "action": _listed(entry.action),
                "shape": list(entry.shape),
                "dtype": str(entry.dtype).removeprefix("torch."),
                "out_dtype": str(entry.out_dtype).removeprefix("torch."),
                "left_out": list(entry.left_out),
                "void": entry.void,
            }
        )
    chunks = [
        {
            "chunk": number,
            "ordinal": chunk.ordinal,
            "commits": chunk.commits,
            "asked": chunk.asked,
            "warm_up": chunk.warm_up,
            "shared": [[*key, *led] for key, led in chunk.shared.items()],
            "runs": {
                branch: {
                    "num_steps": run.num_steps,
                    "action": _listed(run.action),
                    "indices": sorted(run.indices),
                    "exact": run.exact,
                    "drafts": sorted(run.drafts),
                    "epoch": run.epoch,
                    "latest": run.latest,
                }
                for branch, run in chunk.runs.items()
            },
        }
        for number, chunk in stream.chunks.items()
    ]
    known = {
        branch: {
            "epoch": known.epoch,
            "digest": known.digest if known.by_digest else conditions.digest(known.frozen),
        }
        for branch, known in stream.conditions.items()
    }
    plain = {
        "entries": entries,
        "chunks": chunks,
        "count": stream.count,
        "latest": stream.latest,
        "conditions": known,
        "full_actions": {branch: _listed(action) for branch, action in stream.full_actions.items()},
        "held": stream.held,
        "passes": stream.passes,
        "reach": [[*place, spans] for place, spans in stream.reach.items()],
        "reuses": stream.reuses,
        "alarmed": stream.alarmed,
        "barren": stream.barren,
    }
    return plain, tensors


def decode(snapshot: Snapshot, n: int, blocks: Sequence[Block]) -> Stream:
    """The stream under the n-th policy, its tensors copied to where the blocks are."""
    plain = snapshot.streams[n]
    stream = Stream(
        count=plain["count"],
        latest=plain["latest"],
        held=plain["held"],
        passes=dict(plain["passes"]),
        reach={(branch, index): spans for branch, index, spans in plain["reach"]},
        reuses=plain["reuses"],
        alarmed=plain["alarmed"],
        barren=plain["barren"],
    )
    for entry in plain["entries"]:
        key = Key(*entry["key"])
        device = _device(blocks[key.block]) if key.block < len(blocks) else torch.device("cpu")

        def get(item: Mapping[str, Any], device: torch.device = device) -> Any:
            return snapshot.tensors[item["tensor"]].to(device, copy=True) if "tensor" in item else item["value"]

        stream.entries[key] = Entry(
            tensors={name: get(item) for name, item in entry["tensors"].items()},
            extras={int(b): tuple(get(item) for item in items) for b, items in entry["extras"].items()},
            memory={int(b): {name: get(item) for name, item in own.items()} for b, own in entry["memory"].items()},
            numbers=entry["numbers"],
            chunk=entry["chunk"],
            epoch=entry["epoch"],
            action=_told(entry["action"]),
            shape=torch.Size(entry["shape"]),
            dtype=getattr(torch, entry["dtype"]),
            device=device,
            out_dtype=getattr(torch, entry["out_dtype"]),
            left_out=tuple(entry["left_out"]),
            void=entry["void"],
        )
    for item in plain["chunks"]:
        chunk = ChunkState(item["ordinal"], item["commits"], asked=item["asked"], warm_up=item["warm_up"])
        for branch, run in item["runs"].items():
            action, indices = _told(run["action"]), set(run["indices"])
            told = run["num_steps"], action, run["epoch"]
            chunk.runs[branch] = BranchRun(*told, indices, run["exact"], run["latest"], set(run["drafts"]))
        chunk.shared = {(index, block): (branch, reused) for index, block, branch, reused in item["shared"]}
        stream.chunks[item["chunk"]] = chunk
    for branch, known in plain["conditions"].items():
        stream.conditions[branch] = Condition(known["epoch"], digest=known["digest"], by_digest=True)
    for branch, action in plain["full_actions"].items():
        stream.full_actions[branch] = _told(action)
    stream.count_bytes()
    return stream


def _listed(told: tuple[tuple[float, ...], ...] | None) -> list[list[float]] | None:
    return None if told is None else list(map(list, told))


def _told(listed: Sequence[Sequence[float]] | None) -> tuple[tuple[float, ...], ...] | None:
    return None if listed is None else tuple(map(tuple, listed))


def _device(block: Block) -> torch.device:
    parameter = next(block.module.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")
