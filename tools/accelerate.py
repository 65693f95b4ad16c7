"""Makes a trained vision transformer faster in minutes, from a folder of images without labels.

    dynamicvit accelerate vit_small_patch16_224.augreg_in21k_ft_in1k --images photos/ --output fast/

In its blocks, patches that tell little or resemble a more important one are merged with those most similar
to them (--scorer distinct_few --reducer merge_length, as in main_dynamic_vit.py). Then the model learns to
answer as it did before, from its own dense answers. A fifth of the images is never trained on: fast/report.html
shows how much the answers to these have changed. To use the model: dynamicvit.from_pretrained("fast").
The same in Python:

    model, report = dynamicvit.accelerate(vit, "photos", speedup=1.5)
"""

import copy
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from dynamicvit.datasets import BatchTransform
from dynamicvit.errors import UserError, exit_status
from dynamicvit.models import Teacher
from dynamicvit.models.features import FeatureExtractor
from dynamicvit.models.flops import count_gflops
from dynamicvit.recipe import build_recipe
from dynamicvit.runs.run import log_model
from dynamicvit.signals import Stopped, StopSignal
from dynamicvit.tools.accelerate_output import OutputFolder
from dynamicvit.tools.accelerate_report import Report
from dynamicvit.tools.accelerate_request import Request, as_tuple, build_parser
from dynamicvit.tools.comparison import DENSE, MERGED, TUNED, Answers, Comparison, Likeness, likeness_of, predict_all
from dynamicvit.tools.dense import Own, as_size, find_dense
from dynamicvit.tools.finetune import Budget, FineTuning, NoSignal, Outcome
from dynamicvit.tools.speedup import (
    Deployment,
    Wish,
    choose_spec,
    make_faster,
    share_weights,
    time_models,
    time_ratios,
)
from dynamicvit.tools.splits import RECIPE, Decoded, Images, decode, split_images, with_progress
from dynamicvit.utils import log
from torch import Tensor, nn

from dynamicvit import utils

CHOICE_IMAGES = 64  # to choose among layouts that are equally fast
BATCH_SIZE = {"cpu": 16, "cuda": 128}  # of training
FEATURES_LR = 1e-4  # every token's direction is a steadier target than the answer, which needs a tenth of this
FEATURE_IMAGES = 100  # held back at most where features are compared, as an image has hundreds of them


def accelerate(
    model: nn.Module | str,
    images: Images,
    speedup: float | None = None,
    *,
    output: str | Path | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    flops_speedup: float | None = None,
    base_rate: float | None = None,
    keep_rates: Sequence[float] | None = None,
    pruning_loc: Sequence[int] | None = None,
    purpose: str = "answers",
    for_batch: int | None = None,
    amp: str = "auto",
    weights: str | Path | None = None,
    input_size: int | Sequence[int] | None = None,
    class_names: str | Path | Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    crop_pct: float | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    device: str = "auto",
    seed: int = 0,
    stop: StopSignal | None = None,
) -> tuple[nn.Module, Report]:
    """A faster copy of a trained vision transformer, in eval mode, and a report on it.

    model: a ViT of timm or transformers (left as it is), one of timm's names or ours, user/name on the hub, or a folder
    of save_pretrained's, ours or transformers'.
    images: like those that the model is for: a folder, files, or a DataLoader that gives (B, 3, H, W) tensors as the
    model takes them, alone or before labels. A fifth of them is never trained on, and is what the report is about.
    speedup: how many times as fast (default 1.5), timed on this machine, with batches of for_batch images (default: 8
    on a CPU, 256 on a GPU) in the precision amp (auto: bfloat16 on a GPU, float32 on a CPU). Instead: flops_speedup,
    times fewer multiply-adds; or base_rate, the share of its tokens that each stage keeps; or keep_rates, shares of all
    tokens by stage. pruning_loc: the blocks before which tokens merge, to choose them by hand.
    purpose: answers, or features: every patch's feature stays near the dense model's, in forward_features and timm's
    other methods for these, whose time then counts; the model's own answers are ignored.
    minutes: roughly, of fine-tuning (default 5; 0 for none); or steps, exactly repeatable.
    output: a new folder for model and report, where an interrupted run is resumed; None: nothing is written.
    weights, input_size, class_names (names, or a file with one a line), mean, std, crop_pct: what the model's name
    does not tell. batch_size: of training. stop: ends it early; raises Stopped once what there is has been saved.
    Raises UserError, also for a speed-up that cannot be reached (the message gives one that can).
    """
    request = Request(
        model=model,
        images=images,
        wish=Wish(speedup, flops_speedup, base_rate, as_tuple(keep_rates), as_tuple(pruning_loc)).or_usual(),
        budget=Budget(minutes, steps).or_usual(),
        own=Own(weights, as_size(input_size), class_names, mean, std, crop_pct),
        use=Deployment.on(utils.pick_device(device), for_batch, amp),
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        purpose=purpose,
    )
    return Acceleration(request, OutputFolder(output, request.settings()), stop or NoSignal()).run()


class Acceleration:
    """From a dense model and images to a faster model and its report, step by step."""

    def __init__(self, request: Request, folder: OutputFolder, stop: StopSignal | NoSignal) -> None:
        self.request, self.folder, self.stop, self.use = request, folder, stop, request.use
        self.dense, self.notes = find_dense(request.model, request.own)
        for note in self.notes:
            log(note)
        self.dense.to(self.use.device).eval()
        self.spec = self.dense.spec
        self.split = split_images(request.images, self.spec)
        held_back = self.split.held_back.first(FEATURE_IMAGES) if request.features else self.split.held_back
        self.held_back = decode(held_back, self.spec, request.workers)
        log(f"{len(self.split.training)} images to train on, {len(self.held_back)} held back to measure on")
        self.outcome: Outcome | None = None

    def run(self) -> tuple[nn.Module, Report]:
        self.choose()
        self.measure()
        self.fine_tune()
        return self.finish()

    def choose(self) -> None:
        """The faster model, before any training: the one that an earlier run chose, or by the clock."""
        use, spec = self.use, self.folder.spec
        # The teacher's modules may be set up differently; what is timed is the model as it is used.
        as_used = share_weights(self.dense) if use.amp_dtype is None else copy.deepcopy(self.dense)
        self.as_used = as_used.to(use.amp_dtype)
        if spec is None:
            spec = choose_spec(self.as_used, self.request.wish, self.time, self.distance, self.request.features)
        self.spec = spec
        self.fast = make_faster(copy.deepcopy(self.dense), spec)
        self.report = Report(self.request.settings(), spec.arch, spec.to_dict(), use=str(use), notes=self.notes)
        self.report.schedule = self.folder.earlier.schedule if self.folder.earlier else []
        self.folder.write(self.report)  # now that nothing in the command is wrong

    def what_counts(self, model: nn.Module) -> nn.Module:
        """A module that, when called, gives what the model is for."""
        return FeatureExtractor(model) if self.request.features else model

    def time(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """How many times as fast as the dense model each other one is."""
        models = {name: self.what_counts(model) for name, model in models.items()}
        return time_ratios(self.use, self.spec.img_size, models)

    @property
    def likeness(self) -> Likeness:
        return likeness_of(self.spec, self.request.features)

    def distance(self, model: nn.Module) -> float:
        """How far the model's answers are from the dense model's, on some images that it may learn from."""
        images, wanted = self.to_choose_by
        return self.likeness.distance(self.predict(model, images).outputs, wanted).mean().item()

    @cached_property
    def to_choose_by(self) -> tuple[Decoded, Tensor]:
        """Some images that the model may learn from, and the dense model's answers."""
        source = self.split.training if len(self.split.training) else self.split.held_back
        images = decode(source.first(CHOICE_IMAGES), self.spec, self.request.workers)
        return images, self.predict(self.as_used, images).outputs

    def predict(self, model: nn.Module, images: Decoded) -> Answers:
        """Its outputs for the images. Raises Stopped at a signal, as there is no model yet to keep."""
        batches = images.loader(self.use.batch_size, self.use.device.type == "cuda")
        shown = self.until_stopped(with_progress(batches, len(batches), "measuring"))
        how = self.spec.preprocessing
        transform = BatchTransform(self.use.device, how.mean, how.std)
        return predict_all(self.what_counts(model), shown, transform, self.use.amp_dtype)

    def until_stopped(self, batches: Iterable) -> Iterator:
        for batch in batches:
            if self.stop.received:
                raise Stopped(f"{self.stop.name} received before there was a model; run the same command again")
            yield batch

    def measure(self) -> None:
        """The faster model's speed and answers beside the dense one's."""
        size, models = self.spec.img_size, {"dense": self.dense, "dynamic": self.fast}
        gflops = {name: count_gflops(model, size, self.request.features) for name, model in models.items()}
        log_model(self.fast, gflops)
        self.comparison = Comparison(self.likeness, gflops)
        self.report.images_held_back = len(self.held_back)
        self.report.batch_sizes = list(dict.fromkeys([self.use.batch_size, 1]))
        self.speeds = {DENSE: {}, MERGED: {}}
        fast = make_faster(share_weights(self.as_used), self.spec).eval()
        models = {DENSE: self.what_counts(self.as_used), MERGED: self.what_counts(fast)}
        for batch_size in self.report.batch_sizes:
            use = replace(self.use, batch_size=batch_size)
            seconds = time_models(use, size, models)
            for name, value in seconds.items():
                self.speeds[name][f"images_per_s_{batch_size}"] = batch_size / value
        self.compare(DENSE, self.dense)
        started = time.monotonic()
        self.compare(MERGED, self.fast)
        self.seconds = time.monotonic() - started

    def compare(self, name: str, model: nn.Module) -> None:
        """Adds a row to the report."""
        log(self.comparison.add(name, self.predict(model, self.held_back)))
        self.report.rows[name] = self.comparison.rows[name] | self.speeds[DENSE if name == DENSE else MERGED]
        self.report.saved = name  # for now

    def fine_tune(self) -> None:
        """Fine-tunes, unless there are too few images or the user does not want it."""
        request, report = self.request, self.report
        if len(self.split.training) == 0 or request.budget.is_none:
            return
        log(*str(report).splitlines())
        batch_size = request.batch_size or BATCH_SIZE[self.use.device.type]
        changes = {"lr": FEATURES_LR, "mixup": 0.0, "cutmix": 0.0} if request.features else {}
        recipe = build_recipe(
            RECIPE, batch_size=batch_size, seed=request.seed, distill=True, model_ema=False, **changes
        )
        loader = self.held_back.loader(2 * batch_size, self.use.device.type == "cuda")
        models = (self.fast, Teacher(self.dense))
        tuning = FineTuning(recipe, request.workers, *models, self.split.training, loader, request.features)
        if not report.schedule:
            report.schedule = list(tuning.schedule(request.budget, self.seconds))
            self.folder.write(report)
        self.outcome = tuning.train(self.folder.training, tuple(report.schedule), self.comparison.gflops, self.stop)
        report.history = self.outcome.history

    def finish(self) -> tuple[nn.Module, Report]:
        """Keeps the better one and writes it. Raises Stopped if a signal has ended the training."""
        stopped, self.stop = self.outcome and self.outcome.stopped, NoSignal()
        if self.outcome and self.outcome.is_tuned:
            try:
                self.compare(TUNED, self.fast)
            except UserError as error:
                log(f"warning: {error}; fine-tuning is left out")
        self.report.saved = self.comparison.best
        if self.report.saved != TUNED:
            if self.outcome and self.outcome.is_tuned:
                log("fine-tuning did not help on the images held back: the model is left as it was")
            self.fast.load_state_dict(self.dense.state_dict())
        self.fast.set_distilled_training(False)  # in a user's own training loop it returns logits
        self.folder.finish(self.report, self.fast, self.comparison, self.held_back)
        log(*str(self.report).splitlines())
        if stopped is not None:
            folder = self.folder.folder
            raise Stopped(f"{stopped}; {folder} holds the best so far" if folder else str(stopped))
        return self.fast.eval(), self.report


def command(argv: Sequence[str] | None = None) -> None:
    args = build_parser((__doc__ or "").split("\n")[0]).parse_args(argv)
    if utils.launched_by_torchrun():
        raise UserError("accelerate runs in one process; for several see docs/label_free.md")
    utils.set_seed(args.seed)
    accelerate(**vars(args), stop=StopSignal())


if __name__ == "__main__":
    sys.exit(exit_status(command))
