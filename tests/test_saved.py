"""Models in folders and on the hub: what comes back, and what is refused."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ONE_THREAD, ROOT
from dynamicvit.errors import UserError
from dynamicvit.models import (
    SCORERS,
    CheckpointError,
    ModelSpec,
    Scorer,
    Scores,
    create_model,
    from_pretrained,
    load_weights,
    looks_like_saved,
    make_dynamic,
    push_to_hub,
    save_pretrained,
)
from dynamicvit.models.card import model_card
from dynamicvit.tools.dense import Own, find_dense
from dynamicvit.tools.splits import is_image
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

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
        "crop_mode": "center",
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
    """config.json is written last; before that one of the two files is missing, or they are of different saves."""
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
    with pytest.raises(CheckpointError, match=r"in_chan.* only its name, its classes and its image size are saved"):
        save_pretrained(model, tmp_path)


# --- Descriptions that come back


def test_numbers_of_numpy_and_of_tensors_come_back(tmp_path: Path) -> None:
    labels = np.array([0, 4, 2])
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=labels.max() + 1)
    model = make_dynamic(backbone, np.array([1, 2]), np.array([0.7, 0.5], dtype=np.float32), "distinct", "merge")
    save_pretrained(model, tmp_path, accuracy=np.float32(0.5), kl=torch.tensor(0.25), seen=(np.int64(3), [labels]))
    spec = from_pretrained(tmp_path).spec
    assert (spec.num_classes, spec.pruning_loc) == (5, (1, 2)) and spec.keep_rates == pytest.approx((0.7, 0.5))
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["notes"] == {"accuracy": 0.5, "kl": 0.25, "seen": [3, [[0, 4, 2]]]}


def test_a_note_of_another_kind_is_refused_and_the_folder_left_as_it_was(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(CheckpointError, match="notes are strings, numbers"):
        save_pretrained(create_model("deit_tiny", **TINY), saved, extra=object())
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_without_numbers_is_not_saved(value: float, tmp_path: Path) -> None:
    model = create_model("deit_tiny", **TINY)
    with pytest.raises(CheckpointError, match="the name of the folder to save the model in is empty"):
        save_pretrained(model, "")
    torch.nn.init.constant_(model.norm.bias, value)
    with pytest.raises(CheckpointError, match=r"norm\.bias holds NaN"):
        save_pretrained(model, tmp_path / "fast")
    assert not (tmp_path / "fast").exists()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_what_only_training_uses_does_not_prevent_saving(name: str, tmp_path: Path) -> None:
    rates = {"drop_path_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    model = make_dynamic(tiny_timm(name, **rates), (2,), (0.7,), "distinct", "merge").eval()
    save_pretrained(model, tmp_path)
    images = torch.randn(1, *model.data_config["input_size"])
    assert torch.equal(from_pretrained(tmp_path)(images), model(images))


class Longest(Scorer):
    name = "longest"

    def __call__(self, look, module) -> Scores:
        return Scores(look.tokens.norm(dim=-1))


def test_a_scorer_of_ones_own_is_saved_and_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = make_dynamic(tiny_timm("vit_tiny_patch16_224"), (3,), (0.7,), Longest(), "merge").eval()
    save_pretrained(model, tmp_path)
    assert "SCORERS['longest'] = " in caplog.text
    del SCORERS["longest"]  # as in another process
    assert "needs the scorer longest" in refusal(tmp_path)
    SCORERS["longest"] = Longest()
    try:
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(from_pretrained(tmp_path)(images), model(images))
    finally:
        del SCORERS["longest"]


def test_a_card_tells_what_it_is_and_how_to_use_it(tmp_path: Path) -> None:
    model = make_dynamic(tiny_timm("vit_tiny_patch16_224.augreg_in21k_ft_in1k"), (3,), (0.7,), "distinct", "merge")
    save_pretrained(model, tmp_path / "fast", class_names=NAMES, agreement=0.98, hardware="one | core")
    card = (tmp_path / "fast" / "README.md").read_text()
    header = card.split("---")[1]
    assert "base_model: timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k\n" in header
    assert "license: apache-2.0\n" in header and "library_name: dynamicvit\n" in header
    own = model_card(ModelSpec("vit_tiny_patch16_224", num_classes=5, img_size=32, dense=True), "fast", {})
    assert "base_model" not in own and "license" not in own  # it is unknown whose weights they are
    assert "| agreement | 0.98 |" in card and "| hardware | one / core |" in card
    assert "merges patches" in card and "Before blocks 3 it keeps" in card
    code = card.split("```python\n")[1].split("```")[0]
    image = Image.new("RGB", (40, 30))
    scope = {"image": image}
    exec(code.replace('"fast"', repr(str(tmp_path / "fast"))), scope)
    assert scope["logits"].shape == (1, 5)
    inside = make_dynamic(tiny_timm("vit_tiny_patch16_224"), (3,), (0.7,), "distinct", "merge_length", place="inside")
    save_pretrained(inside, tmp_path / "fast", measured={"kl": 0.017477466, "images": 40})
    card = (tmp_path / "fast" / "README.md").read_text()
    assert "merges patches" in card and "Inside blocks 3 it keeps" in card
    assert "| measured: kl | 0.01748 |" in card and "| measured: images | 40 |" in card
    (tmp_path / "fast" / "README.md").write_text("mine")
    save_pretrained(model, tmp_path / "fast")
    assert (tmp_path / "fast" / "README.md").read_text() == "mine"


# --- The hub


@pytest.fixture
def local_hub(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the local hub serves, which this process takes for the hub."""
    take_for_the_hub(hub, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return tmp_path / "hub"


def take_for_the_hub(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    for module in (constants, file_download):  # the latter has a copy of its own before 1.0
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    forget_session()


def forget_session() -> None:
    """Drops the session that an earlier test has made without a network: huggingface_hub before 1.0 keeps it."""
    getattr(_http, "reset_sessions", lambda: None)()


@pytest.mark.parametrize("name", ["user/fast", "hf-hub:user/fast", "hf-hub:user/fast@main"])
def test_names_on_the_hub(name: str, local_hub: Path) -> None:
    assert from_pretrained(name).class_names == tuple(NAMES)
    assert load_weights(create_model("deit_tiny", **TINY), name) == []


def test_transformers_models_of_the_hub(local_hub: Path, tmp_path: Path) -> None:
    """The dense one that accelerate takes, and the dynamic one."""
    tiny_transformers().save_pretrained(local_hub / "user" / "dense")
    dense, notes = find_dense("user/dense", Own())
    assert dense.spec.num_classes == 5 and "without a readable preprocessor_config.json" in notes[0]
    model = make_dynamic(dense, (1, 3), (0.75, 0.5), "predictor", "merge")
    save_pretrained(model, local_hub / "user" / "dynamic", NAMES)
    loaded = from_pretrained("user/dynamic")
    assert (loaded.pruning_loc, loaded.class_names) == ((1, 3), tuple(NAMES))
    assert find_dense("user/dynamic", Own())[1] == []  # it has the file
    assert "base_model: user/dense" in (local_hub / "user" / "dynamic" / "README.md").read_text()


def test_timm_models_of_the_hub(local_hub: Path) -> None:
    model = tiny_timm("vit_tiny_patch16_224.augreg_in21k").eval()
    push = {"model_args": {"img_size": 32}}
    save_for_hf(model, local_hub / "user" / "timm", push, safe_serialization=True)
    loaded = from_pretrained("hf-hub:user/timm")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert loaded.spec.dense and loaded.data_config["mean"] == (0.5, 0.5, 0.5)


def test_models_of_transformers_are_named(saved: Path) -> None:
    (saved / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    assert "transformers" in refusal(saved)


def test_files_are_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("logs/typo.pth") == "no such file: logs/typo.pth"


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    asked = []
    monkeypatch.setattr(time, "sleep", asked.append)  # what huggingface_hub does between its tries
    take_for_the_hub(address, monkeypatch)  # nobody listens there now
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "cannot be reached" in refusal("user/fast")
    assert not asked and not constants.HF_HUB_OFFLINE


class Uploads(BaseHTTPRequestHandler):
    """As much of the hub as takes a commit of small files."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        if self.path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": "https://huggingface.co/user/mine/commit/1", "commitOid": "1", "success": True}
        else:
            answer = {"url": "https://huggingface.co/user/mine", "errors": [], "warnings": []}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def uploaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """What a hub on this machine has been sent, by file name."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Uploads)
    server.files, server.asked = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    forget_session()
    yield server.files
    server.shutdown()
    server.server_close()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("as_folder", [False, True])
def test_publishing_uploads_three_files(as_folder: bool, tmp_path: Path, uploaded: dict[str, bytes]) -> None:
    model = create_model("deit_tiny", **TINY)
    save_pretrained(model, tmp_path / "fast", agreement=0.98)
    (tmp_path / "fast" / "report.html").write_text("my photos")
    given = {} if as_folder else {"agreement": 0.98}
    push_to_hub(tmp_path / "fast" if as_folder else model, "user/mine", token="hf_none", **given)
    assert sorted(uploaded) == ["README.md", "config.json", "model.safetensors"]
    card = uploaded["README.md"].decode()
    assert 'from_pretrained("user/mine")' in card and "| agreement | 0.98 |" in card
    assert torch.equal(from_pretrained(write_files(tmp_path / "there", uploaded)).norm.bias, model.norm.bias)


def tiny_transformers() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=len(NAMES))
    return transformers.ViTForImageClassification(config).eval()


def test_publishing_a_transformers_model(tmp_path: Path, uploaded: dict[str, bytes]) -> None:
    model = make_dynamic(tiny_transformers(), (1, 3), (0.75, 0.5), "predictor", "merge")
    push_to_hub(model, "user/mine", token="hf_none", class_names=NAMES)
    assert sorted(uploaded) == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert 'from_pretrained("user/mine")' in uploaded["README.md"].decode()
    loaded = from_pretrained(write_files(tmp_path / "there", uploaded))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images).logits, model(images).logits) and loaded.class_names == tuple(NAMES)
    tiny_transformers().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="dense transformers model"):
        push_to_hub(tmp_path / "dense", "user/dense", token="hf_none")
    config = tmp_path / "there" / "config.json"
    (tmp_path / "there" / "README.md").unlink()
    push_to_hub(tmp_path / "there", "user/again", token="hf_none")
    assert "Before blocks 1, 3 it keeps" in uploaded["README.md"].decode()  # as the card of the model that it is
    text = config.read_text()
    config.write_text(re.sub(r'("pruning_loc": \[\s*)1,', r"\g<1>9,", text))
    assert config.read_text() != text
    with pytest.raises(CheckpointError, match="has impossible stages"):
        push_to_hub(tmp_path / "there", "user/again", token="hf_none")


def test_what_cannot_be_published(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="user/name"):
        push_to_hub(saved, "mine")
    with pytest.raises(CheckpointError, match="no config"):
        push_to_hub(tmp_path, "user/mine")
    with pytest.raises(CheckpointError, match="cannot publish user/mine"):
        push_to_hub(saved, "user/mine", token="hf_none")


def test_a_model_without_weights_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = create_model("deit_tiny", num_classes=2, dense=True, img_size=32, patch_size=8, depth=2)
    with pytest.raises(CheckpointError, match="meta device"):
        save_pretrained(model, tmp_path / "fast")
    with pytest.raises(CheckpointError, match="a list of names, got 'ab'"):
        save_pretrained(model, tmp_path / "fast", class_names="ab")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
def test_fifos_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("config.json", "names.txt"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="not a saved model"):
        from_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot read the class names"):
        Own(class_names=tmp_path / "names.txt").names()
    assert not is_image(str(tmp_path / "names.txt"))
