"""Peers: which library serves the clean pass from cache, and a card that says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

import holdover
from lab import peers
from lab.peers_models import SUBJECTS, Subject, drift

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast.*", "ignore:CPU Autocast.*")


@pytest.fixture(autouse=True)
def _only_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """cache-dit may be missing: `make peers` installs it."""
    monkeypatch.setattr(peers, "PEERS", {"diffusers": peers.PEERS["diffusers"]})


def test_who_serves_the_clean_pass_from_cache() -> None:
    """A rollout of Wan's blocks in which every pass looks like the one before: the promise is kept by one library."""
    assert peers.served(SUBJECTS[0], 2) == {"holdover": 0, "diffusers": peers.CHUNKS}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
@torch.no_grad()
def test_the_thresholds_mean_what_they_say(subject: Subject) -> None:
    for threshold, reused in ((peers.NEVER, 0), (peers.ALWAYS, 1)):
        model = subject.make(2)
        with holdover.attach(model, peers.fbcache(threshold=threshold)) as cache:
            for index, latents in zip(range(2), drift(), strict=False):
                with cache.step(chunk=0, index=index, num_steps=9):
                    model(**subject.inputs(latents, 500.0), return_dict=False)
        assert cache.stats().reused == reused


def test_the_card(tmp_path: Path) -> None:
    with Progress(disable=True) as progress:
        figures = peers.run_peers(tmp_path, passes=peers.WARM_UP + 1, blocks=2, progress=progress)
    card = (tmp_path / "peers.md").read_text()
    assert json.loads((tmp_path / "peers.json").read_text()) == figures
    assert len(figures["rows"]) == len(SUBJECTS) * 2 * 3
    assert all(row["ratio"] == 1 for row in figures["rows"] if row["library"] == "unattached")
    assert f"| diffusers | {peers.CHUNKS} of {peers.CHUNKS} |" in card
    with pytest.raises(ValueError, match="give more than the 5 of warm-up"), Progress(disable=True) as progress:
        peers.run_peers(tmp_path, passes=5, progress=progress)
