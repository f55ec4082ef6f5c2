"""Rendering of the seven cameras with Panda3D: one off-screen buffer, read back once in colour and once in depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdover_world.scene.cameras import RIG, Camera
from holdover_world.scene.palette import FOG, HORIZON, ZENITH
from holdover_world.scene.vehicles import EgoState
from holdover_world.simulator.meshes import CAR_COLOURS, Mesh
from holdover_world.simulator.textures import textures

try:
    p3d: Any = import_module("panda3d.core")  # has no types, and is optional
except ImportError as error:
    raise ImportError("recording and simulating need Panda3D and an OpenGL driver: run `make simulator`") from error

#: Depth where nothing was drawn, in metres.
SKY_DEPTH = 655.35

_NEAR, _FAR = 0.5, 600.0
_SUPERSAMPLING = 2

p3d.loadPrcFileData(
    "holdover",
    "load-display p3headlessgl\naudio-library-name null\nnotify-level-display fatal\ntextures-power-2 none\n"
    "notify-level-egldisplay fatal\nsync-video false\n",
)


@dataclass(frozen=True)
class CarPose:
    """Where to draw a car (its middle in metres, its heading in radians), and which model of car."""

    x: float
    y: float
    yaw: float
    colour: int
    van: bool


class Renderer:
    """Draws a scene and its cars as the rig on the ego sees them.

    One renderer can draw any number of scenes, one after another.
    """

    def __init__(self, rig: Sequence[Camera] = RIG) -> None:
        self.rig = tuple(rig)
        self._places, width, height = _lay_out(self.rig)
        self._engine = p3d.GraphicsEngine.getGlobalPtr()
        self._buffer = self._open_buffer(width * _SUPERSAMPLING, height * _SUPERSAMPLING)
        self._colour, self._depth = p3d.Texture(), p3d.Texture()
        self._buffer.addRenderTexture(self._colour, p3d.GraphicsOutput.RTMCopyRam, p3d.GraphicsOutput.RTPColor)
        self._depth.setFormat(p3d.Texture.FDepthComponent)
        self._depth.setComponentType(p3d.Texture.TFloat)
        self._buffer.addRenderTexture(self._depth, p3d.GraphicsOutput.RTMCopyRam, p3d.GraphicsOutput.RTPDepth)
        self._textures = {name: _upload(name, image) for name, image in textures().items()}
        self._root = p3d.NodePath("world")
        self._ego = self._root.attachNewNode("ego")
        self._sky = self._ego.attachNewNode(_sky())
        self._sky.setBin("background", 0)
        self._sky.setDepthWrite(False)
        self._sky.setDepthTest(False)
        self._scene = self._root.attachNewNode("scene")
        self._scene.setFog(_fog())
        self._models = [
            (_model(colour, van), colour, van) for colour in range(len(CAR_COLOURS)) for van in (False, True)
        ]
        self._cars: list[Any] = []
        for camera, (left, top) in zip(self.rig, self._places, strict=True):
            self._add_camera(camera, left / width, 1 - (top + camera.height) / height, width, height)

    def load(self, mesh: Mesh, cars: Iterable[CarPose]) -> None:
        """Replace the scene: its fixed geometry, and which cars there are (in the order of later poses)."""
        self._scene.getChildren().detach()
        for order, ((material, _, _), quads) in enumerate(sorted(mesh.parts.items())):
            node = self._scene.attachNewNode(_geometry(np.stack(quads)))
            # Panda3D would order by memory address, and where two faces meet, the first one drawn gets the pixel.
            node.setBin("fixed", order)
            if material in self._textures:
                node.setTexture(self._textures[material])
        models = {(colour, van): model for model, colour, van in self._models}
        self._cars = []
        for order, car in enumerate(cars, start=len(mesh.parts)):
            node = self._scene.attachNewNode("car")
            node.setBin("fixed", order)
            models[car.colour, car.van].instanceTo(node)
            self._cars.append(node)

    def render(
        self, ego: EgoState, cars: Iterable[CarPose]
    ) -> tuple[dict[str, NDArray[np.uint8]], dict[str, NDArray[np.float32]]]:
        """Draw one instant.

        Returns:
            Per camera colour, uint8 ``[height, width, 3]``, and depth, float32 ``[height, width]``: metres along the
            viewing axis of the camera (not along the ray), the nearest sample of each pixel, ``SKY_DEPTH`` for the sky.
        """
        self._ego.setPosHpr(ego.x, ego.y, 0.0, math.degrees(ego.yaw), 0.0, 0.0)
        for node, car in zip(self._cars, cars, strict=True):
            node.setPosHpr(car.x, car.y, 0.0, math.degrees(car.yaw), 0.0, 0.0)
        self._engine.renderFrame()
        return self._split(self._read_colour()), self._split(self._read_depth())

    def close(self) -> None:
        """Free the buffer."""
        self._engine.removeWindow(self._buffer)

    def _open_buffer(self, width: int, height: int) -> Any:
        wanted = p3d.FrameBufferProperties()
        wanted.setRgbaBits(8, 8, 8, 0)
        wanted.setDepthBits(24)
        pipe = p3d.GraphicsPipeSelection.getGlobalPtr().makeDefaultPipe()
        size = p3d.WindowProperties.size(width, height)
        flags = p3d.GraphicsPipe.BFRefuseWindow
        buffer = pipe and self._engine.makeOutput(pipe, "rig", 0, wanted, size, flags)
        if not buffer:
            raise RuntimeError("no OpenGL driver that renders off-screen was found: run `make simulator`")
        buffer.setClearColor((*HORIZON, 1.0))
        return buffer

    def _add_camera(self, camera: Camera, left: float, bottom: float, width: int, height: int) -> None:
        lens = p3d.PerspectiveLens()
        lens.setAspectRatio(camera.width / camera.height)
        lens.setFov(camera.fov)
        lens.setNearFar(_NEAR, _FAR)
        node = self._ego.attachNewNode(p3d.Camera(camera.name, lens))
        node.setPos(*camera.position)
        node.setHpr(camera.yaw - 90.0, -camera.pitch, 0.0)  # Panda3D's cameras look along +y
        region = self._buffer.makeDisplayRegion(
            left, left + camera.width / width, bottom, bottom + camera.height / height
        )
        region.setCamera(node)

    def _read_colour(self) -> NDArray[np.uint8]:
        height, width = self._buffer.getYSize(), self._buffer.getXSize()
        raw = np.frombuffer(self._colour.getRamImage(), dtype=np.uint8).reshape(height, width, -1)
        image = raw[::-1, :, 2::-1]  # Panda3D stores BGR, last row first
        # Summed in uint16: four bytes need ten bits.
        rows = image[0::2].astype(np.uint16) + image[1::2]
        mean: NDArray[np.uint8] = ((rows[:, 0::2] + rows[:, 1::2] + 2) // 4).astype(np.uint8)
        return mean

    def _read_depth(self) -> NDArray[np.float32]:
        height, width = self._buffer.getYSize(), self._buffer.getXSize()
        raw = np.frombuffer(self._depth.getRamImage(), dtype=np.float32).reshape(height, width)[::-1]
        rows = np.minimum(raw[0::2], raw[1::2])
        nearest = np.minimum(rows[:, 0::2], rows[:, 1::2])
        metres = _NEAR * _FAR / (_FAR - nearest * np.float32(_FAR - _NEAR))
        return np.where(nearest >= 1.0, np.float32(SKY_DEPTH), metres).astype(np.float32)

    def _split(self, canvas: NDArray[Any]) -> dict[str, NDArray[Any]]:
        return {
            camera.name: canvas[top : top + camera.height, left : left + camera.width].copy()
            for camera, (left, top) in zip(self.rig, self._places, strict=True)
        }


def _lay_out(rig: Sequence[Camera]) -> tuple[list[tuple[int, int]], int, int]:
    """Stack the groups of a rig as rows: left and top pixel of each camera, width and height of the canvas."""
    rows: dict[str, list[Camera]] = {}
    for camera in rig:
        rows.setdefault(camera.group, []).append(camera)
    place: dict[str, tuple[int, int]] = {}
    top = 0
    for row in rows.values():
        left = 0
        for camera in row:
            place[camera.name] = left, top
            left += camera.width
        top += max(camera.height for camera in row)
    return [place[camera.name] for camera in rig], max(sum(c.width for c in row) for row in rows.values()), top


def _geometry(quads: NDArray[np.float64]) -> Any:
    """Upload quads ``[N, 4, 8]`` (position, texture coordinates, colour) as one node."""
    layout = p3d.GeomVertexArrayFormat()
    layout.addColumn("vertex", 3, p3d.Geom.NTFloat32, p3d.Geom.CPoint)
    layout.addColumn("texcoord", 2, p3d.Geom.NTFloat32, p3d.Geom.CTexcoord)
    layout.addColumn("color", 4, p3d.Geom.NTUint8, p3d.Geom.CColor)
    vertices = np.zeros(len(quads) * 4, dtype=[("xyzuv", "<f4", 5), ("rgba", "u1", 4)])
    flat = quads.reshape(-1, 8)
    vertices["xyzuv"] = flat[:, :5]
    vertices["rgba"] = np.rint(np.concatenate([flat[:, 5:], np.ones((len(flat), 1))], axis=1) * 255)
    data = p3d.GeomVertexData(
        "quads", p3d.GeomVertexFormat.registerFormat(p3d.GeomVertexFormat(layout)), p3d.Geom.UHStatic
    )
    data.uncleanSetNumRows(len(vertices))
    memoryview(data.modifyArray(0)).cast("B")[:] = vertices.tobytes()
    first = np.arange(len(quads), dtype=np.uint32)[:, None] * 4
    indices = first + np.array([0, 1, 2, 0, 2, 3], dtype=np.uint32)
    repeated = (quads[:, 2, :3] == quads[:, 3, :3]).all(axis=1)
    indices = np.concatenate([indices[~repeated].ravel(), indices[repeated, :3].ravel()]).astype(np.uint32)
    triangles = p3d.GeomTriangles(p3d.Geom.UHStatic)
    triangles.setIndexType(p3d.Geom.NTUint32)
    index_array = triangles.modifyVertices()
    index_array.uncleanSetNumRows(indices.size)
    memoryview(index_array).cast("B")[:] = indices.tobytes()
    geometry = p3d.Geom(data)
    geometry.addPrimitive(triangles)
    node = p3d.GeomNode("quads")
    node.addGeom(geometry)
    return node


def _upload(name: str, image: NDArray[np.uint8]) -> Any:
    texture = p3d.Texture(name)
    texture.setup2dTexture(image.shape[1], image.shape[0], p3d.Texture.TUnsignedByte, p3d.Texture.FRgb)
    texture.setRamImage(np.ascontiguousarray(image[::-1, :, ::-1]).tobytes())
    texture.setMinfilter(p3d.SamplerState.FTLinearMipmapLinear)
    texture.setMagfilter(p3d.SamplerState.FTLinear)
    texture.setWrapU(p3d.SamplerState.WMRepeat)
    texture.setWrapV(p3d.SamplerState.WMRepeat)
    texture.setAnisotropicDegree(1)
    return texture


def _model(colour: int, van: bool) -> Any:
    mesh = Mesh()
    mesh.car(0.0, 0.0, 0.0, CAR_COLOURS[colour], van=van)
    node = p3d.NodePath("model")
    # The car lies across four squares of the map, which do not matter for a model.
    node.attachNewNode(_geometry(np.concatenate([np.stack(quads) for quads in mesh.parts.values()])))
    return node


def _sky() -> Any:
    """A dome around the ego, from the horizon's colour to the zenith's."""
    mesh = Mesh()
    angles = np.linspace(0.0, 2 * np.pi, 17)
    heights = np.radians([-8.0, 0.0, 12.0, 30.0, 60.0, 90.0])
    blend = np.clip(np.sin(np.maximum(heights, 0.0)) ** 0.7, 0.0, 1.0)[:, None]
    colours = np.array(HORIZON) * (1 - blend) + np.array(ZENITH) * blend
    for i in range(16):
        for j in range(5):
            corners = [(i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j)]
            points = [
                (
                    math.cos(angles[a]) * math.cos(heights[h]),
                    math.sin(angles[a]) * math.cos(heights[h]),
                    math.sin(heights[h]),
                )
                for a, h in corners
            ]
            mesh.quad("sky", 100.0 * np.array(points))
            for (_, h), vertex in zip(corners, mesh.parts[next(reversed(mesh.parts))][-1], strict=True):
                vertex[5:8] = colours[h]
    quads = np.concatenate([np.stack(part) for part in mesh.parts.values()])
    # Both orders of the corners, because the dome is seen from inside.
    return _geometry(np.concatenate([quads, quads[:, ::-1]]))


def _fog() -> Any:
    fog = p3d.Fog("haze")
    fog.setColor(*HORIZON)
    fog.setLinearRange(*FOG)
    return fog
