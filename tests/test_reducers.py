"""Dropping and merging, worked by hand."""

import pytest
import torch
from dynamicvit.models.pruning import size_bias
from dynamicvit.models.reducers import REDUCERS, Scores, cosine_similarity, drop, lost, merge, unmerge
from dynamicvit.models.restoring import Restorer
from dynamicvit.tools.rivals import PruneAndMerge
from torch import Tensor

# Two prefix tokens, then four patch tokens of two channels
PREFIX = [[9.0, 9.0], [8.0, 8.0]]
PATCHES = [[4.0, 0.0], [0.0, 6.0], [2.0, 1.5], [0.0, 3.0]]
TOKENS = torch.tensor([[*PREFIX, *PATCHES]])
SCORES = torch.tensor([[0.3, 0.4, 0.2, 0.1]])


def random_tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_drop_by_hand() -> None:
    reduced = drop(TOKENS, SCORES, num_keep=2, num_prefix=2)
    assert reduced.kept.tolist() == [[1, 0]]  # best score first
    assert reduced.x.tolist() == [[*PREFIX, [0, 6], [4, 0]]]
    assert reduced.size is None


def test_merge_by_hand() -> None:
    """Patches 1 and 0 stay. 2 points more along 0 than along 1, though its product with 1 is larger; 3 is along 1."""
    size = torch.tensor([[1.0, 2.0, 3.0, 1.0]])
    reduced = merge(TOKENS, SCORES, size, num_keep=2, num_prefix=2)
    assert reduced.kept.tolist() == [[1, 0]]
    assert reduced.place.tolist() == [[1, 0, 1, 0]]  # 2 joins the second of the kept ones, 3 the first
    assert reduced.size.tolist() == [[2 + 1, 1 + 3]]
    first, second = [0, (2 * 6 + 1 * 3) / 3], [(1 * 4 + 3 * 2) / 4, 3 * 1.5 / 4]
    torch.testing.assert_close(reduced.x, torch.tensor([[*PREFIX, first, second]]))


def test_merge_with_weights_of_their_own() -> None:
    """The mean goes by the weights; sizes add up all the same."""
    size, weights = torch.tensor([[1.0, 2.0, 3.0, 1.0]]), torch.tensor([[0.1, 0.4, 0.4, 0.1]])
    reduced = merge(TOKENS, SCORES, size, num_keep=2, num_prefix=2, weights=weights)
    assert reduced.size.tolist() == [[3, 4]]
    first, second = [0, (0.4 * 6 + 0.1 * 3) / 0.5], [(0.1 * 4 + 0.4 * 2) / 0.5, 0.4 * 1.5 / 0.5]
    torch.testing.assert_close(reduced.x, torch.tensor([[*PREFIX, first, second]]))


def test_a_token_that_nothing_joins_stays_as_it_is() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 2.0]]])
    reduced = merge(tokens, torch.tensor([[3.0, 2.0, 1.0]]), torch.ones(1, 3), num_keep=2, num_prefix=0)
    torch.testing.assert_close(reduced.x, torch.tensor([[[1.0, 0.0], [0.05, 1.5]]]))
    assert reduced.size.tolist() == [[1, 2]]


@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_nothing_is_lost_over_many_stages(num_prefix: int) -> None:
    """Sizes add up to the number of patches, and the sum of size times token stays; prefix tokens too."""
    x, size = random_tokens(3, num_prefix + 49, 8), torch.ones(3, 49)
    prefix, total = x[:, :num_prefix], x[:, num_prefix:].sum(dim=1)
    for num_keep in (40, 21, 20, 3, 1):
        scores = random_tokens(3, x.shape[1] - num_prefix)
        x, _, size, _ = merge(x, scores, size, num_keep, num_prefix)
        assert x.shape == (3, num_prefix + num_keep, 8) and size.shape == (3, num_keep)
        assert torch.equal(size.sum(dim=1), torch.full((3,), 49.0))
        torch.testing.assert_close((x[:, num_prefix:] * size[..., None]).sum(dim=1), total)
        assert torch.equal(x[:, :num_prefix], prefix)


def test_keeping_all_merges_nothing() -> None:
    x, scores = random_tokens(2, 6, 4), random_tokens(2, 5)
    reduced = merge(x, scores, torch.ones(2, 5), num_keep=5, num_prefix=1)
    assert torch.equal(reduced.size, torch.ones(2, 5))
    assert torch.equal(reduced.x, drop(x, scores, num_keep=5, num_prefix=1).x)


def test_images_do_not_mix() -> None:
    x, scores = random_tokens(4, 10, 8), random_tokens(4, 9)
    together = merge(x, scores, torch.ones(4, 9), num_keep=4, num_prefix=1)
    for b in range(4):
        alone = merge(x[b : b + 1], scores[b : b + 1], torch.ones(1, 9), num_keep=4, num_prefix=1)
        torch.testing.assert_close(together.x[b : b + 1], alone.x)
        assert torch.equal(together.place[b : b + 1], alone.place)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_finds_the_same_partner(dtype: torch.dtype) -> None:
    """All tokens point nearly the same way, as in a real ViT, with cosines that differ in the fourth digit."""
    tokens = (10 + 0.1 * random_tokens(2, 60, 64)).to(dtype)
    rest, kept = tokens[:, 40:], tokens[:, :40]
    expected = torch.cosine_similarity(rest.double()[:, :, None], kept.double()[:, None], dim=-1).argmax(dim=-1)
    assert torch.equal(cosine_similarity(rest, kept).argmax(dim=-1), expected)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(cosine_similarity(rest.float(), kept.float()).argmax(dim=-1), expected)


def test_large_features_and_sizes_fit_into_float16() -> None:
    x = torch.full((1, 100, 4), 3000.0, dtype=torch.float16)  # their plain sum would be infinite
    reduced = merge(x, torch.arange(100.0)[None], torch.ones(1, 100), num_keep=1, num_prefix=0)
    torch.testing.assert_close(reduced.x, torch.full((1, 1, 4), 3000.0, dtype=torch.float16), rtol=1e-2, atol=0)


def test_size_bias_is_that_many_copies() -> None:
    """softmax(a + log size) by hand: keys of weight e^a, a merged one counted as often as the patches in it."""
    a = torch.tensor([0.0, 1.0, -1.0])  # logits for the class token and two patch tokens
    weights = (a + size_bias(torch.tensor([[3.0, 2.0]]).log(), num_prefix=1)[0, 0, 0]).softmax(dim=0)
    e = 2.718281828
    total = 1 + 3 * e + 2 / e
    torch.testing.assert_close(weights, torch.tensor([1 / total, 3 * e / total, 2 / e / total]))


def test_sizes_and_shares_pass_gradients_on() -> None:
    size = torch.ones(1, 4, requires_grad=True)
    reduced = merge(TOKENS, SCORES, size, num_keep=2, num_prefix=2)
    reduced.x[..., 1].sum().backward()
    assert (size.grad[0] != 0).all()  # of the tokens that joined too


def test_known_similarities_decide_who_joins_whom() -> None:
    """The result is the same if they are the tokens' cosines, and follows them if they are not."""
    x, scores, size = random_tokens(2, 13, 8), random_tokens(2, 12), torch.ones(2, 12)
    plain = merge(x, scores, size, num_keep=5, num_prefix=1)
    patches = x[:, 1:]
    told = merge(x, scores, size, num_keep=5, num_prefix=1, similarity=cosine_similarity(patches, patches))
    assert torch.equal(told.place, plain.place)
    torch.testing.assert_close(told.x, plain.x)
    similarity = torch.zeros(1, 4, 4)
    similarity[0, 2, 1] = similarity[0, 3, 0] = 1.0
    assert merge(TOKENS, SCORES, size[:1, :4], 2, 2, similarity=similarity).place.tolist() == [[1, 0, 0, 1]]


@pytest.mark.parametrize("reducer", ["drop", "merge"])
def test_what_is_lost_gives_each_token_back(reducer: str) -> None:
    """A patch's group plus what it lost by joining is the patch; a dropped one lost all of itself."""
    x, scores = random_tokens(2, 11, 8), random_tokens(2, 9)
    reduced = REDUCERS[reducer](x, Scores(scores), torch.ones(2, 9), 4, 2)
    place, patches, merged = reduced.places(9), x[:, 2:], reduced.x[:, 2:]
    torch.testing.assert_close(unmerge(merged, place) + lost(patches, merged, place), patches)
    copies = unmerge(merged, place)
    for b in range(2):
        for i in range(9):
            group = place[b, i]
            expected = merged[b, group] if group >= 0 else torch.zeros(8)
            assert torch.equal(copies[b, i], expected)
    assert (place < 0).any() == (reducer == "drop")


@pytest.mark.parametrize("restore", ["residual", "copy"])
def test_tokens_come_back_from_a_reducer_that_merges_some_and_drops_others(restore: str) -> None:
    x = random_tokens(2, 7, 8)
    reduced = PruneAndMerge({(6, 2): 4})(x, Scores(torch.arange(6.0).expand(2, -1)), torch.ones(2, 6), 2, 1)
    restorer = Restorer(restore)
    restorer.note(x[:, 1:], reduced, num_prefix=1)
    changed = reduced.x + 1  # by the blocks after the stage
    patches = restorer(changed, num_prefix=1)[:, 1:]
    for b in range(2):
        for i in range(6):
            group = reduced.place[b, i]
            alone = x[b, 1 + i] if group < 0 else x[b, 1 + i] + 1
            expected = changed[b, 1 + group] if restore == "copy" and group >= 0 else alone
            torch.testing.assert_close(patches[b, i], expected)
    assert (reduced.place[0] < 0).tolist() == [True, True, False, False, False, False]


@pytest.mark.parametrize("reducer", ["drop", "merge"])
@pytest.mark.parametrize("restore", ["residual", "copy"])
def test_tokens_come_back_through_two_stages(restore: str, reducer: str) -> None:
    x = random_tokens(2, 11, 8)
    first = REDUCERS[reducer](x, Scores(random_tokens(2, 9)), torch.ones(2, 9), 6, 2)
    second = REDUCERS[reducer](first.x, Scores(random_tokens(2, 6)), torch.ones(2, 6), 3, 2)
    restorer = Restorer(restore)
    restorer.note(x[:, 2:], first, 2, REDUCERS[reducer].drops)
    restorer.note(first.x[:, 2:], second, 2, REDUCERS[reducer].drops)
    restored = restorer(second.x, num_prefix=2)
    places = first.places(9), second.places(6)
    for b in range(2):
        for i in range(9):
            where = [int(places[0][b, i])]
            where += [int(places[1][b, where[0]])] if where[0] >= 0 else [-1]
            if restore == "residual" or where[0] < 0:
                expected = x[b, 2 + i]
            else:  # a token that was dropped at the second stage is what it was there
                expected = second.x[b, 2 + where[1]] if where[1] >= 0 else first.x[b, 2 + where[0]]
            torch.testing.assert_close(restored[b, 2 + i], expected)
