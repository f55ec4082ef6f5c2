"""What goes over the wire: msgpack messages of the stream, JSON bodies of the REST calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgpack
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from holdover.decision import Decision

_msgpack: Any = msgpack  # typed loosely: it ships no types

#: How frames are coded: ``webp`` is lossless here, ``jpeg`` small, ``mp4`` (fragments of H.264) smaller.
FrameFormat = Literal["jpeg", "webp", "mp4"]
#: ``lockstep``: an action makes a chunk. ``realtime``: one is made every period while someone reads, under the
#: newest action.
Mode = Literal["lockstep", "realtime"]

#: Bytes of a message from a client; nothing it may say is longer.
MAX_MESSAGE = 16 * 1024
_MAX_SEQUENCE = 2**53


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ActionMessage(Message):
    """The newest command. Of several that arrive before a chunk begins, the newest wins."""

    type: Literal["action"]
    seq: Annotated[int, Field(ge=0, lt=_MAX_SEQUENCE, description="Grows with every action; others are ignored.")]
    action: Annotated[
        list[Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]],
        Field(min_length=1, max_length=64, description="Normalised: for driving, speed and curvature."),
    ]


class AckMessage(Message):
    """The client has this chunk and all before it. At most a few may be unacknowledged: then the video waits."""

    type: Literal["ack"]
    chunk: Annotated[int, Field(ge=0, lt=_MAX_SEQUENCE)]


class PolicyMessage(Message):
    """Go on under another policy, from the next chunk on."""

    type: Literal["policy"]
    policy: Annotated[str, Field(max_length=64)]


class VideoTrack(Message):
    """A camera's video, as Media Source Extensions want it: append ``init``, then the fragments as they come."""

    type: Annotated[str, Field(description="MIME type and codec.")]
    init: bytes


class Hello(Message):
    """The first message of a connection."""

    type: Literal["hello"] = "hello"
    session: str
    resumes_at: Annotated[int, Field(description="The first chunk that will come.")]
    seq: Annotated[int, Field(description="The newest action sequence number seen, -1 for none.")]
    policy: str
    policies: list[str]
    cameras: dict[str, tuple[int, int]]
    video: Annotated[dict[str, VideoTrack], Field(description="Per camera, where the format is `mp4`.")]
    fps: int
    frames: Annotated[int, Field(description="Video frames of a chunk.")]
    action_dims: int


class ChunkMessage(Message):
    """One chunk."""

    type: Literal["chunk"] = "chunk"
    index: int
    seq: Annotated[int, Field(description="The action it was made under.")]
    policy: str
    format: FrameFormat
    frames: Annotated[dict[str, list[bytes]], Field(description="Per camera its pictures, or one fragment.")]
    decisions: Annotated[Decisions, Field(description="Why each block of each pass was computed, or that it was not.")]
    milliseconds: float
    latency_ms: Annotated[float, Field(description="From the action's arrival.")]
    late: Annotated[bool, Field(description="Made after its deadline, one period after the action or the last one.")]
    batch: Annotated[int, Field(description="Sessions made together.")]


class Decisions(Message):
    """``grid[pass][block]`` counts into ``reasons``; KV updates, always computed, are left out."""

    reasons: list[str]
    grid: list[list[int]]


class ErrorMessage(Message):
    """Something was refused or failed; the session is as it was."""

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
        ValueError: it is not msgpack, or not a message of the protocol; says in one line what is wrong.
    """
    if len(data) > MAX_MESSAGE:
        raise ValueError(f"a message of {len(data)} bytes: at most {MAX_MESSAGE} are read")
    try:
        fields = _msgpack.unpackb(
            data, max_array_len=64, max_map_len=8, max_str_len=64, max_bin_len=0, max_ext_len=0, strict_map_key=True
        )
    except Exception as error:  # msgpack raises a dozen kinds, RecursionError and UnicodeDecodeError among them
        raise ValueError(f"not msgpack of this protocol: {type(error).__name__}") from None
    try:
        return _CLIENT.validate_python(fields)
    except ValidationError as error:
        raise ValueError(
            "; ".join(f"{'.'.join(map(str, e['loc'])) or 'message'}: {e['msg']}" for e in error.errors())[:500]
        ) from None


def decision_grid(decisions: Sequence[Decision]) -> Decisions:
    """The denoising passes' decisions as a grid."""
    reasons: dict[str, int] = {}
    grid: dict[int, dict[int, int]] = {}
    for d in decisions:
        if d.role == "denoise":
            grid.setdefault(d.index, {})[d.block] = reasons.setdefault(d.reason, len(reasons))
    return Decisions(reasons=list(reasons), grid=[[row[b] for b in sorted(row)] for _, row in sorted(grid.items())])


class NewSession(BaseModel):
    """What to drive."""

    model_config = ConfigDict(extra="forbid")

    scenario: Annotated[str | None, Field(max_length=64, description="By default the first that there is.")] = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    policy: Annotated[str | None, Field(max_length=64, description="By default the first that there is.")] = None
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
    seconds: Annotated[float, Field(description="Of video so far.")]
    connected: bool
    parked: Annotated[bool, Field(description="On disk until it is wanted again.")]
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
