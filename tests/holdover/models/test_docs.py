"""The examples of the README and of docs/own-model.md run as they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import holdover
from tests.holdover.engine.models import Scale, Stack
from tests.holdover.models import causal_wan, contracts, pipelines, rollouts

ROOT = Path(__file__).parents[3]


def example(page: str, heading: str) -> str:
    """The first block of Python under a heading."""
    text = (ROOT / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    found = re.search(r"```python\n(.*?)```", text, re.S)
    assert found is not None
    return found[1]


@pytest.fixture
def tiny_wan(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Wan pipeline whose weights need no download, and which makes small videos."""
    diffusers = pytest.importorskip("diffusers", reason="needs the extra: pip install 'holdover[diffusers]'")
    pytest.importorskip("transformers", reason="needs the extra: pip install 'holdover[diffusers]'")

    class TinyWan(diffusers.WanPipeline):
        def __call__(self, prompt: str) -> Any:
            more = {"num_frames": 9, "num_inference_steps": 6, "max_sequence_length": 5, "output_type": "latent"}
            generator = torch.Generator().manual_seed(0)
            return super().__call__(prompt, height=64, width=96, generator=generator, **more)

    pipe = pipelines.wan(kind=TinyWan)
    monkeypatch.setattr(diffusers.WanPipeline, "from_pretrained", lambda name: pipe)
    return pipe


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "A pipeline"), ("docs/own-model.md", "Pipelines of diffusers")]
)
def test_the_example_with_a_pipeline(
    page: str, heading: str, tiny_wan: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tiny_wan("a car turns left").frames
    names: dict[str, Any] = {"pipe": tiny_wan}
    exec(example(page, heading), names)
    assert names["video"].shape == expected.shape
    assert names["enabled"].cache.stats().computed > 0
    assert "skipped" in capsys.readouterr().out
    names["enabled"].disable()
    assert torch.equal(tiny_wan("a car turns left").frames, expected)


def test_the_example_with_a_pipeline_of_the_self_forcing_family(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = rollouts.FewSteps(contracts.contract("Self-Forcing"))
    noise, prompts = torch.randn(1, 8, 3, 2, 3, generator=torch.Generator().manual_seed(0)), ["rain", "rain"]
    names: dict[str, Any] = {"holdover": holdover, "pipeline": pipeline, "noise": noise, "prompts": prompts}
    with torch.no_grad():
        exec(example("docs/own-model.md", "Pipelines of the Self-Forcing family"), names)
    assert names["video"].shape == noise.shape
    assert names["enabled"].cache.stats().reused > 0
    assert "skipped" in capsys.readouterr().out


#: Two cycles of four chunks, two steps each.
CHUNKS, SIGMAS = 8, (1.0, 0.5)


def names_for(model: nn.Module, noise: Tensor) -> dict[str, Any]:
    """What the examples of a closed loop take from the text around them."""
    return {
        "holdover": holdover,
        "model": model,
        "actions": [(0.5, 0.0)] * CHUNKS,
        "sigmas": SIGMAS,
        "noise": [noise] * 2,
    }


def test_the_example_of_the_own_model_page(capsys: pytest.CaptureFixture[str]) -> None:
    contract = contracts.CONTRACTS[0]
    model, state = contract.model(), contract.state()
    noise = torch.randn(1, causal_wan.CHANNELS, causal_wan.CHUNK, causal_wan.ROWS, causal_wan.COLUMNS)
    names = {
        **names_for(model, noise),
        "slots": [holdover.Slot(f"blocks.{n}", hidden="x", writes_kv=True) for n in range(4)],
        "predict": lambda latents, sigma, action: contract.run(model, latents, sigma, 0, state),
        "write_kv": lambda committed: contract.run(model, committed, 0.0, 0, state, clean=True),
    }
    exec(example("docs/own-model.md", "3. Say where each pass stands"), names)
    assert names["cache"].stats().reused == 2 * 3 * 3 * 2  # cycles, chunks, blocks but the anchor, steps
    assert "reasons" in capsys.readouterr().out


class Written(Stack):
    """Notes what its KV update writes."""

    def __init__(self) -> None:
        super().__init__(Scale(), Scale())
        self.written: list[Tensor] = []

    def write_kv(self, latents: Tensor) -> None:
        self(latents)
        self.written.append(latents)


def test_the_example_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    model, made = Written(), []

    def denoise(model: nn.Module, latents: Tensor, sigma: float, action: tuple[float, float]) -> Tensor:
        made.append(model(latents) / 8 + len(made))
        return made[-1]

    names = {**names_for(model, torch.ones(1, 2, 3)), "prompt": "a road", "denoise": denoise}
    exec(example("README.md", "Your own model"), names)
    last = [made[chunk * len(SIGMAS) + len(SIGMAS) - 1] for chunk in range(CHUNKS)]
    assert len(model.written) == 2
    assert all(map(torch.equal, model.written, (last[0], last[4])))  # of the chunk that was announced as committed
    assert names["cache"].stats().reused > 0
    assert "skipped" in capsys.readouterr().out
