"""Models in folders and on the hub: what comes back, and what is refused."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from conftest import ONE_THREAD, ROOT
from dynamicvit.models import (
    CheckpointError,
    create_model,
    from_pretrained,
    looks_like_saved,
    make_dynamic,
    save_pretrained,
)
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
TINY = SIZES | {"img_size": 32, "num_classes": 5, "pruning_loc": (1, 2)}
SPATIAL = {"depths": (1, 1, 3, 1), "img_size": 64, "num_classes": 5, "pruning_loc": (1, 2), "keep_rates": (0.7, 0.5)}
NAMES = ["ant", "bee", "cat", "dog", "elk"]


def tiny_timm(name: str, **options) -> torch.nn.Module:
    return timm.create_model(name, img_size=28 if "patch14" in name else 32, num_classes=5, **options)


FAMILIES = {
    "deit": lambda: create_model("deit_tiny", **TINY),
    "deit, dense": lambda: create_model("deit_tiny", dense=True, **TINY),
    "deit, not square": lambda: create_model("deit_tiny", **TINY | {"img_size": (32, 48)}),
    "deit, embedding": lambda: create_model("deit_tiny", **TINY | {"num_classes": 0}),
    "lvvit": lambda: create_model("lvvit_s", **TINY),
    "swin": lambda: create_model("swin_t", embed_dim=24, **SPATIAL),
    "convnext": lambda: create_model("convnext_t", embed_dim=8, **SPATIAL),
    "timm convnext": lambda: make_dynamic(timm.create_model("test_convnext"), (1,), (0.5,)),
    "eva": lambda: make_dynamic(tiny_timm("eva02_tiny_patch14_224"), (3, 6), (0.7, 0.5), "attention", "merge"),
    "timm swin": lambda: create_model("swin_tiny_patch4_window7_224", window_size=2, **SPATIAL | {"depths": None}),
    "timm": lambda: make_dynamic(tiny_timm("vit_tiny_patch16_224.augreg_in21k"), (3, 6), (0.7, 0.5)),
    "timm, dense": lambda: tiny_timm("test_vit"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_comes_back(tmp_path: Path, family: str) -> None:
    model = FAMILIES[family]()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value))
    save_pretrained(model, tmp_path / "fast")
    loaded = from_pretrained(tmp_path / "fast")
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    images = torch.randn(2, *loaded.data_config["input_size"])
    assert torch.equal(loaded(images), model.eval()(images))


def test_names_notes_and_preprocessing(tmp_path: Path) -> None:
    model = make_dynamic(tiny_timm("vit_tiny_patch16_224.augreg_in21k"), (3,), (0.7,))
    save_pretrained(model, tmp_path, class_names=NAMES, recipe="none")
    loaded = from_pretrained(tmp_path)
    assert loaded.class_names == tuple(NAMES)
    # the numbers that timm gives for these weights
    assert loaded.data_config == {
        "input_size": (3, 32, 32),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
    }
    assert timm.data.create_transform(**loaded.data_config)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["notes"] == {"recipe": "none"}
    save_pretrained(loaded, tmp_path)  # over itself, with what was read
    assert from_pretrained(tmp_path).class_names == tuple(NAMES)


def test_keep_rates_are_those_of_the_moment(tmp_path: Path) -> None:
    model = create_model("deit_tiny", **TINY)
    model.set_keep_rates((0.9, 0.4))
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path).keep_rates == (0.9, 0.4)


@pytest.mark.parametrize(
    "changed",
    [
        lambda: tiny_timm("vit_tiny_patch16_224", embed_dim=96),  # other shapes
        lambda: tiny_timm("vit_tiny_patch16_224", num_heads=6),  # the same shapes
        lambda: tiny_timm("vit_tiny_patch16_224", global_pool="avg", fc_norm=False),
        lambda: torch.nn.Linear(2, 2),
    ],
)
def test_a_model_that_could_not_be_built_again_is_not_saved(tmp_path: Path, changed) -> None:
    with pytest.raises(CheckpointError):
        save_pretrained(changed(), tmp_path / "fast")
    assert not (tmp_path / "fast").exists()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_pretrained(create_model("deit_tiny", **TINY), tmp_path / "fast", class_names=NAMES)
    return tmp_path / "fast"


def refusal(folder: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 600
    return message


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"evil": 1}, "no field 'evil'"),
        ({"arch": "../../weights"}, "not the name of an architecture"),
        ({"arch": "hf-hub:user/model"}, "not the name of an architecture"),
        ({"arch": "local-dir"}, "unknown arch"),
        ({"arch": ["deit_tiny"]}, "not the name of an architecture"),
        ({"num_classes": 10**400}, "at most 1000000"),
        ({"num_classes": 10**6, "class_names": None}, "does not fit"),
        ({"num_classes": "5"}, "whole number"),
        ({"num_classes": 5.5}, "whole number"),
        ({"img_size": 8192}, "pos_embed"),
        ({"img_size": [32, 32, 32]}, "height, width"),
        ({"sizes": SIZES | {"run": "rm"}}, "no size called 'run'"),
        ({"sizes": {"embed_dim": 16384, "depth": 16, "num_heads": 16}}, "does not fit"),
        ({"sizes": {"depth": [256] * 100_000}}, "four numbers"),
        ({"pruning_loc": "abc"}, ""),
        ({"pruning_loc": [0] * 100_000}, ""),
        ({"keep_rates": [None] * 2}, ""),
        ({"keep_rates": [float("nan")] * 2}, "keep rates"),
        ({"base_rate": "0.7"}, "keep rates"),
        ({"preprocessing": {"mean": "abc"}}, ""),
        ({"preprocessing": {"std": [0, 1, 1]}}, "preprocessing"),
        ({"preprocessing": {"crop_pct": 1e-9}}, "preprocessing"),
        ({"preprocessing": {"interpolation": "os.system"}}, "preprocessing"),
        ({"class_names": ["a"]}, "1 class names for 5"),
        ({"class_names": ["\x1b[2J"] * 5}, "printed"),
        ({"class_names": "abcde"}, "class names"),
        # position tables that are not in the file, of thousands of GiB
        ({"arch": "beit_base_patch16_224", "img_size": 8192, "sizes": {}, "dense": True}, "GiB of tables"),
    ],
)
def test_hostile_description(saved: Path, change: dict, reason: str) -> None:
    path = saved / "config.json"
    content = json.loads(path.read_text())
    content["model"] |= change
    path.write_text(json.dumps(content))
    assert reason in refusal(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"model": {}}', '{"model": 1, "sha256": ""}'])
def test_description_that_is_none(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    assert "does not describe a model" in refusal(saved)


def test_half_written_folders(saved: Path) -> None:
    """Writing ends with config.json; before that there are either no two files, or two of different savings."""
    old_config = (saved / "config.json").read_text()
    save_pretrained(create_model("deit_tiny", **TINY), saved)
    (saved / "config.json").write_text(old_config)  # as if killed between the two
    assert "is not the one that config.json was written for" in refusal(saved)
    (saved / "config.json").unlink()
    assert looks_like_saved(saved)
    assert "no config.json" in refusal(saved)
    (saved / "config.json").write_text(old_config)
    (saved / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(saved)


def test_damaged_weights(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "damaged" in refusal(saved)
    path.write_bytes(content[: len(content) // 2])
    assert "damaged" in refusal(saved)


def test_weights_of_another_model(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["head.bias"] = torch.zeros(7)
    save_file(weights, saved / "model.safetensors")
    assert "head.bias is (7,) in the file and (5,) in the model" in refusal(saved)


def test_nothing_is_left_of_a_saving_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        save_pretrained(create_model("deit_tiny", **TINY), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "fast").write_text("")
    with pytest.raises(CheckpointError, match="cannot save"):
        save_pretrained(create_model("deit_tiny", **TINY), tmp_path / "fast")


def test_no_such_folder(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "none")
    assert not looks_like_saved(tmp_path / "none")
    assert not looks_like_saved(tmp_path)


class Hub(SimpleHTTPRequestHandler):
    """Serves DIRECTORY/user/name as the Hugging Face hub serves the main branch of a repository."""

    protocol_version = "HTTP/1.1"

    def send_head(self):
        self.path = self.path.replace("/resolve/main/", "/")
        return super().send_head()

    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("ETag", f'"{path.name}"')
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a local hub that has the model user/fast."""
    save_pretrained(create_model("deit_tiny", **TINY), tmp_path / "hub" / "user" / "fast", class_names=NAMES)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "hub")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_from_the_hub(hub: str, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = image_folder / "val" / "cats" / "0.jpg"
    env = ONE_THREAD | {"HF_ENDPOINT": hub, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "tools.predict", "user/fast", str(photo)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert {line.split()[-1] for line in result.stdout.splitlines()[1:]} == set(NAMES)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert from_pretrained("user/fast").class_names == tuple(NAMES)  # from the cache


def test_no_network_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert refusal("user/fast").startswith("no folder user/fast")


def test_whoever_may_read_one_file_may_read_the_other(tmp_path: Path) -> None:
    save_pretrained(create_model("deit_tiny", **TINY), tmp_path)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1)
    with pytest.raises(CheckpointError, match=r"in_chans.* only its name, its classes and its image size are saved"):
        save_pretrained(model, tmp_path)
