"""Checks the wheels in a folder: sizes, and which weights each one holds."""

from __future__ import annotations

import sys
from pathlib import Path
from zipfile import ZipFile

#: By package, the limit in MB.
LIMITS = {"holdover": 1, "holdover_world": 1, "holdover_world_weights": 90, "holdover_world_weights_teacher": 90}
MODEL = "holdover_world_weights/model"
WEIGHTS = "diffusion_pytorch_model.safetensors"
#: By package, the networks it holds. The student is whole: without its teacher a difference is of no use.
NETWORKS = {
    "holdover_world_weights": {f"{MODEL}/{name}/{WEIGHTS}" for name in ("student", "colour", "depth")},
    "holdover_world_weights_teacher": {f"{MODEL}/{WEIGHTS}"},
}


def main(folder: Path) -> None:
    wheels = {path.name.partition("-")[0]: path for path in sorted(folder.glob("*.whl"))}
    if wheels.keys() != LIMITS.keys():
        sys.exit(f"{folder} holds {', '.join(wheels)}, not {', '.join(LIMITS)}")
    for name, path in wheels.items():
        size = path.stat().st_size / 1e6
        print(f"{path.name}: {size:.2f} MB of {LIMITS[name]}")
        if size >= LIMITS[name]:
            sys.exit(f"{path} has {size:.2f} MB; the limit is {LIMITS[name]} MB")
        with ZipFile(path) as wheel:
            found = {file for file in wheel.namelist() if file.endswith(".safetensors")}
        if found != NETWORKS.get(name, set()):
            sys.exit(f"{path} holds the networks {sorted(found)}, not {sorted(NETWORKS.get(name, set()))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
