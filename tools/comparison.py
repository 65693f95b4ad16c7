"""How similar a faster model is to its dense self: the figures of a report, each with its standard error."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from dynamicvit.datasets import BatchTransform
from dynamicvit.engine import autocast, count_not_finite
from dynamicvit.errors import UserError
from dynamicvit.losses import cosine_distance, kl_divergence
from dynamicvit.models import ModelSpec, gives_embeddings
from dynamicvit.models.huggingface import answer_of
from torch import Tensor, nn

DENSE, MERGED, TUNED = "dense", "merged", "fine-tuned"
PERCENT = 100
DECIMALS = {"agreement": 1, "kl": 4, "cosine": 4, "worst": 4, "neighbour": 1, "top1": 1}
NAMES = {
    "agreement": "agreement",
    "kl": "KL",
    "cosine": "mean cosine",
    "worst": "worst tenth",
    "neighbour": "same nearest neighbour",
    "top1": "top-1",
}

Row = dict[str, float]  # of the table: figures by name, standard errors as name_error


class Answers(NamedTuple):
    """A model's outputs for the images held back."""

    outputs: Tensor  # (N, classes) logits, (N, C) embeddings or (N, T, C) features of T tokens, float32
    labels: Tensor  # (N,), IGNORED_LABEL where there are none


@dataclass(frozen=True)
class Likeness:
    """How two models are compared, and what a report says about it; one of these for each kind of output."""

    measure: str  # the figure that decides which of two models is more like the dense one
    figures: Callable[[Answers, Tensor], dict[str, Tensor]]  # answers, dense outputs -> (N,) by name; bool for shares
    distance: Callable[[Tensor, Tensor], Tensor]  # of outputs and the dense ones -> (N,), 0 where they are the same
    sentence: str  # with the row's figures in it
    explanation: str  # of the measure

    @property
    def larger_is_better(self) -> bool:
        return self.measure == "cosine"


def compare_classes(answers: Answers, dense: Tensor) -> dict[str, Tensor]:
    outputs, labels = answers
    answer = outputs.argmax(dim=1)
    figures = {"agreement": answer == dense.argmax(dim=1), "kl": kl_divergence(outputs, dense)}
    labelled = (labels >= 0) & (labels < outputs.shape[1])
    return figures | ({"top1": (answer == labels)[labelled]} if labelled.any() else {})


def compare_embeddings(answers: Answers, dense: Tensor) -> dict[str, Tensor]:
    return {"cosine": 1 - cosine_distance(answers.outputs, dense), "neighbour": same_neighbour(answers.outputs, dense)}


def compare_features(answers: Answers, dense: Tensor) -> dict[str, Tensor]:
    cosines = token_cosines(answers.outputs, dense)
    return {"cosine": cosines.mean(dim=1), "worst": worst_tenth(cosines)}


def worst_tenth(cosines: Tensor) -> Tensor:
    """(N, T) of each image's tokens -> (N,) the mean over the tenth of them that changed most."""
    return cosines.topk(math.ceil(cosines.shape[1] / 10), dim=1, largest=False).values.mean(dim=1)


def token_cosines(outputs: Tensor, dense: Tensor) -> Tensor:
    """(N, T, C) features, twice -> (N, T); image by image, as those of many images are large."""
    return torch.stack([1 - cosine_distance(*pair) for pair in zip(outputs, dense, strict=True)])


def feature_distance(outputs: Tensor, dense: Tensor) -> Tensor:
    return 1 - token_cosines(outputs, dense).mean(dim=1)


def same_neighbour(outputs: Tensor, dense: Tensor) -> Tensor:
    """(N, C) embeddings, twice -> (N,) whether an image's nearest other image is the same one, by cosine."""
    nearest = []
    for embeddings in (outputs, dense):
        embeddings = F.normalize(embeddings, dim=1)
        nearest.append((embeddings @ embeddings.T).fill_diagonal_(-math.inf).argmax(dim=1))
    return nearest[0] == nearest[1]


CLASSES = Likeness(
    measure="kl",
    figures=compare_classes,
    distance=kl_divergence,
    sentence="its answer is the dense model's on {agreement} of {images} images",
    explanation="KL (Kullback-Leibler divergence, dense to faster model, in nats) tells how far its probabilities "
    "are from the dense model's: 0 where they are the same, 0.08 where 70 % of two classes has become 50 %.",
)
EMBEDDINGS = Likeness(
    measure="cosine",
    figures=compare_embeddings,
    distance=cosine_distance,
    sentence="its embeddings have a mean cosine of {cosine} to the dense model's on {images} images",
    explanation="The cosine of two embeddings is 1 where they point the same way; the nearest neighbour is the other "
    "image held back whose embedding is most similar.",
)


FEATURES = Likeness(
    measure="cosine",
    figures=compare_features,
    distance=feature_distance,
    sentence="its features have a mean cosine of {cosine} to the dense model's, and {worst} in the worst tenth of each "
    "image's tokens, on {images} images",
    explanation="The cosine of two features is 1 where they point the same way. It is taken token by token (those of "
    "all patches, the class token and registers); the worst tenth are the tokens of an image that have changed most.",
)


def likeness_of(spec: ModelSpec, features: bool = False) -> Likeness:
    """How a model's outputs, or its features, are compared."""
    if features:
        return FEATURES
    return EMBEDDINGS if gives_embeddings(spec) else CLASSES


def summarise(values: Tensor) -> tuple[float, float]:
    """Mean and standard error of (N,) numbers; of bools their share in percent.

    A share of all or none has no spread, and yet is not certain: its error is that of a share with one more image
    of each kind (Laplace), so that "100 %" of 26 images is 100 +- 3.6 %.
    """
    count = len(values)
    if values.dtype == torch.bool:
        share = (values.sum().item() + 1) / (count + 2)
        return PERCENT * values.double().mean().item(), PERCENT * math.sqrt(share * (1 - share) / count)
    values = values.double()
    return values.mean().item(), (values.std() / math.sqrt(count)).item() if count > 1 else math.inf


@dataclass
class Comparison:
    """The dense model's answers beside those of the faster ones, on the images held back."""

    likeness: Likeness
    gflops: dict[str, float]  # by "dense" and "dynamic"
    answers: dict[str, Answers] = field(default_factory=dict)  # by name, the dense model's first
    rows: dict[str, Row] = field(default_factory=dict)

    def add(self, name: str, answers: Answers) -> str:
        """Returns what the comparison says, in words. Raises UserError for outputs that are not finite."""
        check_finite(name, answers.outputs)
        self.answers[name] = answers
        row: Row = {"images": len(answers.outputs)}
        for figure, values in self.likeness.figures(answers, self.answers[DENSE].outputs).items():
            row[figure], error = summarise(values)
            if math.isfinite(error) and (name != DENSE or figure == "top1"):  # else it is compared with itself
                row[f"{figure}_error"] = error
        self.rows[name] = row | {"gflops": self.gflops["dense" if name == DENSE else "dynamic"]}
        return f"{name}: " + ", ".join(f"{NAMES[figure]} {in_words(row, figure)}" for figure in NAMES if figure in row)

    @property
    def best(self) -> str:
        """Of the faster models, the one most like the dense one."""
        sign = 1 if self.likeness.larger_is_better else -1
        fast = [name for name in self.rows if name != DENSE]
        return max(fast, key=lambda name: sign * self.rows[name][self.likeness.measure])


def in_words(row: Row, figure: str) -> str:
    """With its standard error: 96.5 +- 0.5 %."""
    decimals, unit = DECIMALS[figure], " %" if figure in ("agreement", "neighbour", "top1") else ""
    error = row.get(f"{figure}_error", math.inf)
    spread = f" +- {error:.{decimals}f}" if math.isfinite(error) else ""
    return f"{row[figure]:.{decimals}f}{spread}{unit}"


def check_finite(name: str, outputs: Tensor) -> None:
    if bad := int(count_not_finite(outputs)):
        raise UserError(
            f"the {name} model's answers to {bad} of {len(outputs)} images are not finite (NaN or "
            "infinite): its weights are damaged, or too large for the precision"
        )


@torch.inference_mode()
def predict_all(
    model: nn.Module, batches: Iterable, preprocessing: BatchTransform, amp_dtype: torch.dtype | None
) -> Answers:
    """A model's outputs for all the batches, in float32. Nothing waits for a GPU before the end."""
    outputs, labels = [], []
    model.eval()
    for images, batch_labels in batches:
        with autocast(preprocessing.device, amp_dtype):
            outputs.append(answer_of(model(preprocessing(images))).float())
        labels.append(batch_labels)
    return Answers(torch.cat(outputs).cpu(), torch.cat(labels))
