"""Says what a saved or an exported model sees in photos: its top five classes, or the photos' embeddings.

python -m tools.predict fast/ photo.jpg              # a folder of save_pretrained's
python -m tools.predict user/name photo.jpg          # the same on the Hugging Face hub
python -m tools.predict logs/my_run photo.jpg        # a trained run's best epoch, or a checkpoint
python -m tools.predict fast.onnx one.jpg two.jpg    # a file of tools.export's, in ONNX Runtime
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from dynamicvit.datasets import class_names
from dynamicvit.errors import ImageError, UserError, exit_status
from dynamicvit.image_files import open_image
from dynamicvit.models import ModelSpec, gives_embeddings
from dynamicvit.models.saved import data_config, first_line, parse_config
from dynamicvit.options import OneLineParser
from dynamicvit.runs.checkpoints import load_model
from dynamicvit.utils import log
from timm.data import create_transform
from torch import Tensor

TOP = 5
METADATA = "dynamicvit"  # under this name an ONNX file carries what config.json holds

Runner = Callable[[Tensor], Tensor]  # (B, 3, H, W) preprocessed images -> (B, classes) logits or embeddings


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="predict", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="saved model's or run's folder, checkpoint, user/name on the hub, or .onnx file")
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTO")
    return parser


def main(args: argparse.Namespace) -> None:
    run, spec = load_onnx(Path(args.model)) if args.model.endswith(".onnx") else load_torch(args.model)
    transform = create_transform(**data_config(spec))
    photos, outputs = [], []
    for path in args.photos:
        try:
            outputs.append(run(transform(open_image(path))[None])[0])
            photos.append(path)
        except ImageError as error:
            log(f"warning: {error}")
    if gives_embeddings(spec):
        print_embeddings(photos, outputs)
    else:
        print_classes(photos, outputs, class_names(spec))
    if len(photos) < len(args.photos):
        raise UserError(f"{len(args.photos) - len(photos)} of {len(args.photos)} photos cannot be read")


def load_torch(source: str) -> tuple[Runner, ModelSpec]:
    model = load_model(source)
    return torch.inference_mode()(model), model.spec


def load_onnx(path: Path) -> tuple[Runner, ModelSpec]:
    """A file of tools.export's in ONNX Runtime on the CPU, with as many threads as torch has, and its description."""
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
        raise UserError(f"{path} does not say how to prepare its images; export it with tools.export")
    spec, _ = parse_config(metadata[METADATA], path)
    batch = session.get_inputs()[0].shape[0]

    def run(images: Tensor) -> Tensor:
        wanted = batch if isinstance(batch, int) else len(images)  # a fixed batch is filled with copies
        filled = images.repeat(-(-wanted // len(images)), 1, 1, 1)[:wanted]
        return torch.from_numpy(session.run(None, {"images": filled.numpy()})[0])[: len(images)]

    return run, spec


def require_packages(*names: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"needs {', '.join(missing)}: pip install -r requirements-export.txt")


def print_classes(photos: Sequence[Path], outputs: Sequence[Tensor], names: Sequence[str]) -> None:
    for path, logits in zip(photos, outputs, strict=True):
        print(path)
        probabilities, classes = logits.softmax(dim=-1).topk(min(TOP, len(names)))
        for probability, index in zip(probabilities.tolist(), classes.tolist(), strict=True):
            print(f"  {probability:6.1%}  {names[index]}")


def print_embeddings(photos: Sequence[Path], embeddings: Sequence[Tensor]) -> None:
    """Size and norm of each, and how similar to the first one it is."""
    for path, embedding in zip(photos, embeddings, strict=True):
        print(f"{path}: embedding of {len(embedding)} numbers, norm {embedding.norm():.3f}")
    for path, embedding in zip(photos[1:], embeddings[1:], strict=True):
        print(f"cosine of {photos[0]} and {path}: {F.cosine_similarity(embeddings[0], embedding, dim=0):.4f}")


def command(argv: Sequence[str] | None = None) -> None:
    main(build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(exit_status(command))
