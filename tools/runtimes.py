"""Other runtimes: writing a model for each of them, and running what was written."""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from dynamicvit.errors import UserError
from dynamicvit.models import ModelSpec, gives_embeddings
from dynamicvit.models.describe import data_config
from dynamicvit.models.huggingface import PreTrainedVisionModel, answer_of
from dynamicvit.models.saved import config_text
from dynamicvit.models.twins import twin
from dynamicvit.tools.predict import METADATA, Runner, load_onnx
from torch import Tensor, nn

MAX_ONNX_BYTES = 2**31 - 2**20  # what one file can hold
LARGEST_BATCH = 2**31 - 1  # torch 2.7 wants one named

# Runs a torch.export program in a process that has nothing but torch.
RUN_TORCH = """
import sys, torch
program, images, outputs = sys.argv[1:]
model = torch.export.load(program).module()
torch.save([model(batch) for batch in torch.load(images)], outputs)
assert "timm" not in sys.modules
"""


class Answer(nn.Module):
    """Only the tensor of what a transformers model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return answer_of(self.model(images))


class Half(Answer):
    """float16 inside; float32 images and outputs, so that callers need not care."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.half()).float()


def exportable(model: nn.Module, half: bool) -> nn.Module:
    """A copy of it in the precision asked for, in eval mode."""
    copy = twin(model, model.spec)
    if half:
        return Half(copy.half()).eval()
    return Answer(copy).eval() if isinstance(copy, PreTrainedVisionModel) else copy


def trace(model: nn.Module, spec: ModelSpec, batch: int | None) -> torch.export.ExportedProgram:
    """batch: None for any number of images."""
    images = torch.randn(2 if batch is None else batch, *data_config(spec)["input_size"])
    shapes = ({0: torch.export.Dim("batch", max=LARGEST_BATCH)},) if batch is None else None
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)


def write_onnx(model: nn.Module, spec: ModelSpec, path: Path, batch: int | None) -> None:
    """One file, which carries the model's description for tools.predict."""
    size = sum(value.nbytes for value in model.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise UserError(
            f"an ONNX file holds 2 GiB at most, and the weights are {size / 2**30:.1f}; try --precision fp16"
        )
    program = torch.onnx.export(
        trace(model, spec, batch),
        input_names=["images"],
        output_names=["embedding" if gives_embeddings(spec) else "logits"],
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props[METADATA] = config_text(spec)
    program.save(path, external_data=False)


def write_torch(model: nn.Module, spec: ModelSpec, path: Path, batch: int | None) -> None:
    torch.export.save(trace(model, spec, batch), path, extra_files={"config.json": config_text(spec)})


def write_aoti(model: nn.Module, spec: ModelSpec, path: Path, batch: int | None) -> None:
    torch._inductor.aoti_compile_and_package(trace(model, spec, batch), package_path=str(path))


WRITERS = {"onnx": write_onnx, "torch": write_torch, "aoti": write_aoti}
RUNTIMES = {"onnx": "ONNX Runtime", "torch": "torch.export", "aoti": "AOTInductor"}


def load_runner(kind: str, path: Path) -> Runner:
    if kind == "onnx":
        return load_onnx(path)[0]
    if kind == "torch":
        return torch.no_grad()(torch.export.load(path).module())
    return torch._inductor.aoti_load_package(str(path))


def run_alone(path: Path, batches: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a torch.export program in a process that cannot see our code."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "images.pt"), Path(folder, "outputs.pt")
        torch.save([batch.clone() for batch in batches], inputs)
        command = [sys.executable, "-I", "-c", RUN_TORCH, path.absolute(), inputs, outputs]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.splitlines() or [f"exit status {result.returncode}"])[-1]
            raise UserError(f"the file does not load with torch alone ({reason})")
        return torch.load(outputs)
