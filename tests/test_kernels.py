"""The fused kernels against the same functions in plain tensor code.

On a CPU they run in Triton's interpreter, which has to be chosen before anything imports Triton: so the first test runs
this file once more, in a process of its own, and there the others run. Where there is a GPU they run on it as well.
"""

import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ONE_THREAD, ROOT, launch, needs_gpu
from dynamicvit.models import kernels, make_dynamic
from dynamicvit.models.flops import gflops_of
from dynamicvit.models.kernels import INTERPRETED
from dynamicvit.models.reducers import merge
from packaging.version import Version
from torch import Tensor

DEVICE = "cpu" if INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="runs in the interpreter's process"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # of one rounded number near 1, and some room


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's process")
def test_kernels_in_the_interpreter() -> None:
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(np.__version__) >= Version("2.4"):
        pytest.skip("before 3.7, Triton's interpreter does not work with numpy 2.4")
    result = launch([sys.executable, "-m", "pytest", __file__], {**ONE_THREAD, "TRITON_INTERPRET": "1"})
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(INTERPRETED, reason="compiles instead of interpreting")
@pytest.mark.parametrize(
    "dtype, coarse, capability",
    [(torch.float32, False, 90), (torch.float32, True, 90), (torch.bfloat16, False, 80), (torch.float16, False, 90)],
    ids=str,
)
def test_kernels_compile_for_gpus(
    dtype: torch.dtype, coarse: bool, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter takes programs that the compiler refuses. Compiling needs no GPU: launches on a CPU's tensors are
    # caught, and what each would launch is compiled.
    triton = pytest.importorskip("triton")
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
    compiled = set()
    monkeypatch.setattr(kernels, "coarse", lambda x: coarse)

    def compile_only(kernel, *args, grid, warmup, **named) -> None:
        options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
        values = dict(zip(kernel.arg_names, args, strict=False)) | named
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        constants |= {
            name: 1 for name, value in values.items() if type(value) is int and value == 1
        }  # as a launch does
        signature = {
            name: "constexpr" if name in constants else f"*{types[v.dtype]}" if isinstance(v, Tensor) else "i32"
            for name, v in values.items()
        }
        source = triton.compiler.ASTSource(kernel, signature, constants)
        assert triton.compile(source, target=target, options=options).asm["cubin"]
        compiled.add(kernel.__name__)

    launched = [value for value in vars(kernels).values() if isinstance(value, triton.JITFunction)]
    for kernel in launched:
        monkeypatch.setattr(kernel, "run", partial(compile_only, kernel))
    for num_tokens, num_keep, compared in [(30, 9, 12), (30, 30, 30), (30, 1, 1)][: 3 if dtype == torch.float16 else 1]:
        x, size = torch.randn(2, 1 + num_tokens, 384, dtype=dtype), torch.ones(2, num_tokens)
        query, keys = torch.randn(2, 6, 1, 64, dtype=dtype), torch.randn(2, 6, 1 + num_tokens, 64, dtype=dtype)
        kernels.class_attention(query, keys, 0.25, 1, size)
        kernels.outlying(x[:, 1:], size)
        scores, inverse_norm = kernels.distinct_scores(size, x, 1, compared)
        kernels.merge(x, scores, size, num_keep, 1, None, inverse_norm, keep_length=True)
    assert compiled == {kernel.__name__ for kernel in launched} - {"_inner_products", "_joining", "_group_sums"}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def some_sizes(batch: int, num_tokens: int) -> Tensor:
    return 1 + random(batch, num_tokens, seed=3).abs().mul(2).floor()


def plain_attention(query: Tensor, keys: Tensor, scale: float, num_prefix: int, size: Tensor | None) -> Tensor:
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    logits = query.float() * scale @ keys.float().transpose(2, 3)
    if size is not None:
        logits = logits + F.pad(size.log(), (num_prefix, 0))[:, None, None]
    return logits.softmax(dim=-1).mean(dim=1)[:, 0, num_prefix:]


def cosines(x: Tensor, num_prefix: int) -> Tensor:
    directions = F.normalize(x[:, num_prefix:].float(), dim=-1)
    return directions @ directions.transpose(1, 2)


def plain_scores(importance: Tensor, x: Tensor, num_prefix: int) -> Tensor:
    more_important = importance[:, None, :] > importance[:, :, None]
    return importance * (1 - cosines(x, num_prefix).masked_fill(~more_important, -1).amax(dim=-1))


def plain_merge(
    x: Tensor,
    scores: Tensor,
    size: Tensor,
    num_keep: int,
    num_prefix: int,
    weights: Tensor | None = None,
    inverse_norm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As a product with a matrix of all shares, in float32."""
    weights = size if weights is None else weights
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = order[:, :num_keep]
    to_kept = cosines(x.detach(), num_prefix).gather(2, kept[:, None].expand(-1, scores.shape[1], -1))
    numbers = torch.arange(num_keep, device=x.device).expand_as(kept)
    place = to_kept.argmax(dim=-1).scatter(1, kept, numbers)
    members = F.one_hot(place, num_keep).transpose(1, 2).float()
    shares = members * weights[:, None]
    means = shares / shares.sum(dim=2, keepdim=True) @ x[:, num_prefix:].float()
    merged = torch.cat([x[:, :num_prefix], means.to(x.dtype)], dim=1)
    return merged, kept, (members * size[:, None]).sum(dim=2), place


def assert_merges_alike(x: Tensor, scores: Tensor, size: Tensor, *args: int | Tensor) -> None:
    expected = plain_merge(x, scores, size, *args)
    merged, kept, merged_size, place = kernels.merge(x, scores, size, *args)
    assert kept.dtype == place.dtype == torch.long and merged_size.dtype == torch.float32
    assert merged.dtype == x.dtype
    assert torch.equal(kept, expected[1])
    assert torch.equal(place, expected[3])
    torch.testing.assert_close(merged_size, expected[2])
    torch.testing.assert_close(merged, expected[0], atol=ERROR[x.dtype], rtol=ERROR[x.dtype])


@runs_kernels
@DTYPES
@pytest.mark.parametrize(
    "num_prefix, num_tokens, dim", [(1, 70, 64), (2, 62, 24), (3, 129, 72), (4, 1, 16), (5, 260, 8)]
)
def test_class_attention(num_prefix: int, num_tokens: int, dim: int, dtype: torch.dtype) -> None:
    length = num_prefix + num_tokens
    # as timm has them: queries, keys and values of a token side by side, so neither is in one piece
    query, keys, _ = random(2, length, 3, 3, dim, dtype=dtype).permute(2, 0, 3, 1, 4)
    for size in (None, some_sizes(2, num_tokens)):
        importance = kernels.class_attention(query[:, :, :1], keys, dim**-0.5, num_prefix, size)
        expected = plain_attention(query[:, :, :1], keys, dim**-0.5, num_prefix, size)
        assert importance.dtype == torch.float32
        torch.testing.assert_close(importance, expected, atol=1e-6, rtol=1e-5)


@runs_kernels
def test_class_attention_of_queries_that_share_keys() -> None:
    query, keys = random(2, 6, 1, 16), random(2, 2, 20, 16, seed=1)
    importance = kernels.class_attention(query, keys, 0.25, 1)
    torch.testing.assert_close(importance, plain_attention(query, keys, 0.25, 1, None))


@runs_kernels
def test_class_attention_of_large_logits() -> None:
    query, keys = random(1, 2, 1, 16) * 100, random(1, 2, 150, 16, seed=1) * 100
    importance = kernels.class_attention(query, keys, 1.0, 1)
    torch.testing.assert_close(importance, plain_attention(query, keys, 1.0, 1, None), atol=1e-6, rtol=1e-5)


@runs_kernels
@DTYPES
@pytest.mark.parametrize("num_prefix, num_tokens, channels", [(1, 130, 192), (4, 1, 20), (0, 65, 100)])
def test_outlying(num_prefix: int, num_tokens: int, channels: int, dtype: torch.dtype) -> None:
    tokens = 0.3 + random(2, num_prefix + num_tokens, channels, dtype=dtype)[:, num_prefix:]
    tokens[:, 0] = 0  # which has no direction
    size = some_sizes(2, num_tokens)
    mean = (tokens.float() * size[..., None]).sum(dim=1, keepdim=True)
    expected = size * (1 - F.cosine_similarity(tokens.float(), mean, dim=-1))
    importance = kernels.outlying(tokens, size)
    assert importance.dtype == torch.float32
    torch.testing.assert_close(importance, expected, atol=1e-5, rtol=1e-5)


@runs_kernels
@DTYPES
@pytest.mark.parametrize(
    "num_prefix, num_tokens, channels", [(1, 130, 192), (2, 64, 20), (3, 65, 64), (4, 1, 32), (5, 31, 100)]
)
def test_distinct_scores(num_prefix: int, num_tokens: int, channels: int, dtype: torch.dtype) -> None:
    x = random(2, num_prefix + num_tokens, channels, dtype=dtype)
    x[:, num_prefix] = 0  # which has no direction
    importance = random(2, num_tokens, seed=1).softmax(dim=1)
    importance[:, -num_tokens // 3 :] = importance[:, :1]  # ties: none of two equals is the more important
    scores, inverse_norm = kernels.distinct_scores(importance, x, num_prefix)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, plain_scores(importance, x, num_prefix), atol=1e-6, rtol=1e-5)
    lengths = x[:, num_prefix:].float().norm(dim=-1).clamp(min=1e-12)
    torch.testing.assert_close(inverse_norm, 1 / lengths)


@runs_kernels
def test_coarse_products_take_tiles_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "coarse", lambda x: True)  # as under autocast on a GPU
    x, importance = random(2, 1 + 130, 100), random(2, 130, seed=1).softmax(dim=1)
    scores, _ = kernels.distinct_scores(importance, x, 1)
    error = 1e-5 if INTERPRETED else 1e-3  # an interpreter does not round to 10 bits
    torch.testing.assert_close(scores, plain_scores(importance, x, 1), atol=error, rtol=error)
    if INTERPRETED:
        assert_merges_alike(x, scores, some_sizes(2, 130), 90, 1, importance)


@runs_kernels
@DTYPES
@pytest.mark.parametrize("compared", [1, 30, 70, 129, 130])
def test_distinct_scores_of_the_least_important(compared: int, dtype: torch.dtype) -> None:
    x = random(2, 2 + 130, 40, dtype=dtype)
    importance = random(2, 130, seed=1).softmax(dim=1)
    scores, _ = kernels.distinct_scores(importance, x, 2, compared)
    expected = plain_scores(importance, x, 2)
    stay = importance.argsort(dim=1, descending=True)[:, : 130 - compared]
    above = importance + 2 * importance.amax(dim=1, keepdim=True)
    torch.testing.assert_close(scores, expected.scatter(1, stay, above.gather(1, stay)), atol=1e-6, rtol=1e-5)


@runs_kernels
def test_distinct_scores_of_as_many_as_are_asked_for_among_equals() -> None:
    # of equals the last ones are compared, and none is more important than another: a distance of 2
    scores, _ = kernels.distinct_scores(torch.ones(1, 100, device=DEVICE), random(1, 101, 16), 1, 30)
    assert scores[0].tolist() == 70 * [3.0] + 30 * [2.0]


@runs_kernels
def test_at_least_one_token_is_compared_and_at_most_all() -> None:
    x, importance = random(2, 1 + 40, 16), random(2, 40, seed=1).softmax(dim=1)
    for asked, taken in ((0, 1), (41, 40)):
        found, expected = (kernels.distinct_scores(importance, x, 1, count)[0] for count in (asked, taken))
        assert torch.equal(found, expected)


@runs_kernels
@DTYPES
@pytest.mark.parametrize(
    "num_prefix, num_tokens, num_keep, channels",
    [(1, 70, 50, 192), (2, 66, 65, 20), (3, 129, 1, 64), (4, 40, 40, 32), (5, 100, 20, 100), (1, 1, 1, 16)],
    ids=str,
)
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "sizes"])
def test_merge(
    num_prefix: int, num_tokens: int, num_keep: int, channels: int, weighted: bool, dtype: torch.dtype
) -> None:
    x = random(2, num_prefix + num_tokens, channels, dtype=dtype)
    weights = random(2, num_tokens, seed=1).softmax(dim=1) if weighted else None
    scores = random(2, num_tokens, seed=2)
    assert_merges_alike(x, scores, some_sizes(2, num_tokens), num_keep, num_prefix, weights)


@runs_kernels
@DTYPES
@pytest.mark.parametrize("num_tokens, num_keep, channels", [(70, 50, 192), (129, 1, 100), (40, 40, 32)], ids=str)
def test_merge_keeping_lengths(num_tokens: int, num_keep: int, channels: int, dtype: torch.dtype) -> None:
    x = random(2, 2 + num_tokens, channels, dtype=dtype)
    x[:, 2] = 0
    weights, scores = random(2, num_tokens, seed=1).softmax(dim=1), random(2, num_tokens, seed=2)
    inverse_norm = 1 / x[:, 2:].float().norm(dim=-1).clamp(min=1e-12)
    expected, kept, _, place = plain_merge(x, scores, some_sizes(2, num_tokens), num_keep, 2, weights)
    shares = F.one_hot(place, num_keep).transpose(1, 2) * weights[:, None]
    lengths = (shares / shares.sum(dim=2, keepdim=True) / inverse_norm[:, None]).sum(dim=2)
    for norms in (inverse_norm, None):
        merged, *_ = kernels.merge(x, scores, some_sizes(2, num_tokens), num_keep, 2, weights, norms, True)
        torch.testing.assert_close(
            merged[:, 2:].float().norm(dim=-1), lengths, atol=0.1 * ERROR[dtype], rtol=ERROR[dtype]
        )
        directions, wanted = (F.normalize(rows.float(), dim=-1) for rows in (merged, expected))
        torch.testing.assert_close(directions, wanted, atol=ERROR[dtype], rtol=ERROR[dtype])
        alone = F.one_hot(place, num_keep).sum(dim=1) == 1
        assert torch.equal(merged[:, 2:][alone], x[:, 2:].gather(1, kept[..., None].expand(-1, -1, channels))[alone])
        assert torch.equal(merged[:, :2], x[:, :2])


@runs_kernels
def test_merge_in_float16_neither_overflows_nor_rounds_small_weights_away() -> None:
    x = random(2, 41, 64, dtype=torch.float16) * 1e4
    tiny = random(2, 40, seed=1).softmax(dim=1) * 1e-7
    merged, *_ = kernels.merge(x, random(2, 40, seed=2), 100 * some_sizes(2, 40), 10, 1, tiny)
    expected, *_ = plain_merge(x, random(2, 40, seed=2), some_sizes(2, 40), 10, 1, tiny)
    torch.testing.assert_close(merged, expected, atol=20, rtol=2e-3)


@runs_kernels
def test_merge_of_many_tokens() -> None:
    num_tokens = 37 * 37
    x = random(1, 5 + num_tokens, 16, dtype=torch.bfloat16)
    importance = random(1, num_tokens, seed=1).softmax(dim=1)
    scores, _ = kernels.distinct_scores(importance, x, 5)
    torch.testing.assert_close(scores, plain_scores(importance, x, 5), atol=1e-6, rtol=1e-5)
    assert_merges_alike(x, scores, some_sizes(1, num_tokens), 100, 5, importance)


@runs_kernels
def test_of_equals_the_first_is_the_best() -> None:
    x = random(2, 1 + 90, 32)
    scores = random(2, 90, seed=2).round()  # a handful of different ones
    assert scores.unique().numel() < 10
    assert_merges_alike(x, scores, some_sizes(2, 90), 47, 1)
    *_, kept, _, _ = kernels.merge(x, torch.zeros(2, 90, device=DEVICE), some_sizes(2, 90), 47, 1)
    assert torch.equal(kept, torch.arange(47, device=DEVICE).expand(2, -1))


@runs_kernels
def test_of_kept_tokens_that_are_alike_others_join_the_best_one() -> None:
    x = random(1, 1, 32).repeat(1, 101, 1)
    *_, kept, size, place = kernels.merge(x, random(1, 100, seed=2), torch.ones(1, 100, device=DEVICE), 70, 1)
    assert size[0].tolist() == [31.0] + 69 * [1.0]
    assert torch.equal(place[0, kept[0]], torch.arange(70, device=DEVICE))


@runs_kernels
def test_a_token_that_stays_alone_is_left_as_it_was() -> None:
    x = random(2, 1 + 30, 48)
    weights = random(2, 30, seed=1).softmax(dim=1)
    merged, kept, _, _ = kernels.merge(x, random(2, 30, seed=2), torch.ones(2, 30, device=DEVICE), 30, 1, weights)
    assert torch.equal(merged[:, 1:], x[:, 1:].gather(1, kept[..., None].expand(-1, -1, 48)))
    assert torch.equal(merged[:, :1], x[:, :1])


@runs_kernels
def test_scores_that_are_no_numbers_give_each_token_a_place() -> None:
    scores = random(1, 40, seed=2)
    scores[:, ::3] = torch.nan
    *_, kept, size, place = kernels.merge(random(1, 41, 16), scores, torch.ones(1, 40, device=DEVICE), 20, 1)
    assert kept.unique().numel() == 20
    assert place.min() >= 0 and place.max() < 20 and size.sum() == 40


@runs_kernels
def test_a_group_without_weight_is_no_division_by_zero() -> None:
    x = random(1, 21, 16).requires_grad_()
    merged, *_ = kernels.merge(
        x, random(1, 20, seed=2), torch.ones(1, 20, device=DEVICE), 5, 1, torch.zeros(1, 20, device=DEVICE)
    )
    merged.sum().backward()
    assert merged.isfinite().all() and x.grad.isfinite().all()


@runs_kernels
def test_tokens_in_any_strides() -> None:
    x = random(32, 1 + 40, 2).permute(2, 1, 0)
    importance, size = random(2, 40, seed=1).softmax(dim=1), some_sizes(40, 2).T
    scores, _ = kernels.distinct_scores(importance.T.contiguous().T, x, 1)
    torch.testing.assert_close(scores, plain_scores(importance, x, 1), atol=1e-6, rtol=1e-5)
    assert_merges_alike(x, scores.T.contiguous().T, size, 11, 1, importance.T.contiguous().T)
    inverse_norm = 1 / x[:, 1:].norm(dim=-1)
    assert_merges_alike(x, scores, size, 11, 1, importance, inverse_norm.T.contiguous().T)


@runs_kernels
def test_images_beyond_the_reach_of_32_bits() -> None:
    # most of this memory is never touched
    x = torch.empty(2**31 + 2**10, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 1 + 20, 16), (2**30, 16, 1))
    x.copy_(random(3, 21, 16))
    importance = random(3, 20, seed=1).softmax(dim=1)
    scores, _ = kernels.distinct_scores(importance, x, 1)
    torch.testing.assert_close(scores, plain_scores(importance, x, 1), atol=1e-6, rtol=1e-5)
    assert_merges_alike(x, scores, some_sizes(3, 20), 7, 1, importance)
    query, keys = x[:, None, :1], x[:, None]
    importance = kernels.class_attention(query, keys, 1.0, 1)
    torch.testing.assert_close(importance, plain_attention(query, keys, 1.0, 1, None))


def gradients(function, x: Tensor, scores: Tensor, size: Tensor, weights: Tensor | None) -> list[Tensor]:
    """Of a loss that weighs each number differently, for each of the three that is there."""
    leaves = [leaf.clone().requires_grad_() for leaf in (x, size, weights) if leaf is not None]
    merged, _, merged_size, _ = function(leaves[0], scores, leaves[1], 9, 2, *leaves[2:])
    loss = (merged.float() * random(*merged.shape, seed=5)).sum()
    loss = loss + (merged_size * random(*merged_size.shape, seed=6)).sum()
    return list(torch.autograd.grad(loss, leaves))


@runs_kernels
@DTYPES
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "sizes"])
def test_gradients(weighted: bool, dtype: torch.dtype) -> None:
    x, scores = random(2, 2 + 30, 24, dtype=dtype), random(2, 30, seed=2)
    weights = random(2, 30, seed=1).softmax(dim=1) if weighted else None
    found = gradients(kernels.merge, x, scores, some_sizes(2, 30), weights)
    expected = gradients(plain_merge, x, scores, some_sizes(2, 30), weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert (ours - theirs).float().norm() < ERROR[dtype] * theirs.float().norm()


@runs_kernels
def test_gradients_reach_the_tokens_alone_where_nothing_else_wants_them() -> None:
    x = random(2, 1 + 30, 24).requires_grad_()
    merged, kept, size, _ = kernels.merge(x, random(2, 30, seed=2), torch.ones(2, 30, device=DEVICE), 9, 1)
    merged.sum().backward()
    # each mean hands out its gradient whole
    torch.testing.assert_close(x.grad.sum(dim=1), torch.full((2, 24), 1.0 + 9, device=DEVICE))
    assert not size.requires_grad and not kept.requires_grad


def stage(query: Tensor, keys: Tensor, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    if not kernels.available(x):
        return x, size
    importance = kernels.class_attention(query, keys, 0.25, 1, size)
    scores, _ = kernels.distinct_scores(importance, x, 1)
    merged, _, merged_size, _ = kernels.merge(x * 2, scores, size, 9, 1, importance)
    return merged, merged_size


def stage_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, keys, _ = random(2, 31, 3, 2, 16).permute(2, 0, 3, 1, 4)
    return query[:, :, :1], keys, random(2, 31, 32, seed=1), some_sizes(2, 30)


@runs_kernels
def test_a_stage_compiles_in_one_graph_and_trains() -> None:
    # a compiler cannot fuse anything with the interpreter
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    results = []
    for run in (stage, compiled):
        *attention, x, size = stage_inputs()
        x.requires_grad_()
        merged, merged_size = run(*attention, x, size)
        (merged * random(*merged.shape, seed=5)).sum().backward()
        results.append((merged, merged_size, x.grad))
    assert results[0][0].shape == (2, 10, 32)
    torch.testing.assert_close(results[1], results[0])


@runs_kernels
def test_what_make_dynamic_chooses_compiles_in_one_graph() -> None:
    vit = timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=3, num_classes=5)
    model = make_dynamic(vit, speedup=1.3).eval().to(DEVICE)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    images = random(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), atol=1e-4, rtol=1e-4)


@needs_gpu
@pytest.mark.skipif(INTERPRETED, reason="an interpreter cannot be recorded")
def test_a_stage_in_a_cuda_graph() -> None:
    inputs = [value.clone() for value in stage_inputs()]
    with torch.no_grad():
        expected = stage(*inputs)  # compiles the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = stage(*inputs)
        graph.replay()
        torch.testing.assert_close(found, expected)
        compiled = torch.compile(stage, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):
            found = [value.clone() for value in compiled(*inputs)]
    torch.testing.assert_close(tuple(found), expected)


@runs_kernels
@pytest.mark.parametrize("reducer", ["merge", "merge_length"])
@pytest.mark.parametrize("scorer", ["distinct", "distinct_few", "attention", "outlying"])
def test_a_model_decides_the_same_with_kernels_and_without(
    scorer: str, reducer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=4, num_heads=3, num_classes=5)
    model = make_dynamic(vit, (1, 2, 3), (0.7, 0.5, 0.3), scorer=scorer, reducer=reducer).eval().to(DEVICE)
    images = random(2, 3, 32, 32)
    merges = []
    fused = kernels.merge
    monkeypatch.setattr(kernels, "merge", lambda *args: merges.append(args) or fused(*args))
    with torch.no_grad():
        logits, kept = model.forward_pruned(images)
        assert len(merges) == 3
        monkeypatch.setattr(kernels, "available", lambda x: False)
        plain_logits, plain_kept = model.forward_pruned(images)
    assert len(merges) == 3
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(kept, plain_kept, strict=True))
    torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=1e-4)


@runs_kernels
def test_products_in_kernels_are_counted() -> None:
    query, keys, x, size = (value[:1] for value in stage_inputs())
    assert gflops_of(lambda: kernels.class_attention(query, keys, 0.25, 1)) == 2 * 31 * 16 / 1e9
    assert gflops_of(lambda: kernels.outlying(x[:, 1:], size)) == 2 * 30 * 32 / 1e9
    assert gflops_of(lambda: kernels.distinct_scores(size, x, 1, 12)) == 12 * 30 * 32 / 1e9
    assert gflops_of(lambda: kernels.merge(x, size, size, 9, 1)) == 21 * 9 * 32 / 1e9


@runs_kernels
def test_a_model_that_keeps_lengths_learns_the_same_with_kernels_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(img_size=32, patch_size=4, embed_dim=48, depth=3, num_heads=3, num_classes=5)
    model = make_dynamic(vit, (1, 2), (0.7, 0.5), scorer="distinct_few", reducer="merge_length").to(DEVICE)
    images = random(2, 3, 32, 32)
    gradients = []
    for available in (kernels.available, lambda x: False):
        monkeypatch.setattr(kernels, "available", available)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@runs_kernels
@pytest.mark.parametrize("keep_length", [True, False], ids=["length", "mean"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "sizes"])
def test_weights_learn_where_tokens_do_not(weighted: bool, keep_length: bool) -> None:
    size, weights = some_sizes(2, 30), random(2, 30, seed=1).softmax(dim=1) if weighted else None
    learns = weights if weighted else size
    learns.requires_grad_()
    merged = merge(random(2, 31, 24), random(2, 30, seed=2), size, 9, 1, weights, keep_length=keep_length).x
    merged.sum().backward()
    assert learns.grad.abs().sum() > 0


@runs_kernels
def test_operators_are_what_torch_expects_of_them() -> None:
    query, keys, x, size = stage_inputs()
    weights = size.clone().requires_grad_()
    for operator, args in (
        (torch.ops.dynamicvit.class_attention, (query, keys, 0.25, 1, None)),
        (torch.ops.dynamicvit.outlying, (x[:, 1:], size)),
        (torch.ops.dynamicvit.distinct_scores, (size, x, 1, 30, False)),
        (torch.ops.dynamicvit.distinct_scores, (size, x, 1, 12, False)),
        (torch.ops.dynamicvit.merge, (x.clone().requires_grad_(), size, 9, 1, size, weights, None, False, False)),
        (torch.ops.dynamicvit.merge, (x, size, 9, 1, size, size, size, True, False)),
    ):
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")  # the other one compiles
        torch.library.opcheck(operator, args, test_utils=checks)


@runs_kernels
def test_what_is_exported_runs_without_kernels() -> None:
    class Stage(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return stage(*inputs)

    exported = torch.export.export(Stage(), stage_inputs(), strict=False)
    assert "dynamicvit" not in str(exported.graph)


def test_where_kernels_are_available() -> None:
    assert kernels.available(torch.ones(1)) == INTERPRETED
    assert not kernels.available(torch.ones(1, device="meta"))
    assert not kernels.available(torch.ones(1, dtype=torch.float64, device=DEVICE if INTERPRETED else "cpu"))


@pytest.mark.skipif(INTERPRETED, reason="once is enough")
def test_without_triton_nothing_is_available() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from dynamicvit.models import kernels, make_dynamic
assert not any(kernels.available(torch.ones(1, device=d)) for d in ["cpu", "cuda"][: 1 + torch.cuda.is_available()])
"""
    result = launch([sys.executable, "-c", code], {**ONE_THREAD, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
