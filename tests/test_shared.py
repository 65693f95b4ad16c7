"""What several commands share: tables, whole files, photos, timing, twins."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from dynamicvit.errors import ImageError, UserError
from dynamicvit.models import ModelSpec, build_model
from dynamicvit.models.twins import dense_twin, twin
from dynamicvit.runs.tables import Column, Table
from dynamicvit.runs.whole import check_writable, whole_file, write_whole
from dynamicvit.tools import timing
from dynamicvit.tools.photos import batch_of, find_photos, read_photos

SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
SPEC = ModelSpec("deit_tiny", 0.6, num_classes=3, img_size=32, sizes=SIZES, pruning_loc=(1, 2))


def test_table() -> None:
    table = Table(
        {"model": Column("model", width=8), "ms": Column("ms", ".2f", 6), "kl": Column("KL divergence", ".3f")}
    )
    rows = [{"model": "dense", "ms": 3.14159, "kl": None, "hidden": 1}, {"model": "a longer name", "ms": 120}]
    assert table.heading() == "model        ms KL divergence"
    assert table.line(rows[0]) == "dense      3.14             -"
    assert table.line(rows[1]) == "a longer name 120.00             -"
    assert table.markdown(rows).splitlines() == [
        "| model | ms | KL divergence |",
        "| --- | ---: | ---: |",
        "| dense | 3.14 | - |",
        "| a longer name | 120.00 | - |",
    ]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    write_whole(path, "[1]")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("[1, ")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == [1] and list(tmp_path.iterdir()) == [path]
    with whole_file(path) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("[2]")
    assert path.read_text() == "[2]" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_said_before_any_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == []
    for path, reason in (
        (tmp_path, "not a file"),
        (Path("/dev/null"), "not a file"),
        (tmp_path / "none" / "x.json", "no such folder"),
        (Path("/proc/x.json"), "cannot write"),
    ):
        with pytest.raises(UserError, match=reason):
            check_writable(path)


def test_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    write_images(tmp_path / "cats", 3)
    (tmp_path / "cats" / "1.jpg").write_text("no image")
    found = find_photos(tmp_path)
    assert [path.name for path in found] == ["0.jpg", "1.jpg", "2.jpg"]
    assert find_photos(tmp_path, count=2) == found[:2] and find_photos(str(found[2])) == [found[2]]
    read = dict(read_photos(found))
    assert list(read) == [found[0], found[2]]
    assert capsys.readouterr().out.startswith(f"warning: cannot read image {found[1]}")
    with pytest.raises(ImageError):
        list(read_photos(found[1:2]))
    with pytest.raises(UserError, match="none of the 2 images"):
        list(read_photos([found[1], found[1]]))
    monkeypatch.chdir(tmp_path)
    for nothing in (tmp_path / "dogs", "", " "):
        with pytest.raises(UserError, match="no image, and no folder of images"):
            find_photos(nothing)

    config = {"input_size": (3, 16, 24), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 1.0}
    batch = batch_of(read.values(), config, count=5)
    assert batch.shape == (5, 3, 16, 24)
    assert torch.equal(batch[0], batch[2]) and not torch.equal(batch[0], batch[1]), "again from the first"


def test_measuring_takes_turns_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(timing.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def step(name: str, seconds: float) -> timing.Step:
        def run(images: torch.Tensor, labels: torch.Tensor) -> None:
            calls.append(name)
            clock[0] += seconds

        return run

    steps, images = {"dense": step("dense", 4.0), "fast": step("fast", 2.0)}, torch.zeros(1)
    seconds = timing.interleave(steps, images, images, rounds=30, steps_per_turn=2)
    assert [len(values) for values in seconds.values()] == [30, 30]
    assert timing.times_as_fast(seconds, "fast") == 2
    assert calls[:8] == ["fast", "fast", "dense", "dense", "dense", "dense", "fast", "fast"], "there and back"
    seconds = timing.interleave(steps, images, images, rounds=30, seconds_at_most=50)
    assert len(seconds["dense"]) == 9, "the round in which the time is up is finished"
    seconds = timing.interleave(steps, images, images, rounds=30, seconds_at_most=0)
    assert len(seconds["dense"]) == timing.FEWEST_ROUNDS


def test_ratio_is_taken_within_a_round() -> None:
    # the machine was three times slower from the second round on, and hit the dense model alone at first
    seconds = {"dense": np.array([2.0, 6.0, 6.0]), "dynamic": np.array([1.0, 1.0, 3.0])}
    assert timing.times_as_fast(seconds, "dynamic") == 2


@pytest.mark.parametrize("share", [False, True])
def test_twins_have_the_same_weights(share: bool) -> None:
    model = build_model(SPEC).train()
    images = torch.randn(2, 3, 32, 32)
    dense, merged = dense_twin(model, share), twin(model, replace(SPEC, scorer="attention", reducer="merge"), share)
    assert dense.spec.dense and not dense.training and model.training
    with torch.no_grad():
        model.eval().set_keep_rates([1.0, 1.0])
        merged.set_keep_rates([1.0, 1.0])
        expected = model(images)
        torch.testing.assert_close(dense(images), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(merged(images), expected, atol=1e-5, rtol=1e-4)
        model.head.weight.zero_()
        assert torch.allclose(dense(images), expected, atol=1e-5) is not share, (
            "a change of the model's weights is the twin's, too"
        )
