"""tools.predict: answers as they come, files of them, and what is refused. Exported files are in test_export.py too."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import write_images
from dynamicvit.errors import exit_status
from dynamicvit.models import create_model, save_pretrained
from dynamicvit.tools import predict
from PIL import Image

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES = {"pruning_loc": (1,), "keep_rates": (0.5,)}
NAMES = ["crane", "bee", "crane"]  # ImageNet, too, has two of them


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "fast"
    save_pretrained(create_model("deit_tiny", num_classes=3, **TINY, **STAGES), folder, class_names=NAMES)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path / "photos", 3)
    return tmp_path / "photos"


def run(*words: str | Path) -> int:
    return exit_status(lambda: predict.command([str(word) for word in words]))


def test_a_folder_and_files_of_the_answers(saved: Path, photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "notes.heic").touch()
    assert run(saved, photos, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{photos}: 1 file left out: .heic (1)"
    assert lines[1::4] == [str(photos / f"{i}.jpg") for i in range(3)] and len(lines) == 13
    records = json.loads((tmp_path / "a.json").read_text())
    assert [record["photo"] for record in records] == lines[1::4]
    for record in records:
        assert sorted(answer["class"] for answer in record["classes"]) == sorted(NAMES)
        assert math.isclose(sum(answer["probability"] for answer in record["classes"]), 1, rel_tol=1e-5)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    first = records[0]["classes"][0]
    assert len(rows) == 9 and (rows[0]["photo"], rows[0]["class"]) == (lines[1], first["class"])
    assert float(rows[0]["probability"]) == first["probability"]


def test_embeddings_as_files(photos: Path, tmp_path: Path, capsys) -> None:
    save_pretrained(create_model("deit_tiny", num_classes=0, **TINY, **STAGES), tmp_path / "fast")
    assert run(tmp_path / "fast", photos, "--json", tmp_path / "a.json", "--csv", tmp_path / "a.csv") == 0
    assert capsys.readouterr().out.count("cosine of") == 2
    embeddings = [record["embedding"] for record in json.loads((tmp_path / "a.json").read_text())]
    header, *rows = csv.reader((tmp_path / "a.csv").open())
    assert header == ["photo", *map(str, range(32))]
    assert [[float(value) for value in row[1:]] for row in rows] == embeddings


def test_answers_come_one_by_one_and_stay_after_ctrl_c(
    saved: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Printed before the next photo is opened; the files hold what was answered until then."""
    seen = []

    def open_image(path: str) -> Image.Image:
        seen.append(capsys.readouterr().out)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return Image.open(path)

    monkeypatch.setattr(predict, "open_image", open_image)
    with pytest.raises(KeyboardInterrupt):
        predict.command([str(saved), str(photos), "--json", str(tmp_path / "a.json")])
    assert "0.jpg" in seen[1] and "1.jpg" in seen[2]
    assert len(json.loads((tmp_path / "a.json").read_text())) == 2


def test_an_unreadable_photo_keeps_no_other_from_its_answer(saved: Path, photos: Path, tmp_path: Path, capsys) -> None:
    (photos / "1.jpg").write_bytes(b"no image")
    assert run(saved, photos, tmp_path / "none.jpg", "--json", tmp_path / "a.json") == 2
    captured = capsys.readouterr()
    assert [Path(line).name for line in captured.out.splitlines()[::4]] == ["0.jpg", "2.jpg"]
    first, second, last = captured.err.splitlines()
    assert "1.jpg" in first and "none.jpg" in second and last == "error: 2 of 4 photos cannot be read"
    assert len(json.loads((tmp_path / "a.json").read_text())) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_answers_that_are_no_numbers(
    photos: Path, tmp_path: Path, value: float, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    spec = create_model("deit_tiny", num_classes=3, **TINY, **STAGES).spec
    monkeypatch.setattr(predict, "load_torch", lambda source: (lambda images: torch.tensor([[0.0, value, 0.0]]), spec))
    assert run("fast", photos) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "NaN or infinite" in captured.err and "0.jpg" in captured.err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["empty"], "no images in"),
        ([""], "name of a photo is empty"),
        (["photos", "--json", "none/a.json"], "none/a.json"),
        (["photos", "--csv", "photos"], "it is not a file"),
        (["photos", "--json", "a", "--csv", "a"], "need different files"),
    ],
)
def test_refused_before_the_model_is_loaded(
    photos: Path, tmp_path: Path, words: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "load_torch", pytest.fail)
    (tmp_path / "empty").mkdir()
    assert run("fast", *words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "photos"}


def foreign(path: Path, spec: dict, **changes) -> None:
    """An ONNX file that describes itself as ours do, and computes something else."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    o = {"input": "images", "kind": TensorProto.FLOAT, "shape": ["n", 3, 32, 32], "output": "logits"} | changes
    value = helper.make_tensor_value_info
    inputs = [value(o["input"], o["kind"], o["shape"])] + [value("more", o["kind"], [1])] * bool(o.get("second"))
    outputs = [value(o["output"], TensorProto.FLOAT, o.get("answer", ["n", 3]))]
    nodes = [
        helper.make_node("Cast", [o["input"]], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["cast"], [o["output"]], axes=[2, 3], keepdims=o.get("keepdims", 0)),
    ]
    if o.get("twice"):
        nodes.append(helper.make_node("Identity", [o["output"]], ["more"]))
        outputs.append(value("more", TensorProto.FLOAT, ["n", 3]))
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {predict.METADATA: json.dumps(spec)})
    onnx.save(model, path)


INTERFACES = {
    "the input's name": {"input": "pixels"},
    "the output's name": {"output": "scores"},
    "the type": {"kind": 10},  # float16
    "the rank": {"shape": ["n", 3, 32, 32, 1], "answer": ["n", 3, 1]},
    "the image's side": {"shape": ["n", 3, 64, 64]},
    "a second input": {"second": True},
    "a second output": {"twice": True},
    "the number of classes": {"shape": ["n", 5, 32, 32], "answer": ["n", 5]},
    "an answer of four dimensions": {"keepdims": 1, "answer": ["n", 3, 1, 1]},
    "what is left open": {"shape": ["n", "c", "h", "w"], "answer": None, "keepdims": 1},
}


@pytest.mark.parametrize("name", INTERFACES)
def test_onnx_files_with_other_inputs_or_outputs(saved: Path, photos: Path, tmp_path: Path, name: str, capsys) -> None:
    pytest.importorskip("onnxruntime")
    spec = json.loads((saved / "config.json").read_text())
    foreign(tmp_path / "ours.onnx", spec)
    assert run(tmp_path / "ours.onnx", photos) == 0
    capsys.readouterr()
    foreign(tmp_path / "fast.onnx", spec, **INTERFACES[name])
    assert run(tmp_path / "fast.onnx", photos) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "fast.onnx" in error and error.count("\n") == 1


@pytest.mark.parametrize("flag", ["--json", "--csv"])
def test_an_empty_name_is_no_file(flag: str, saved: Path, photos: Path, capsys) -> None:
    assert run(saved, photos, flag, "") == 2
    assert capsys.readouterr().err == f"error: argument {flag}: must not be empty\n"


def test_names_that_a_terminal_would_obey(saved: Path, photos: Path, tmp_path: Path, capsys) -> None:
    """Colours, a cleared screen and a line that is not ours, in names of photos, kinds of files and folders."""
    odd = photos.rename(tmp_path / "odd\x1b[2J")
    (odd / "0.jpg").rename(odd / "0\nerror: all is lost.jpg")
    (odd / "1\r.jpg").write_text("no image")
    (odd / "notes.\x1b[31m").touch()
    assert run(saved, odd, "--json", tmp_path / "a.json") == 2
    captured = capsys.readouterr()
    assert all(line.isprintable() for line in (captured.out + captured.err).split("\n"))
    assert "odd\\x1b[2J/0\\nerror: all is lost.jpg\n" in captured.out and "1\\r.jpg" in captured.err
    assert captured.err.count("\n") == 2
    assert json.loads((tmp_path / "a.json").read_text())[0]["photo"] == str(odd / "0\nerror: all is lost.jpg")
    assert run(tmp_path / "no\nsuch\x1b[1m", odd) == 2
    assert capsys.readouterr().err == f"error: no such file or folder: {tmp_path}/no\\nsuch\\x1b[1m\n"
