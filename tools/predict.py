"""Says what a saved or an exported model sees in photos: its top five classes, or the photos' embeddings.

dynamicvit predict fast/ photo.jpg              # a folder of save_pretrained's
dynamicvit predict user/name photos/            # the same on the Hugging Face hub; a folder of photos
dynamicvit predict logs/my_run photo.jpg        # a trained run's best epoch, or a checkpoint
dynamicvit predict fast.onnx one.jpg two.jpg    # a file of dynamicvit export's, in ONNX Runtime
"""

import argparse
import csv
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from dynamicvit.datasets import class_names
from dynamicvit.errors import ImageError, UserError, exit_status
from dynamicvit.image_files import list_images, open_image
from dynamicvit.models import ModelSpec, from_pretrained, gives_embeddings
from dynamicvit.models.describe import data_config
from dynamicvit.models.huggingface import answer_of
from dynamicvit.models.saved import parse_config
from dynamicvit.models.spec import first_line
from dynamicvit.options import OneLineParser
from dynamicvit.runs.whole import check_writable, whole_file
from dynamicvit.utils import printable, warn
from timm.data import create_transform
from torch import Tensor

TOP = 5
METADATA = "dynamicvit"  # under this name an ONNX file carries what config.json holds

Runner = Callable[[Tensor], Tensor]  # (B, 3, H, W) preprocessed images -> (B, classes) logits or embeddings


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="predict", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="saved model's or run's folder, checkpoint, user/name on the hub, or .onnx file")
    parser.add_argument("photos", nargs="+", metavar="PHOTO", help="image files, or folders of them")
    parser.add_argument("--json", type=Path, help="a file for the answers, with all digits")
    parser.add_argument("--csv", type=Path, help="the same as a table, a line for each photo and class")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.json and args.json == args.csv:
        raise UserError("--json and --csv need different files")
    answers = Answers({path: writer for path, writer in ((args.json, as_json), (args.csv, as_csv)) if path})
    photos = [photo for given in args.photos for photo in photos_in(given)]
    if args.model.endswith(".pt2"):
        raise UserError(
            f"{args.model} is for torch.export.load or aoti_load_package; give the model it was exported from, or .onnx"
        )
    run, spec = load_onnx(Path(args.model)) if args.model.endswith(".onnx") else load_torch(args.model)
    names = None if gives_embeddings(spec) else class_names(spec)
    transform = create_transform(**data_config(spec))
    bad = 0
    try:
        for path in photos:
            try:
                image = open_image(path)
            except ImageError as error:
                bad += 1
                warn(error)
                continue
            output = run(transform(image)[None])[0]
            if not output.isfinite().all():
                raise UserError(f"the model answers {path} with NaN or infinite numbers: its weights cannot be used")
            answers.add(path, output, names)
    finally:  # of Ctrl-C, too
        answers.write()
    if bad:
        raise UserError(f"{bad} of {len(photos)} photos cannot be read")


def photos_in(given: str) -> list[str]:
    """The file itself, or the images in the folder. Raises UserError where there are none."""
    if not given:
        raise UserError("the name of a photo is empty")
    if not Path(given).is_dir():
        return [given]
    if found := list_images(given):
        return found
    raise UserError(f"no images in {given}")


@dataclass
class Answers:
    """Answers, printed as they come, and kept for the files to write them to (path -> what makes its text).

    Raises UserError at once if one of these cannot be written.
    """

    files: dict[Path, Callable[[list[dict[str, Any]]], str]]
    records: list[dict[str, Any]] = field(default_factory=list)
    first: tuple[str, Tensor] | None = None  # photo, as it is printed, and embedding

    def __post_init__(self) -> None:
        for path in self.files:
            check_writable(path)

    def add(self, photo: str, output: Tensor, names: Sequence[str] | None) -> None:
        """output: (classes,) logits; or an embedding, if there are no names."""
        if names is None:
            self.add_embedding(photo, output)
            return
        probabilities, indices = output.softmax(dim=-1).topk(min(TOP, len(names)))
        top = [(names[i], p) for p, i in zip(probabilities.tolist(), indices.tolist(), strict=True)]
        self.records.append({"photo": photo, "classes": [{"class": name, "probability": p} for name, p in top]})
        print("\n".join([printable(photo), *(f"  {p:6.1%}  {name}" for name, p in top)]), flush=True)

    def add_embedding(self, photo: str, embedding: Tensor) -> None:
        """Prints its size and norm, and how similar it is to the first one."""
        self.records.append({"photo": photo, "embedding": embedding.tolist()})
        name = printable(photo)
        print(f"{name}: embedding of {len(embedding)} numbers, norm {embedding.norm():.3f}", flush=True)
        if self.first is None:
            self.first = (name, embedding)
        else:
            cosine = F.cosine_similarity(self.first[1], embedding, dim=0)
            print(f"cosine of {self.first[0]} and {name}: {cosine:.4f}", flush=True)

    def write(self) -> None:
        for path, text_of in self.files.items():
            with whole_file(path) as temporary:
                temporary.write_text(text_of(self.records), encoding="utf-8", errors="surrogateescape")


def as_json(records: list[dict[str, Any]]) -> str:
    return json.dumps(records, indent=1) + "\n"


def as_csv(records: list[dict[str, Any]]) -> str:
    """photo, class, probability; or photo and the numbers of its embedding."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["photo", *csv_header(records)])
    for record in records:
        if "embedding" in record:
            writer.writerow([record["photo"], *record["embedding"]])
        else:
            writer.writerows([record["photo"], *line.values()] for line in record["classes"])
    return file.getvalue()


def csv_header(records: list[dict[str, Any]]) -> Iterator[str]:
    width = len(records[0]["embedding"]) if records and "embedding" in records[0] else 0
    return map(str, range(width)) if width else iter(("class", "probability"))


def load_torch(source: str) -> tuple[Runner, ModelSpec]:
    model = from_pretrained(source)
    return torch.inference_mode()(lambda images: answer_of(model(images))), model.spec


def load_onnx(path: Path) -> tuple[Runner, ModelSpec]:
    """An exported file in ONNX Runtime on the CPU, with as many threads as torch has, and its description."""
    require_packages("onnxruntime")
    import onnxruntime

    if not path.is_file():
        raise UserError(f"no such file: {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has an error type for every cause
        raise UserError(f"ONNX Runtime cannot run {path} ({first_line(error)})") from error
    metadata = session.get_modelmeta().custom_metadata_map
    if METADATA not in metadata:
        raise UserError(f"{path} does not say how to prepare its images; export it with dynamicvit export")
    spec, _ = parse_config(metadata[METADATA], path)
    check_interface(session, spec, path)
    batch = session.get_inputs()[0].shape[0]

    def run(images: Tensor) -> Tensor:
        wanted = batch if isinstance(batch, int) else len(images)  # a fixed batch is filled with copies
        filled = images.repeat(-(-wanted // len(images)), 1, 1, 1)[:wanted]
        try:
            (output,) = session.run(None, {"images": filled.numpy()})
        except Exception as error:
            raise UserError(f"ONNX Runtime cannot run {path} ({first_line(error)})") from error
        if output.ndim != 2 or len(output) != wanted or (spec.num_classes and output.shape[1] != spec.num_classes):
            raise UserError(f"{path} gives outputs of shape {output.shape}, not {(wanted, spec.num_classes)}")
        return torch.from_numpy(output)[: len(images)]

    return run, spec


def check_interface(session: Any, spec: ModelSpec, path: Path) -> None:
    """Raises UserError where an ONNX Runtime session's inputs and outputs are not those of dynamicvit export's files.

    A size that the file leaves open is a string there, or None.
    """
    inputs = [("images", "tensor(float)", (None, *data_config(spec)["input_size"]))]
    outputs = [("embedding" if gives_embeddings(spec) else "logits", "tensor(float)", (None, spec.num_classes or None))]
    for what, found, wanted in (("input", session.get_inputs(), inputs), ("output", session.get_outputs(), outputs)):
        fits = len(found) == len(wanted) and all(
            (value.name, value.type, len(value.shape)) == (name, kind, len(shape))
            and all(a == b or not isinstance(a, int) or b is None for a, b in zip(value.shape, shape, strict=True))
            for value, (name, kind, shape) in zip(found, wanted, strict=True)
        )
        if not fits or 0 in found[0].shape:
            there = ", ".join(f"{value.name} {value.type} {value.shape}" for value in found) or "none"
            raise UserError(f"{path} has another {what} than dynamicvit export's ({there}); export the model again")


def require_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}: pip install {' '.join(missing)}")


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
