"""The protocol: msgpack messages of the stream, JSON bodies of the REST calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgpack
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from holdover.decision import Decision

_msgpack: Any = msgpack  # Any: it ships no types

#: The coding of frames: ``webp`` is lossless, ``jpeg`` is small, ``mp4`` (fragments of H.264) is smaller.
FrameFormat = Literal["jpeg", "webp", "mp4"]
#: ``lockstep``: one chunk for each action. ``realtime``: while a client reads, one chunk every period, under the newest
#: action.
Mode = Literal["lockstep", "realtime"]

#: The limit on a client's message, in bytes. Every valid message is shorter.
MAX_MESSAGE = 16 * 1024
_MAX_SEQUENCE = 2**53
Action = Annotated[
    list[Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]],
    Field(min_length=1, max_length=64, description="Normalised: for driving, speed and curvature."),
]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ActionMessage(Message):
    """A command. The next chunk uses the newest one."""

    type: Literal["action"]
    seq: Annotated[int, Field(ge=0, lt=_MAX_SEQUENCE, description="Grows with every action; others are ignored.")]
    action: Action
    plan: Annotated[
        list[Action] | None,
        Field(
            max_length=16,
            description="What is intended for the latent frames that are not yet commanded, an action each, in the "
            "chunk of this action alone. Without it they hold the newest action.",
        ),
    ] = None


class AckMessage(Message):
    """The client has this chunk and all before it. The video waits while too many chunks are unacknowledged."""

    type: Literal["ack"]
    chunk: Annotated[int, Field(ge=0, lt=_MAX_SEQUENCE)]


class PolicyMessage(Message):
    """Use another policy from the next chunk on."""

    type: Literal["policy"]
    policy: Annotated[str, Field(max_length=64)]


class VideoTrack(Message):
    """A camera's video for Media Source Extensions: append ``init``, then each fragment."""

    type: Annotated[str, Field(description="MIME type and codec.")]
    init: bytes


class Hello(Message):
    """The server's first message on a connection."""

    type: Literal["hello"] = "hello"
    session: str
    resumes_at: Annotated[int, Field(description="The first chunk that the server will send.")]
    seq: Annotated[int, Field(description="The newest action sequence number seen, -1 for none.")]
    policy: str
    policies: list[str]
    cameras: dict[str, tuple[int, int]]
    video: Annotated[dict[str, VideoTrack], Field(description="Per camera, if the format is `mp4`.")]
    fps: int
    frames: Annotated[int, Field(description="Video frames in a chunk.")]
    action_dims: int


class ChunkMessage(Message):
    """One chunk."""

    type: Literal["chunk"] = "chunk"
    index: int
    seq: Annotated[int, Field(description="The action of this chunk.")]
    policy: str
    format: FrameFormat
    frames: Annotated[dict[str, list[bytes]], Field(description="Per camera: its pictures, or one fragment.")]
    decisions: Annotated[DecisionGrid, Field(description="For each block of each pass, why it was computed or reused.")]
    milliseconds: Annotated[float, Field(description="Compute time of the batch.")]
    latency_ms: Annotated[float, Field(description="Time since the action arrived.")]
    late: Annotated[bool, Field(description="It missed its deadline, one period after the action or the chunk before.")]
    batch: Annotated[int, Field(description="Sessions in the batch.")]


class DecisionGrid(Message):
    """``grid[pass][block]`` is an index into ``reasons``. KV updates are always computed and left out."""

    reasons: list[str]
    grid: list[list[int]]


class ErrorMessage(Message):
    """A message was refused or a chunk failed. The session is unchanged."""

    type: Literal["error"] = "error"
    code: Literal["invalid", "stale", "failed"]
    detail: str


ChunkMessage.model_rebuild()

ClientMessage = Annotated[ActionMessage | AckMessage | PolicyMessage, Field(discriminator="type")]
ServerMessage = Annotated[Hello | ChunkMessage | ErrorMessage, Field(discriminator="type")]
_CLIENT: TypeAdapter[ActionMessage | AckMessage | PolicyMessage] = TypeAdapter(ClientMessage)


def pack(message: Message) -> bytes:
    packed: bytes = _msgpack.packb(message.model_dump())
    return packed


def parse(data: bytes) -> ActionMessage | AckMessage | PolicyMessage:
    """A client's message.

    Raises:
        ValueError: the data is not msgpack, or not a message of the protocol. The error is one line.
    """
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"the message has {len(data)} bytes; send at most {MAX_MESSAGE}")
    try:
        fields = _msgpack.unpackb(
            data, max_array_len=64, max_map_len=8, max_str_len=64, max_bin_len=0, max_ext_len=0, strict_map_key=True
        )
    except Exception as error:  # msgpack raises many kinds, such as RecursionError and UnicodeDecodeError
        raise ValueError(f"the message is not msgpack of this protocol ({type(error).__name__})") from None
    try:
        return _CLIENT.validate_python(fields)
    except ValidationError as error:
        raise ValueError(
            "; ".join(f"{'.'.join(map(str, e['loc'])) or 'message'}: {e['msg']}" for e in error.errors())[:500]
        ) from None


def decision_grid(decisions: Sequence[Decision]) -> DecisionGrid:
    """The decisions of the denoising passes as a grid."""
    reasons: dict[str, int] = {}
    grid: dict[int, dict[int, int]] = {}
    for d in decisions:
        if d.role == "denoise":
            grid.setdefault(d.index, {})[d.block] = reasons.setdefault(d.reason, len(reasons))
    return DecisionGrid(reasons=list(reasons), grid=[[row[b] for b in sorted(row)] for _, row in sorted(grid.items())])


class NewSession(BaseModel):
    """A new session."""

    model_config = ConfigDict(extra="forbid")

    scenario: Annotated[str | None, Field(max_length=64, description="By default the first of the server.")] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    policy: Annotated[str | None, Field(max_length=64, description="By default the first of the server.")] = None
    format: FrameFormat = "jpeg"
    mode: Mode = "lockstep"


class SessionInfo(BaseModel):
    """A session."""

    id: str
    scenario: str
    seed: int
    policy: str
    format: FrameFormat
    mode: Mode
    chunk: Annotated[int, Field(description="The number of the next chunk.")]
    seconds: Annotated[float, Field(description="Seconds of video so far.")]
    connected: bool
    parked: Annotated[bool, Field(description="The session is on disk until it is used again.")]
    bytes: int


class SnapshotInfo(BaseModel):
    """A snapshot."""

    id: str
    session: str
    chunk: int
    bytes: int


class Detail(BaseModel):
    """Why a call was refused."""

    detail: str
