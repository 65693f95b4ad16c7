"""What each scorer gives for queries and keys worked out by hand, and that a model asks the right block."""

import math

import pytest
import torch
from dynamicvit.models import create_model
from dynamicvit.models.reducers import merge
from dynamicvit.models.scorers import (
    Look,
    class_attention,
    distinct,
    distinct_scores,
    outlying,
    random_scores,
    received_attention,
)
from timm.layers import Attention
from torch import Tensor, nn

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 5, "embed_dim": 32, "depth": 4, "num_heads": 2}


def test_class_attention_by_hand() -> None:
    """One image, two heads of one channel, the class token and two patches."""
    query = torch.tensor([[[[1.0]], [[2.0]]]])  # (1, 2, 1, 1)
    keys = torch.tensor([[[[0.0], [2.0], [4.0]], [[1.0], [0.0], [0.0]]]])  # (1, 2, 3, 1)
    e = math.e
    # scaled by 1/2: logits 0, 1, 2 in the first head, 1, 0, 0 in the second
    first = torch.tensor([e, e**2]) / (1 + e + e**2)
    second = torch.tensor([1.0, 1.0]) / (e + 2)
    scores = class_attention(query, keys, scale=0.5, num_prefix=1)
    torch.testing.assert_close(scores[0], (first + second) / 2)
    # the first patch token stands for three
    first = torch.tensor([3 * e, e**2]) / (1 + 3 * e + e**2)
    second = torch.tensor([3.0, 1.0]) / (e + 4)
    scores = class_attention(query, keys, 0.5, 1, log_size=torch.tensor([[1.0, 3.0, 1.0]]).log())
    torch.testing.assert_close(scores[0], (first + second) / 2)


def test_received_attention_by_hand() -> None:
    """One head; a register, which does not count as asking, and two patches with queries 0 and 1."""
    queries, keys = torch.tensor([[[[5.0], [0.0], [1.0]]]]), torch.tensor([[[[0.0], [1.0], [2.0]]]])
    e = math.e
    asked_by_0, asked_by_1 = torch.full((2,), 1 / 3), torch.tensor([e, e**2]) / (1 + e + e**2)
    scores = received_attention(queries, keys, scale=1.0, num_prefix=1)
    torch.testing.assert_close(scores[0], (asked_by_0 + asked_by_1) / 2)
    # the second patch token stands for three: it is seen three times, and asks three times
    asked_by_0, asked_by_1 = torch.tensor([1, 3]) / 5, torch.tensor([e, 3 * e**2]) / (1 + e + 3 * e**2)
    scores = received_attention(queries, keys, 1.0, 1, log_size=torch.tensor([[1.0, 1.0, 3.0]]).log())
    torch.testing.assert_close(scores[0], (asked_by_0 + 3 * asked_by_1) / 4)


def test_keys_shared_by_several_query_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 4, 1, 8, generator=generator), torch.randn(2, 2, 6, 8, generator=generator)
    scores = class_attention(query, keys, 0.3, 1)
    expected = class_attention(query, keys[:, [0, 0, 1, 1]], 0.3, 1)
    assert torch.equal(scores, expected)


def test_distinct_scores_by_hand() -> None:
    """Tokens at 0, 0, 90 and 60 degrees: the second looks like the first, which is more important."""
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.5, math.sqrt(0.75)]]])
    importance = torch.tensor([[0.4, 0.3, 0.1, 0.2]])
    # the most important one has none above it; the third is 30 degrees from the fourth, that 60 from the first
    expected = torch.tensor([0.4 * 2, 0.3 * 0, 0.1 * (1 - math.sqrt(0.75)), 0.2 * (1 - 0.5)])
    torch.testing.assert_close(distinct_scores(importance, tokens)[0], expected)


def test_outlying_by_hand() -> None:
    """The mean of one token along x and two (merged) along y is (1, 2) / 3; cosines with it 1 and 2 over sqrt 5."""
    scores = outlying(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(scores[0], torch.tensor([1 - 1 / math.sqrt(5), 2 * (1 - 2 / math.sqrt(5))]))


def test_random_scores_are_of_a_token_not_of_its_place() -> None:
    torch.manual_seed(0)
    scores = random_scores(torch.zeros(500, 4, 3))
    assert scores.shape == (500, 4)
    assert scores.argmax(dim=1).bincount().min() > 90  # of 125 expected


class Whole(nn.Module):
    """timm's attention, that also keeps its weights: what fused attention does not give away."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, attn_mask: Tensor | None) -> Tensor:
        heads = self.attention.num_heads
        q, k, _ = self.attention.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return (logits + (0 if attn_mask is None else attn_mask)).softmax(dim=-1)


@pytest.mark.parametrize("reducer", ["drop", "merge"])
def test_model_scores_by_the_block_before_the_stage(reducer: str) -> None:
    """Against the whole attention matrix of the blocks before the stages, sizes and all."""
    torch.manual_seed(0)
    model = create_model(
        "deit_small", pruning_loc=(2, 3), keep_rates=(0.6, 0.4), scorer="attention", reducer=reducer, **TINY
    )
    for parameter in model.blocks.parameters():
        nn.init.normal_(parameter, std=0.2)
    seen = []
    for i in (1, 2):
        attention = Whole(model.blocks[i].attn)
        model.blocks[i].attn.register_forward_pre_hook(
            lambda _, args, kwargs, attention=attention: seen.append(attention(args[0], kwargs["attn_mask"])),
            with_kwargs=True,
        )
    with torch.no_grad():
        trace = model.eval().trace(torch.randn(2, 3, 32, 32))
    for stage, weights in enumerate(seen):
        expected = weights.mean(dim=1)[:, 0, 1:]
        scores = trace.scores[:, stage]
        if stage:
            assert scores.isnan().sum() == 2 * (16 - 9)
            scores = scores.gather(1, trace.kept[0])
        torch.testing.assert_close(scores, expected)
        best = trace.scores[:, stage].nan_to_num(-1).topk((9, 6)[stage], dim=1).indices
        assert torch.equal(trace.kept[stage], best)


@pytest.mark.parametrize("scorer", ["attention", "distinct", "distinct_few", "outlying", "random"])
def test_scorers_without_parameters(scorer: str) -> None:
    dense = create_model("deit_small", dense=True, **TINY)
    model = create_model("deit_small", scorer=scorer, pruning_loc=(1,), **TINY)
    assert model.scorer == scorer and model.reducer == "drop"
    assert list(model.state_dict()) == list(dense.state_dict())


def test_published_form_is_the_default() -> None:
    model = create_model("deit_small", pruning_loc=(1,), **TINY)
    assert (model.scorer, model.reducer) == ("predictor", "drop")
    assert any(name.startswith("score_predictor.0.") for name in model.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scorer": "attention", "pruning_loc": (0, 2)}, "first stage must be 1 or later"),
        ({"scorer": "distinct", "pruning_loc": (0, 2)}, "the distinct scorer reads"),
        (
            {"scorer": "attentive"},
            "unknown scorer 'attentive'; known: predictor, attention, distinct",
        ),
        ({"reducer": "melt"}, "unknown reducer 'melt'; known: drop, merge"),
    ],
)
def test_misfits(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("deit_small", **(TINY | {"pruning_loc": (1, 2)} | changes))


def test_only_the_least_important_are_compared() -> None:
    """Twice as many as leave; the others stay in any case, and these few leave as distinct ranks them."""
    generator = torch.Generator().manual_seed(0)
    x, importance = torch.randn(2, 11, 8, generator=generator), torch.rand(2, 10, generator=generator)
    look = Look(x, 1, None, True, num_keep=7, attention=[])
    few, whole = distinct(importance, look, importance, compared=2), distinct(importance, look, importance)
    least = importance.argsort(dim=1)[:, :6]
    assert torch.equal(few.rows.sort(dim=1).values, least.sort(dim=1).values)
    torch.testing.assert_close(few.scores.gather(1, least), whole.scores.gather(1, least))
    others = importance.argsort(dim=1)[:, 6:]
    assert (few.scores.gather(1, others).amin(dim=1) > few.scores.gather(1, least).amax(dim=1)).all()
    reduced = merge(x, few.scores, torch.ones(2, 10), 7, 1, importance, few.similarity, few.rows)
    told = merge(x, few.scores, torch.ones(2, 10), 7, 1, importance, whole.similarity)
    assert torch.equal(reduced.place, told.place)
    torch.testing.assert_close(reduced.x, told.x)
