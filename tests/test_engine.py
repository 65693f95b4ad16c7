"""The training step and the evaluation, by hand-worked cases and in real processes."""

import json
import math
import multiprocessing
import os
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from dynamicvit.datasets import IGNORED_LABEL, BatchTransform
from dynamicvit.engine import MAX_BAD_STEPS, Diverged, RunningMeans, evaluate, train_one_epoch, update_weights
from dynamicvit.errors import UserError
from dynamicvit.losses import DistillDiffPruningLoss, LabelLoss
from dynamicvit.models import ModelSpec, Teacher, create_model
from dynamicvit.optim import Trainer, build_scaler
from dynamicvit.runs.clocks import Eta
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

from dynamicvit import utils

CPU = torch.device("cpu")
TINY = {"img_size": 32, "patch_size": 8, "num_classes": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}
KINDS = ("deit_small", "lvvit_s")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.2)
Batches = list[tuple[Tensor, Tensor]]


def train(trainer: Trainer, loader: Iterable, epoch: int = 0) -> dict[str, float]:
    """One epoch of all the batches; returns the means of the loss and its parts."""
    steps = range(len(loader) // trainer.update_freq)
    sums = RunningMeans(CPU)
    means, _ = train_one_epoch(trainer, loader, epoch, steps, Eta(len(steps)), sums, lambda done: None)
    return means


def linear_trainer(model: nn.Module | None = None, **changes) -> Trainer:
    """Of a linear model on vectors, with plain gradient descent unless changes say otherwise."""
    model = model or build_linear()
    defaults = {
        "criterion": LabelLoss(nn.CrossEntropyLoss()),
        "optimizer": torch.optim.SGD(one_group(model)),
        "schedule": lambda epochs_done: {"all": 1.0},
        "scaler": build_scaler(CPU, changes.get("amp_dtype")),
        "batch_transform": nn.Identity(),
        "device": CPU,
        "amp_dtype": None,
        "print_freq": 1,
    }
    return Trainer(model=model, **(defaults | changes))


def one_group(model: nn.Module) -> list[dict]:
    return [{"name": "all", "params": list(model.parameters())}]


def build_linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def vector_batches(count: int, size: int) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --- Evaluation


class Ranking(nn.Module):
    """Image k has the classes in the order k, k + 1, ...: of weights 1, 1/2, 1/4, ..., normalised.

    wrong: by how many classes that is off, until it receives another process's statistics.
    """

    def __init__(self, num_classes: int, wrong: int = 0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.spec = ModelSpec(num_classes=num_classes)
        self.register_buffer("wrong", torch.tensor(wrong))

    def forward(self, images: Tensor) -> Tensor:
        place = (torch.arange(self.num_classes) - images - self.wrong) % self.num_classes
        return -math.log(2) * place.float()


def ranked_images(num_classes: int, places: Sequence[int]) -> TensorDataset:
    """Image k, whose label is at places[k] in its model's order."""
    images = torch.arange(len(places))
    return TensorDataset(images[:, None], (images + torch.tensor(places)) % num_classes)


# Of 7 images of 6 classes three are right, one is at place 5 (of 0 to 5), beyond the first five.
# An image's loss is log(1 + 1/2 + ... + 1/32) + place * log 2, the places sum up to 12.
PLACES = (0, 5, 1, 0, 4, 2, 0)
SIX_CLASSES = {"top1": 300 / 7, "top5": 600 / 7, "loss": math.log(63 / 32) + 12 / 7 * math.log(2), "images": 7}


def evaluate_ranking(num_classes: int, loader: DataLoader, sharded: bool, wrong: int = 0) -> dict[str, float]:
    return evaluate(Ranking(num_classes, wrong), loader, nn.Identity(), CPU, None, sharded)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_evaluation_by_hand(batch_size: int) -> None:
    stats = evaluate_ranking(6, DataLoader(ranked_images(6, PLACES), batch_size), sharded=False)
    assert stats == pytest.approx(SIX_CLASSES)


def test_evaluation_of_fewer_than_five_classes() -> None:
    stats = evaluate_ranking(3, DataLoader(ranked_images(3, (0, 1, 2, 0)), 3), sharded=False)
    loss = math.log(7 / 4) + 3 / 4 * math.log(2)
    assert stats == pytest.approx({"top1": 50, "top5": 100, "loss": loss, "images": 4})


def test_evaluation_leaves_ignored_labels_out() -> None:
    images = ranked_images(6, (*PLACES, 3, 0))
    images.tensors[1][7:] = IGNORED_LABEL
    assert evaluate_ranking(6, DataLoader(images, 4), sharded=False) == pytest.approx(SIX_CLASSES)
    images.tensors[1][:] = IGNORED_LABEL
    with pytest.raises(UserError, match="no validation image has a label"):
        evaluate_ranking(6, DataLoader(images, 4), sharded=False)


def test_evaluation_is_of_the_eval_mode_and_learns_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Dropout(0.5)).train()
    model.spec = ModelSpec(num_classes=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, vector_batches(2, 4), nn.Identity(), CPU, None, sharded=False)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("whose", ["the model's", "the dense model's"])
def test_answers_that_are_not_finite(value: float, whose: str) -> None:
    """No figure is computed from them, for a model alone or beside the dense one."""
    good, bad = build_linear(), build_linear()
    with torch.no_grad():
        bad.bias[1] = value
    good.spec = bad.spec = ModelSpec(num_classes=3)
    model, dense = (bad, None) if whose == "the model's" else (good, bad)
    with pytest.raises(UserError, match=f"^{whose} answers to 8 of 8 images are not finite"):
        evaluate(model, vector_batches(2, 4), nn.Identity(), CPU, None, False, dense)


# --- Several processes, forked from one that has done the slow imports

multiprocessing.set_forkserver_preload(["torch.utils.tensorboard", "timm"])
WORLD_SIZE = 3


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class SeedRecorder(nn.Identity):
    """Notes the seed that each batch is augmented under."""

    def __init__(self, seeds: list[int]) -> None:
        super().__init__()
        self.seeds = seeds

    def forward(self, images: Tensor) -> Tensor:
        self.seeds.append(torch.initial_seed())
        return images


def work(rank: int, port: int, folder: Path) -> None:
    """Evaluates and trains as one of WORLD_SIZE processes, and writes down what came out."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    utils.init_distributed(CPU)
    results = {}
    for name, places in (("seven", PLACES), ("two", PLACES[:2])):
        images = ranked_images(6, places)
        loader = DataLoader(images, 2, sampler=range(rank, len(images), WORLD_SIZE))
        results[name] = evaluate_ranking(6, loader, sharded=True, wrong=rank)  # rank 0's statistics count
    whole = DataLoader(ranked_images(6, PLACES), 2)
    results["unsharded"] = evaluate_ranking(6, whole, sharded=False)

    seeds = []
    transform = SeedRecorder(seeds)
    trainer = linear_trainer(DistributedDataParallel(build_linear()), update_freq=2, batch_transform=transform)
    results["means"] = train(trainer, vector_batches(4 * WORLD_SIZE, 2)[rank::WORLD_SIZE])
    results["weights"] = weights(trainer.model).tolist()
    results["seeds"] = list(seeds)

    # one process's images are not finite: all of them must leave the step out
    images, labels = vector_batches(1, 2)[0]
    images = images * math.nan if rank == 1 else images
    results["skipped_steps"] = train(trainer, [(images, labels)] * 2)["skipped_steps"]
    results["weights_after_bad_step"] = weights(trainer.model).tolist()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    utils.end_distributed()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What work() wrote down in each process."""
    folder = tmp_path_factory.mktemp("processes")
    mp.start_processes(work, (free_port(), folder), nprocs=WORLD_SIZE, start_method="forkserver")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


def test_sharded_evaluation_counts_every_image_once(results: list[dict]) -> None:
    for result in results:
        assert result["seven"] == pytest.approx(SIX_CLASSES)
        assert result["unsharded"] == pytest.approx(SIX_CLASSES)


def test_sharded_evaluation_of_fewer_images_than_processes(results: list[dict]) -> None:
    loss = math.log(63 / 32) + 5 / 2 * math.log(2)
    for result in results:
        assert result["two"] == pytest.approx({"top1": 50, "top5": 50, "loss": loss, "images": 2})


def test_processes_train_as_one(results: list[dict]) -> None:
    """3 processes with 2 batches of 2 a step, against batches of 12."""
    batches = vector_batches(4 * WORLD_SIZE, 2)
    large = [merge(batches[: 2 * WORLD_SIZE]), merge(batches[2 * WORLD_SIZE :])]
    trainer = linear_trainer()
    means = train(trainer, large)
    for result in results:
        assert result["weights"] == pytest.approx(weights(trainer.model).tolist(), abs=1e-6)
        assert result["means"] == pytest.approx(means, rel=1e-5)


def test_every_batch_of_every_process_draws_its_own(results: list[dict]) -> None:
    seeds = [seed for result in results for seed in result["seeds"]]
    assert len(seeds) == len(set(seeds)) == 4 * WORLD_SIZE


def test_processes_skip_a_bad_step_together(results: list[dict]) -> None:
    for result in results:
        assert result["skipped_steps"] == 1
        assert result["weights_after_bad_step"] == result["weights"]


# --- The training step


def merge(batches: Batches) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_accumulation_equals_the_large_batch() -> None:
    batches = vector_batches(6, 4)
    accumulated, whole = linear_trainer(update_freq=3), linear_trainer()
    means = train(accumulated, batches)
    expected = train(whole, [merge(batches[:3]), merge(batches[3:])])
    torch.testing.assert_close(weights(accumulated.model), weights(whole.model))
    assert means == pytest.approx(expected, rel=1e-5)
    assert (weights(whole.model) - weights(build_linear())).norm() > 0.1


def test_step_by_hand() -> None:
    """Gradient descent on cross-entropy from zero weights: the gradient of logits is 1/3 - [label]."""
    model = build_linear()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    images, labels = torch.tensor([[1.0, 2, 0, 0, 0, 0]]), torch.tensor([2])
    means = train(linear_trainer(model), [(images, labels)])
    assert means == pytest.approx({"loss": math.log(3), "skipped_steps": 0})
    assert model.bias.tolist() == pytest.approx([-1 / 3, -1 / 3, 2 / 3])
    assert model.weight[:, :3].flatten().tolist() == pytest.approx(
        [-1 / 3, -2 / 3, 0, -1 / 3, -2 / 3, 0, 2 / 3, 4 / 3, 0]
    )


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16, torch.float16])
def test_bad_gradient_changes_nothing(amp_dtype: torch.dtype | None) -> None:
    """Weights and AdamW's state (moments and step count) stay; a good step before and one after count."""
    model = build_linear()
    optimizer = torch.optim.AdamW(one_group(model), fused=True)
    trainer = linear_trainer(model, optimizer=optimizer, amp_dtype=amp_dtype)
    good = vector_batches(1, 4)[0]
    bad = (good[0].clone().index_fill(0, torch.tensor([2]), math.nan), good[1])
    assert train(trainer, [good])["skipped_steps"] == 0
    before = [weights(model), *flat_state(optimizer)]
    assert train(trainer, [bad])["skipped_steps"] == 1
    after = [weights(model), *flat_state(optimizer)]
    assert len(after) == len(before) == 1 + 3 * 2
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert train(trainer, [good])["skipped_steps"] == 0
    assert not torch.equal(weights(model), before[0]) and weights(model).isfinite().all()
    assert flat_state(optimizer)[0] == 2


@pytest.mark.parametrize("update_freq", [1, 2])
def test_bad_step_leaves_batch_norm_as_it_was(update_freq: int) -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), build_linear())
    ema = ModelEmaV3(model, decay=0.5)
    trainer = linear_trainer(model, ema=ema, update_freq=update_freq)
    good = vector_batches(update_freq, 4)
    bad = [*good[1:], (good[0][0] * math.inf, good[0][1])]
    train(trainer, good)
    before = model[0].running_mean.clone()
    assert train(trainer, bad)["skipped_steps"] == 1
    assert torch.equal(model[0].running_mean, before) and before.abs().max() > 0
    assert all(buffer.isfinite().all() for buffer in [*model.buffers(), *ema.module.buffers()])
    train(trainer, good)
    assert not torch.equal(model[0].running_mean, before)


def flat_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [entry.clone() for state in optimizer.state.values() for entry in state.values()]


def test_one_bad_batch_spoils_its_accumulated_step_only() -> None:
    trainer = linear_trainer(update_freq=2)
    batches = vector_batches(4, 4)
    batches[1][0][0] = math.inf
    assert train(trainer, batches)["skipped_steps"] == 1
    expected = linear_trainer()
    train(expected, [merge(batches[2:])])
    torch.testing.assert_close(weights(trainer.model), weights(expected.model))


def test_too_many_bad_steps_in_a_row_end_the_run() -> None:
    good = vector_batches(1, 2)[0]
    bad = (good[0] * math.nan, good[1])
    almost = [bad] * (MAX_BAD_STEPS - 1)
    means = train(linear_trainer(), [*almost, good, *almost, good])
    assert means["skipped_steps"] == 2 * (MAX_BAD_STEPS - 1) and math.isfinite(means["loss"])
    with pytest.raises(Diverged, match="not finite"):
        train(linear_trainer(), [good, *almost, bad, good])


def test_bad_steps_count_across_epochs() -> None:
    good = vector_batches(1, 2)[0]
    trainer = linear_trainer()
    half = [(good[0] * math.nan, good[1])] * (MAX_BAD_STEPS // 2)
    train(trainer, half, epoch=0)
    with pytest.raises(Diverged):
        train(trainer, half, epoch=1)


@pytest.mark.parametrize("amp_dtype", [None, torch.float16])
def test_clip_grad_limits_the_norm(amp_dtype: torch.dtype | None) -> None:
    """Of the gradient without float16's loss scale: with a learning rate of 1 it is the step taken."""
    batch = [vector_batches(1, 4)[0]]
    taken = {}
    for clip_grad in (None, 100.0, 0.01):
        trainer = linear_trainer(clip_grad=clip_grad, amp_dtype=amp_dtype)
        start = weights(trainer.model)
        train(trainer, batch)
        taken[clip_grad] = weights(trainer.model) - start
    assert taken[None].norm() > 0.1
    assert torch.equal(taken[100.0], taken[None])
    assert taken[0.01].norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(taken[0.01] / 0.01, taken[None] / taken[None].norm(), rtol=1e-3, atol=1e-4)


def test_every_step_learns_at_its_rate() -> None:
    """Epoch 3 of 4 steps: the schedule is asked at 3, 3 1/4, 3 1/2 and 3 3/4, and obeyed group by group."""
    model = build_linear()
    groups = [{"name": "weight", "params": [model.weight]}, {"name": "bias", "params": [model.bias]}]
    asked = []

    def schedule(epochs_done: float) -> dict[str, float]:
        asked.append(epochs_done)
        return {"weight": 0.0, "bias": 1.0 if epochs_done == 3.5 else 0.0}

    trainer = linear_trainer(model, optimizer=torch.optim.SGD(groups), schedule=schedule)
    batches = vector_batches(4, 4)
    images, labels = batches[2]
    gradient = (model(images).softmax(dim=-1) - nn.functional.one_hot(labels, 3)).mean(dim=0).detach()
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    train(trainer, batches, epoch=3)
    assert asked == [3, 3.25, 3.5, 3.75]
    assert torch.equal(model.weight, weight)
    torch.testing.assert_close(model.bias.detach(), bias - gradient)


def test_gradients_do_not_pile_up_over_steps() -> None:
    trainer = linear_trainer()
    train(trainer, vector_batches(1, 4))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    parameter = next(trainer.model.parameters())
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    update_weights(trainer, [])
    torch.testing.assert_close(parameter.detach(), before - 1)


def test_lines_on_the_screen_say_nothing_twice(capsys: pytest.CaptureFixture) -> None:
    """Leaves out a count of 0 skipped steps, and a part that is the whole loss."""
    good = vector_batches(1, 2)[0]
    means = train(linear_trainer(), [good])
    assert means["skipped_steps"] == 0 and "skipped" not in capsys.readouterr().out
    train(linear_trainer(), [good, (good[0] * math.nan, good[1])])
    assert "skipped_steps 1" in capsys.readouterr().out
    sums = RunningMeans(CPU)
    sums.update({"loss": torch.tensor(0.5), "cls_kl": torch.tensor(0.5), "kept": torch.tensor(0.25)})
    assert str(sums) == "loss 0.5  kept 0.25" and sums.means()["cls_kl"] == 0.5


# --- Dynamic models


def dynamic_trainer(kind: str, amp_dtype: torch.dtype | None = None, seed: int = 0) -> Trainer:
    """With all that is random in a run: erasing, mixup, cutmix and keep decisions."""
    torch.manual_seed(0)
    model = create_model(kind, pruning_loc=(1, 2), keep_rates=(0.7, 0.5), **TINY)
    teacher = Teacher(create_model(kind, dense=True, **TINY))
    criterion = DistillDiffPruningLoss(
        teacher, SoftTargetCrossEntropy(), model.keep_rates, mse_token=kind == "deit_small"
    )
    return Trainer(
        model=model,
        criterion=criterion,
        optimizer=torch.optim.AdamW(one_group(model), fused=True),
        schedule=lambda epochs_done: {"all": 1e-3},
        scaler=build_scaler(CPU, amp_dtype),
        batch_transform=BatchTransform(CPU, MEAN, STD, erase_prob=0.5),
        device=CPU,
        amp_dtype=amp_dtype,
        mixup=Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=4),
        seed=seed,
        print_freq=1,
    )


def image_batches(count: int) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (4 * count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(4).repeat(count)), 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amp_dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_stays_finite(kind: str, amp_dtype: torch.dtype) -> None:
    trainer = dynamic_trainer(kind, amp_dtype)
    start = weights(trainer.model)
    means = train(trainer, image_batches(6))
    assert all(math.isfinite(value) for value in means.values())
    assert set(means) == {"loss", "cls", "ratio", "cls_kl", "token", "kept_0", "kept_1", "skipped_steps"}
    assert means["skipped_steps"] < 3  # float16 looks for its loss scale first
    assert weights(trainer.model).isfinite().all() and not torch.equal(weights(trainer.model), start)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    stats = evaluate(trainer.model, image_batches(2), BatchTransform(CPU, MEAN, STD), CPU, amp_dtype, sharded=False)
    assert math.isfinite(stats["loss"]) and stats["images"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_losses(kind: str) -> None:
    """Whatever was drawn before; another seed or epoch gives other losses."""

    def run(seed: int, epoch: int, drawn_before: int) -> tuple[dict[str, float], Tensor]:
        trainer = dynamic_trainer(kind, seed=seed)
        utils.set_seed(drawn_before)
        return train(trainer, image_batches(3), epoch), weights(trainer.model)

    means, final = run(seed=0, epoch=0, drawn_before=1)
    again, final_again = run(seed=0, epoch=0, drawn_before=2)
    assert means == again and torch.equal(final, final_again)
    assert run(seed=1, epoch=0, drawn_before=1)[0] != means
    assert run(seed=0, epoch=1, drawn_before=1)[0] != means


def test_an_epoch_begun_goes_on_as_it_would_have() -> None:
    """The second half of an epoch alone, from the state after the first."""
    whole, halves = dynamic_trainer("deit_small"), dynamic_trainer("deit_small")
    loader = image_batches(4)
    expected = train(whole, loader)
    sums, eta = RunningMeans(CPU), Eta(4)
    train_one_epoch(halves, loader, 0, range(2), eta, sums, lambda done: None)
    utils.set_seed(9)
    rest = DataLoader(Subset(loader.dataset, range(8, 16)), 4)
    means, _ = train_one_epoch(halves, rest, 0, range(2, 4), eta, sums, lambda done: None)
    assert means == expected
    assert torch.equal(weights(halves.model), weights(whole.model))
