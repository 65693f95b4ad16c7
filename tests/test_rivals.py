"""Others' methods: what they cost by their papers, and what they do to a few tokens."""

from itertools import pairwise

import pytest
import torch
from dynamicvit.models import ModelSpec, Scores, build_model, create_model
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.scorers import Look
from dynamicvit.models.twins import dense_twin
from dynamicvit.tools import rivals
from torch import Tensor


def block_gflops(channels: int, before: int, after: int) -> float:
    """By the papers' formula: attention of all tokens that come in, MLP of those that are left after it."""
    attention = 4 * before * channels**2 + 2 * before**2 * channels
    return (attention + 8 * after * channels**2) / 1e9


def gflops_of(rival: rivals.Rival, channels: int, mlp_of_all: bool = False) -> float:
    """Of a DeiT's blocks at 224 pixels. mlp_of_all: count a block as if nothing had left in it."""
    lengths = [197, *(1 + count for count in rival.counts)]
    return sum(block_gflops(channels, n, n if mlp_of_all else left) for n, left in pairwise(lengths))


def around_blocks(channels: int) -> float:
    return (196 * 768 * channels + 1000 * channels) / 1e9


def test_tome_costs_what_its_paper_says() -> None:
    """DeiT-S, r = 13: 2.7 G (table 4)."""
    assert gflops_of(rivals.tome(12, 196, 13), 384) + around_blocks(384) == pytest.approx(2.7, abs=0.01)


@pytest.mark.parametrize(("channels", "target", "reported"), [(384, 2.9, 2.905), (768, 11.5, 11.517)])
def test_diffrate_costs_what_its_authors_report(channels: int, target: float, reported: float) -> None:
    rival = rivals.diffrate(rivals.DIFFRATE_TOKENS[channels][target], target)
    assert gflops_of(rival, channels) + around_blocks(channels) == pytest.approx(reported, abs=0.001)


@pytest.mark.parametrize(("ratio", "reported"), [(0.875, 2.4105), (0.9, 2.6982), (0.925, 3.0689), (0.95, 3.4825)])
def test_pitome_costs_what_its_authors_report(ratio: float, reported: float) -> None:
    """DeiT-S. They count each block by the tokens that come to it, and blocks alone."""
    assert gflops_of(rivals.pitome(12, 196, ratio), 384, mlp_of_all=True) == pytest.approx(reported, abs=0.0001)


def test_every_published_schedule_costs_what_it_is_for() -> None:
    for channels, schedules in rivals.DIFFRATE_TOKENS.items():
        for target, published in schedules.items():
            gflops = gflops_of(rivals.diffrate(published, target), channels) + around_blocks(channels)
            assert gflops == pytest.approx(target, rel=0.1 if channels == 192 else 0.02)


@pytest.mark.parametrize("name", ["tome", "pitome", "diffrate"])
def test_models_cost_what_the_formula_says(name: str) -> None:
    """Beside their scores and matches, 3 % at most."""
    rival = {
        "tome": lambda: rivals.tome(12, 196, 13),
        "pitome": lambda: rivals.pitome(12, 196, 0.9),
        "diffrate": lambda: rivals.diffrate(rivals.DIFFRATE_TOKENS[384][2.9], 2.9),
    }[name]()
    with torch.device("meta"):
        model = rivals.make_rival(create_model("deit_small", dense=True), rival)
    expected = gflops_of(rival, 384) + around_blocks(384)
    assert expected < count_gflops(model, 224) < 1.03 * expected
    assert model.tokens_kept(196) == list(rival.counts)


def look(keys: Tensor) -> Look:
    """Of one image, with a class token before (N, D) keys."""
    attention = type("Attention", (), {"keys": torch.cat([torch.zeros_like(keys[:1]), keys])[None, None]})
    return Look(torch.zeros(1, len(keys) + 1, 1), 1, None, True, 1, [attention])


def test_tome_merges_the_most_similar_pair_by_size() -> None:
    """Tokens 1 and 3 look among 0, 2, 4. Token 3 is closest, to 4; token 1's best is 0, less alike."""
    keys = torch.tensor([[1.0, 0.0], [0.9, 0.5], [-1.0, 0.2], [0.1, 1.0], [0.0, 1.0]])
    x = torch.tensor([[[7.0], [10.0], [20.0], [30.0], [40.0], [60.0]]])  # the class token's first
    size = torch.tensor([[1.0, 1.0, 2.0, 3.0, 1.0]])
    scores = rivals.KeyScorer()(look(keys), None)
    merged = rivals.BipartiteReducer()(x, scores, size, num_keep=4, num_prefix=1)
    assert merged.x.flatten().tolist() == pytest.approx([7, 20, 10, 30, 45])  # 45 = (3 * 40 + 60) / 4
    assert merged.size.tolist() == [[1, 1, 2, 4]]
    assert merged.kept.tolist() == [[1, 0, 2, 4]] and merged.place.tolist() == [[1, 0, 2, 3, 3]]
    assert scores.scores.topk(4).indices.sort().values.tolist() == [[0, 1, 2, 4]], "the best scored stay"
    merged = rivals.BipartiteReducer()(x, scores, size, num_keep=3, num_prefix=1)
    assert merged.x.flatten().tolist() == pytest.approx([7, 15, 30, 45])
    assert merged.size.tolist() == [[2, 2, 4]]


def test_pitome_merges_what_is_like_many() -> None:
    """Tokens 0, 1, 2, 4 are a crowd, and 3 is like nobody: the crowd's four of most energy become two."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [-1.0, 1.0], [1.0, 0.3]])
    scores = rivals.EnergyScorer({5: 0.9})(look(keys), None)
    assert scores.scores.argmax().item() == 3
    similarity = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
    above, below = similarity - 0.9, (similarity - 0.9).exp() - 1
    torch.testing.assert_close(-scores.scores[0], torch.where(above >= 0, above, below).mean(dim=1))

    x = torch.tensor([[[7.0], [10.0], [20.0], [30.0], [40.0], [60.0]]])
    merged = rivals.EnergyReducer(early=set())(x, scores, torch.ones(1, 5), num_keep=3, num_prefix=1)
    order = scores.scores.argsort()[0].tolist()
    assert order[4] == 3 and set(merged.kept[0].tolist()) == {3, order[1], order[3]}
    assert merged.x[0, 1] == 40 and merged.size.sum() == 5
    assert merged.x[0, 1:, 0] @ merged.size[0] == pytest.approx(160), "means by size"
    groups = merged.kept.gather(1, merged.place)[0].tolist()  # of each token, the kept one that it is part of
    assert all(groups[i] in (order[1], order[3]) for i in (order[0], order[2]))

    # early, among all: the one pair that is most alike
    merged = rivals.EnergyReducer(early={5})(x, scores, torch.ones(1, 5), num_keep=4, num_prefix=1)
    pairs = [(i, j) for i in order[::2] for j in order[1::2]]
    one, other = max(pairs, key=lambda pair: similarity[pair])
    groups = merged.kept.gather(1, merged.place)[0].tolist()
    assert groups == [other if i == one else i for i in range(5)]


def test_diffrate_drops_then_merges() -> None:
    """By importance 2, 0, 3, 4, 1: token 1 is dropped, 4 joins 0 and 3 joins 2, at half the size as half alike."""
    x = torch.tensor([[[9.0, 9.0], [0.0, 2.0], [5.0, 5.0], [1.0, 0.0], [1.0, 3.0**0.5], [0.0, 4.0]]])
    scores = Scores(torch.tensor([[0.8, 0.1, 0.9, 0.5, 0.4]]))
    x[0, 4] = torch.tensor([3.0**0.5, 1.0])  # token 3: 30 degrees from token 2
    merged = rivals.PruneAndMerge({(5, 2): 4})(x, scores, torch.tensor([[1.0, 1, 1, 2, 3]]), num_keep=2, num_prefix=1)
    assert merged.kept.tolist() == [[2, 0]]
    assert merged.place.tolist() == [[1, -1, 0, 0, 1]]
    expected = torch.tensor([[[9.0, 9.0], [(1 + 3**0.5) / 2, 0.5], [0.0, 3.0]]])
    torch.testing.assert_close(merged.x, expected)
    torch.testing.assert_close(merged.size, torch.tensor([[1 + 2 * 3**0.5 / 2, 1 + 3.0]]))


def small_dense(arch: str = "deit_tiny", **changes: object) -> torch.nn.Module:
    torch.manual_seed(1)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    model = create_model(arch, num_classes=5, dense=True, **{**sizes, **changes}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("build", [rivals.tome, rivals.pitome])
def test_merged_tokens_count_by_their_size(build) -> None:
    """Equal patches that become one token: the answer stays."""
    model = small_dense(depth=2)
    x = torch.randn(2, 3, 32, 32)
    x[:, :, :, 8:16] = x[:, :, :, :8]  # patches 0 and 1, 4 and 5, ... are equal
    x[:, :, :, 24:] = x[:, :, :, 16:24]
    model.pos_embed.data.zero_()
    rival = rivals.make_rival(dense_twin(model), build(2, 16, 4 if build is rivals.tome else 0.9)).eval()
    with torch.no_grad():
        torch.testing.assert_close(rival(x), model(x), atol=1e-4, rtol=1e-4)


def test_the_nearest_cost_is_taken() -> None:
    spec = small_dense().spec
    costs = [count_gflops(rivals.make_rival(small_dense(), rivals.tome(4, 16, r)), 32) for r in range(9)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[1] > costs[2]
    for gflops, r in (
        (0.6 * costs[1] + 0.4 * costs[2], 1),
        (0.4 * costs[1] + 0.6 * costs[2], 2),
        (2 * costs[0], 0),
        (0.0, costs.index(costs[-1])),
    ):
        assert rivals.nearest("tome", spec, gflops).label == f"ToMe, r = {r}"
    with pytest.raises(ValueError, match="published for DeiT-T"):
        rivals.nearest("diffrate", spec, costs[1])
    assert rivals.nearest("diffrate", ModelSpec("deit_tiny"), 0.83).label == "DiffRate, 0.8 G"
    swin = build_model(ModelSpec("swin_t", num_classes=3, img_size=64, sizes={"embed_dim": 8})).spec
    with pytest.raises(ValueError):
        rivals.nearest("tome", swin, 0.1)


@pytest.mark.parametrize(
    "rival", [rivals.tome(4, 16, 2), rivals.pitome(4, 16, 0.8), rivals.diffrate(("17 14 9 5", "17 12 7 5"), 0.1)]
)
def test_rivals_are_one_graph(rival: rivals.Rival) -> None:
    """For tools.benchmark --compile."""
    torch.compiler.reset()  # other models of this process have been compiled, and there is a limit for all
    model = rivals.make_rival(small_dense(), rival)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(compiled(x), model(x))
