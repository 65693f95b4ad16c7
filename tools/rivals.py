"""Others' ways to reduce tokens, as scorers and reducers, written from their papers: what tools.sweep compares with.

ToMe (ICLR 2023, arXiv 2210.09461), DiffRate (ICCV 2023, arXiv 2305.17997) and PiToMe (NeurIPS 2024, arXiv 2405.16148)
reduce tokens inside every block, between attention and MLP, and weigh attention by token size. Their last block
computes every token, as in their figures. Shapes: B images, N patch tokens that come to a block, K that are kept.
"""

import functools
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from dynamicvit.models import ModelSpec, Reduced, Reducer, Scorer, Scores, build_model
from dynamicvit.models.dynamic import Plan
from dynamicvit.models.families import family_of
from dynamicvit.models.flops import count_gflops
from dynamicvit.models.reducers import cosine_similarity, merge_groups, select_tokens
from dynamicvit.models.scorers import AttentionScorer, Look
from dynamicvit.tools.diffrate_tokens import DIFFRATE_TOKENS
from torch import Tensor, nn

RIVALS = {"tome": "ToMe", "pitome": "PiToMe", "diffrate": "DiffRate"}
LARGEST_MARGIN = 0.95  # of PiToMe, in the first block; towards 0 in the last
RATIO_STEPS = 250  # in which PiToMe's ratio is chosen, from 0.5 to 1


@dataclass(frozen=True)
class Rival:
    """How a method reduces the tokens of one backbone."""

    label: str
    counts: tuple[int, ...]  # patch tokens left after each block
    scorer: Scorer
    reducer: Reducer

    def keep_rates(self, num_patches: int) -> tuple[float, ...]:
        """Keep rates by which a dynamic model keeps exactly these counts."""
        return tuple(min(1.0, (count + 0.5) / num_patches) for count in self.counts)


def make_rival(vit: nn.Module, rival: Rival) -> nn.Module:
    """Makes a dense model the rival's, in place. Raises ValueError where its blocks have no place inside."""
    rates = rival.keep_rates(vit.patch_embed.num_patches)
    plan = Plan(tuple(range(len(rates))), rates, rival.scorer, rival.reducer, "inside")
    return family_of(vit).make_dynamic(vit, plan)


# --- ToMe


class KeyScorer(Scorer):
    """The distance of every second token to the most similar one among the others, by the mean of the heads' keys.

    The others, the first, third, ... token, never leave: their score is beyond every distance. Only the similarities
    that matter are computed, so only BipartiteReducer can use them.
    """

    name = "keys"
    published = True

    def reads_attention(self, has_class_token: bool) -> bool:
        return True

    def __call__(self, look: Look, module: None) -> Scores:
        keys = mean_keys(look)
        similarity = cosine_similarity(keys[:, 1::2], keys[:, ::2])
        scores = torch.full(keys.shape[:2], 2.0, device=keys.device)
        scores[:, 1::2] = 1 - similarity.amax(dim=-1)
        return Scores(scores, similarity=similarity)


class BipartiteReducer(Reducer):
    """Bipartite soft matching (ToMe, section 3): the pairs that are most alike become one token each.

    Needs KeyScorer's similarities, and tokens whose neighbours are neighbours.
    """

    name = "bipartite"
    merges = True

    def __call__(self, x: Tensor, scores: Scores, size: Tensor, num_keep: int, num_prefix: int) -> Reduced:
        batch, num_patches = size.shape
        num_merging = num_patches - num_keep
        similarity, match = scores.similarity.max(dim=-1)
        order = similarity.argsort(dim=1, descending=True)
        merging = order[:, :num_merging]
        left = order[:, num_merging:].sort(dim=1).values  # neighbours stay neighbours
        firsts = torch.arange(0, num_patches, 2, device=x.device).expand(batch, -1)
        kept = torch.cat([2 * left + 1, firsts], dim=1)
        target = left.shape[1] + match.gather(1, merging)
        return merge_groups(x, places(kept, 2 * merging + 1, target), kept, size, num_prefix)


def tome(depth: int, num_patches: int, r: int) -> Rival:
    """r tokens merge in every block, but never more than half of them."""
    counts = []
    for _ in range(depth):
        num_patches -= min(r, num_patches // 2)
        counts.append(num_patches)
    return Rival(f"ToMe, r = {r}", tuple(counts), KeyScorer(), BipartiteReducer())


# --- PiToMe


class EnergyScorer(Scorer):
    """How little a token is like the others (PiToMe, section 3.2): minus its energy, the mean over all tokens of their
    similarity above a margin, where what lies below it counts less and less.

    margins: by the number of tokens that come to a block, as the margin falls from block to block.
    """

    name = "energy"
    published = True

    def __init__(self, margins: Mapping[int, float]) -> None:
        self.margins = margins

    def reads_attention(self, has_class_token: bool) -> bool:
        return True

    def __call__(self, look: Look, module: None) -> Scores:
        keys = mean_keys(look)
        similarity = cosine_similarity(keys, keys)
        margin = self.margins[keys.shape[1]]
        energy = F.elu(similarity - margin).mean(dim=-1)
        return Scores(-energy, similarity=similarity)


class EnergyReducer(Reducer):
    """Pairs of tokens with much energy merge: every second one, by energy, joins the most similar of the others.

    As the authors' code does it for DeiT: in late blocks only among the tokens with the most energy, twice as many as
    have to go, so that the others are protected; in early blocks among all, and the pairs that are most alike merge.
    early: the numbers of tokens that come to the early blocks.
    """

    name = "energy_merge"
    merges = True

    def __init__(self, early: Set[int]) -> None:
        self.early = early

    def __call__(self, x: Tensor, scores: Scores, size: Tensor, num_keep: int, num_prefix: int) -> Reduced:
        num_patches = size.shape[1]
        num_merging = num_patches - num_keep
        order = scores.scores.argsort(dim=1)
        if num_merging == 0:
            return merge_groups(x, places(order, order[:, :0], order[:, :0]), order, size, num_prefix)
        paired = num_patches if num_patches in self.early else 2 * num_merging
        ones, others, protected = order[:, :paired:2], order[:, 1:paired:2], order[:, paired:]
        rows = scores.similarity.gather(1, ones[..., None].expand(-1, -1, num_patches))
        between = rows.gather(2, others[:, None].expand(-1, ones.shape[1], -1))
        likeness, nearest = between.max(dim=-1)
        alike = likeness.argsort(dim=1, descending=True)
        merging, left = alike[:, :num_merging], alike[:, num_merging:]
        kept = torch.cat([protected, ones.gather(1, left), others], dim=1)
        target = num_keep - others.shape[1] + nearest.gather(1, merging)
        return merge_groups(x, places(kept, ones.gather(1, merging), target), kept, size, num_prefix)


def pitome(depth: int, num_patches: int, ratio: float) -> Rival:
    """Every block keeps this share of its tokens, half of them at least."""
    counts, margins, early = [], {}, set()
    for block in range(depth):
        margins.setdefault(num_patches, LARGEST_MARGIN * (1 - block / depth))
        if block < depth / 2:
            early.add(num_patches)
        num_patches -= int(num_patches - num_patches * ratio)
        counts.append(num_patches)
    return Rival(f"PiToMe, ratio {ratio:.3g}", tuple(counts), EnergyScorer(margins), EnergyReducer(early))


# --- DiffRate


class ImportanceScorer(AttentionScorer):
    """Class attention."""

    name = "class_attention"
    published = True


class PruneAndMerge(Reducer):
    """The least important tokens are dropped; of the rest the less important join the kept one most like them.

    A group becomes the plain mean of its tokens. In its size those that joined count by their similarity.
    pruned: by the numbers of tokens that come in and that are kept, how many are left between dropping and merging.
    """

    name = "prune_and_merge"
    merges = True

    def __init__(self, pruned: Mapping[tuple[int, int], int]) -> None:
        self.pruned = pruned

    def __call__(self, x: Tensor, scores: Scores, size: Tensor, num_keep: int, num_prefix: int) -> Reduced:
        batch, num_patches = size.shape
        order = scores.scores.argsort(dim=1, descending=True)[:, : self.pruned[num_patches, num_keep]]
        x = select_tokens(x, order, num_prefix)
        tokens = x[:, num_prefix:]
        numbers = torch.arange(num_keep, device=x.device).expand(batch, -1)
        place, ordered = numbers, size.gather(1, order)
        if order.shape[1] > num_keep:
            likeness, nearest = cosine_similarity(tokens[:, num_keep:], tokens[:, :num_keep]).max(dim=-1)
            place = torch.cat([numbers, nearest], dim=1)
            ordered = torch.cat([ordered[:, :num_keep], ordered[:, num_keep:] * likeness.clamp(min=0)], dim=1)
        merged = merge_groups(x, place, numbers, ordered, num_prefix, weights=torch.ones_like(ordered))
        everywhere = order.new_full((batch, num_patches), -1).scatter(1, order, place)
        return Reduced(merged.x, order[:, :num_keep], merged.size, everywhere)


def diffrate(published: tuple[str, str], gflops: float) -> Rival:
    """One of DIFFRATE_TOKENS."""
    counts, pruned = [], {}
    num_patches = int(published[0].split()[0]) - 1
    for after_pruning, after_merging in zip(*(map(int, words.split()) for words in published), strict=True):
        left = min(num_patches, after_pruning - 1)
        kept = min(left, after_merging - 1)
        pruned[num_patches, kept] = left
        counts.append(kept)
        num_patches = kept
    return Rival(f"DiffRate, {gflops} G", tuple(counts), ImportanceScorer(), PruneAndMerge(pruned))


# --- At a given cost


def nearest(name: str, spec: ModelSpec, gflops: float) -> Rival:
    """The setting of "tome", "pitome" or "diffrate" for which a backbone's cost comes nearest.

    spec: of the backbone. Raises ValueError if the method is not for it.
    """
    with torch.device("meta"):
        vit = build_model(spec.as_dense())
    depth, num_patches = len(getattr(vit, "blocks", ())), getattr(getattr(vit, "patch_embed", None), "num_patches", 0)
    if name == "diffrate":
        settings = diffrate_settings(vit, depth, num_patches)
    elif name == "tome":
        settings = [lambda r=r: tome(depth, num_patches, r) for r in range(num_patches // 2 + 1)]
    else:
        ratios = (1 - step / (2 * RATIO_STEPS) for step in range(RATIO_STEPS + 1))
        settings = [lambda ratio=ratio: pitome(depth, num_patches, ratio) for ratio in ratios]

    model = make_rival(vit, settings[0]())

    def cost(setting: Callable[[], Rival]) -> float:
        rival = setting()
        model.scorer, model.reducer = rival.scorer, rival.reducer
        model.set_keep_rates(rival.keep_rates(num_patches))
        return count_gflops(model, vit.spec.img_size)

    return nearest_of(settings, cost, gflops)()


def nearest_of(settings: Sequence[Callable], cost: Callable, gflops: float) -> Callable:
    """The nearest of settings whose cost falls."""
    known = functools.cache(cost)
    first_below = bisect_left(settings, -gflops, key=lambda setting: -known(setting))
    return min(settings[max(0, first_below - 1) : first_below + 1], key=lambda setting: abs(known(setting) - gflops))


def diffrate_settings(vit: nn.Module, depth: int, num_patches: int) -> list[Callable[[], Rival]]:
    """From the dearest to the cheapest."""
    published = DIFFRATE_TOKENS.get(getattr(vit, "embed_dim", 0))
    if published is None or depth != 12 or num_patches != 196 or getattr(vit, "cls_token", None) is None:
        raise ValueError("DiffRate's token counts are published for DeiT-T, DeiT-S and DeiT-B at 224 pixels")
    return [lambda g=gflops: diffrate(published[g], g) for gflops in sorted(published, reverse=True)]


def mean_keys(look: Look) -> Tensor:
    """(B, N, D) the patch tokens' keys, mean over the heads."""
    return look.mean_over_attentions(lambda attention: attention.keys.mean(dim=1))[:, look.num_prefix :]


def places(kept: Tensor, merging: Tensor, target: Tensor) -> Tensor:
    """(B, K) kept tokens, (B, M) those that merge, (B, M) into which of the K -> (B, K+M) places of all."""
    batch, num_keep = kept.shape
    place = kept.new_empty(batch, num_keep + merging.shape[1])
    place = place.scatter(1, kept, torch.arange(num_keep, device=kept.device).expand(batch, -1))
    return place.scatter(1, merging, target)
