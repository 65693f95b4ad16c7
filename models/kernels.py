"""Scoring and merging in a few fused Triton kernels: what scorers.py and reducers.py say, faster on a GPU.

In plain tensor code a stage writes a matrix of all tokens times all tokens and a normalised copy of the tokens, and
sorts; on a GPU that costs more than the tokens saved. Here similarities live in tiles that never leave the chip,
tokens are ranked by counting, and keys and tokens are read where they lie. Knows no backbone. Callers ask
`available(x)` first and compute plainly where it says no.

Shapes: B images, P prefix tokens (class token, registers), N patch tokens that come in, K that are kept, C channels,
H heads of D channels, L = P+N. Every sum is in float32, whatever the tokens are in, and no result depends on the order
in which programs run.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
except ImportError:  # torch brings it on Linux with CUDA only
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs kernels on a CPU, for tests
COMPILING_LOOKS_LIKE_EXPORTING = torch.__version__ < (2, 14)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_NORM = 1e-12  # as in torch.nn.functional.normalize


def available(x: Tensor) -> bool:
    """Whether the functions below can take tensors that are where x is, of x's dtype.

    Not while a model is exported: what is exported has to run without this file.
    """
    if triton is None or x.dtype not in DTYPES or torch.jit.is_tracing() or is_exporting():
        return False
    if INTERPRETED:
        return x.device.type in ("cpu", "cuda")
    if x.device.type != "cuda" or torch.version.hip is not None:  # never seen on ROCm
        return False
    return torch.cuda.get_device_properties(x.device).major >= 8  # Triton multiplies no bfloat16 on older ones


def is_exporting() -> bool:
    """As torch.compiler.is_exporting, which is always True in what compilers before torch 2.14 compile."""
    return torch.compiler._is_exporting_flag if COMPILING_LOOKS_LIKE_EXPORTING else torch.compiler.is_exporting()


def class_attention(query: Tensor, keys: Tensor, scale: float, num_prefix: int, size: Tensor | None = None) -> Tensor:
    """The class token's attention to each patch token, mean over the heads; no gradient.

    (B, H, 1, D) query, (B, H, L, D) keys (or fewer heads, under grouped-query attention) in any strides, (B, N) sizes
    of the patch tokens (None: 1 each) -> (B, N), float32.
    """
    size = None if size is None else size.detach()
    return _class_attention(query.detach(), keys.detach(), float(scale), num_prefix, size)


def outlying(tokens: Tensor, size: Tensor) -> Tensor:
    """How far each token is from the mean of all, by cosine, times its size; no gradient.

    (B, N, C) patch tokens, (B, N) sizes -> (B, N), float32.
    """
    return _outlying(tokens.detach(), size.detach())


def distinct_scores(
    importance: Tensor, x: Tensor, num_prefix: int, compared: int | None = None
) -> tuple[Tensor, Tensor]:
    """Importance times the cosine distance to the most similar token of greater importance; no gradient.

    (B, N) importance, (B, P+N, C) tokens -> (B, N) scores and, for merge, (B, N) reciprocals of the tokens' lengths,
    both float32. compared: how many of the least important tokens, at least one, are scored so; the others get their
    own importance plus twice the largest importance, which puts them above every score, as no distance is above 2.
    None: all.
    """
    num_tokens = importance.shape[1]
    num_compared = num_tokens if compared is None else max(1, min(compared, num_tokens))
    return _distinct_scores(importance.detach(), x.detach(), num_prefix, num_compared, coarse(x))


def merge(
    x: Tensor,
    scores: Tensor,
    size: Tensor,
    num_keep: int,
    num_prefix: int,
    weights: Tensor | None = None,
    inverse_norm: Tensor | None = None,
    keep_length: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keeps the num_keep best tokens; each other one joins the kept one that it is most similar to, by cosine.

    (B, P+N, C) tokens, (B, N) scores, sizes and weights (None: the sizes) -> (B, P+K, C) prefix tokens and weighted
    means, best score first; (B, K) places of the kept ones; (B, K) their sizes, float32; (B, N) which of the K each
    token is part of. Of equal scores the lower place is better, of equal cosines the better score. Gradients reach x,
    size and weights, not the choice.
    inverse_norm: what distinct_scores gave for these tokens; None: computed here. keep_length: each mean gets the mean
    length, by weight, of the tokens in it; without gradients. A token with numbers that are not finite makes all means
    of its image not finite.
    """
    size = size.float()
    weights = size if weights is None else weights.float()
    merged, kept, merged_size, place = _merge(
        x, scores.detach(), num_keep, num_prefix, size, weights, inverse_norm, keep_length, coarse(x)
    )
    if not size.requires_grad:  # or attention would compute the gradient of its size bias for nothing
        merged_size = merged_size.detach()
    return merged, kept, merged_size, place


def coarse(x: Tensor) -> bool:
    """Whether similarities may be products with 10 bits, on tensor cores, as under autocast, where tokens are float32
    but all around them is computed with 8. Asked outside of the operators: compiled code runs without autocast."""
    return x.is_cuda and torch.is_autocast_enabled("cuda")


class Tile(NamedTuple):
    """What one program takes at a time, and how Triton is to compile it."""

    rows: int
    columns: int
    channels: int
    warps: int = 4
    stages: int = 3  # loads in flight; each holds a tile of rows and one of columns in shared memory


# 16-bit numbers: the best of those tried on an H100 in bfloat16 at batch 256, 196 -> 142 tokens, 384 channels.
SCORE_TILE = Tile(rows=128, columns=64, channels=64)
MERGE_TILE = Tile(rows=64, columns=32, channels=128, warps=8)
# As for scores, but the rows are the tokens that leave or may leave: often fewer than 64.
FEW_ROWS_TILE = Tile(rows=64, columns=64, channels=64)
# Exact float32 has no tensor cores: a thread holds whole rows and columns of a tile in registers, and larger tiles do
# not fit there.
FLOAT32_TILE = Tile(rows=64, columns=64, channels=16, stages=2)
FLOAT32_MERGE_TILE = Tile(rows=32, columns=32, channels=64, stages=2)
# No products, each number is read once or twice: a program has to wait for many loads at a time.
NORM_TILE = Tile(rows=32, columns=1, channels=64)
RANK_TILE = Tile(rows=64, columns=64, channels=1)
KEYS_AT_A_TIME = 64
TOKENS_AT_A_TIME = 256  # for the mean over heads


# Operators of torch's own kind, so that torch.compile takes them as they are, and with static shapes CUDA graphs, too.
@torch.library.custom_op("dynamicvit::class_attention", mutates_args=())
def _class_attention(query: Tensor, keys: Tensor, scale: float, num_prefix: int, size: Tensor | None) -> Tensor:
    batch, heads, _, dim = query.shape
    length = keys.shape[2]
    importance = query.new_empty(batch, length - num_prefix, dtype=torch.float32)
    logits = query.new_empty(batch, heads, length - num_prefix, dtype=torch.float32)
    normaliser = query.new_empty(batch, heads, dtype=torch.float32)
    with torch.cuda.device_of(query):
        _logits_kernel[(batch * heads,)](
            query,
            keys,
            normaliser if size is None else size.float().contiguous(),
            logits,
            normaliser,
            *(query.stride(0), query.stride(1), query.stride(3)),
            *keys.stride(),
            length,
            heads,
            heads // keys.shape[1],
            SCALE=scale,
            P=num_prefix,
            HAS_SIZES=size is not None,
            D=dim,
            BLOCK_D=triton.next_power_of_2(dim),
            BLOCK_L=KEYS_AT_A_TIME,
        )
        _mean_kernel[(batch * triton.cdiv(length - num_prefix, TOKENS_AT_A_TIME),)](
            logits, normaliser, importance, length - num_prefix, heads, BLOCK_N=TOKENS_AT_A_TIME
        )
    return importance


@_class_attention.register_fake
def _(query: Tensor, keys: Tensor, scale: float, num_prefix: int, size: Tensor | None) -> Tensor:
    return query.new_empty(query.shape[0], keys.shape[2] - num_prefix, dtype=torch.float32)


@torch.library.custom_op("dynamicvit::outlying", mutates_args=())
def _outlying(tokens: Tensor, size: Tensor) -> Tensor:
    tokens = with_whole_rows(tokens)
    batch, num_tokens, channels = tokens.shape
    size = size.float().contiguous()
    direction = tokens.new_empty(batch, channels, dtype=torch.float32)
    importance = torch.empty_like(size)
    shape = {"C": channels, "BLOCK_M": NORM_TILE.rows, "BLOCK_C": NORM_TILE.channels}
    strides = (tokens.stride(0), tokens.stride(1), num_tokens)
    with torch.cuda.device_of(tokens):
        _direction_kernel[(batch, triton.cdiv(channels, NORM_TILE.channels))](
            tokens, size, direction, *strides, **shape
        )
        _outlying_kernel[(batch * triton.cdiv(num_tokens, NORM_TILE.rows),)](
            tokens, size, direction, importance, *strides, SMALLEST=SMALLEST_NORM, **shape
        )
    return importance


@_outlying.register_fake
def _(tokens: Tensor, size: Tensor) -> Tensor:
    return size.new_empty(size.shape, dtype=torch.float32)


@torch.library.custom_op("dynamicvit::distinct_scores", mutates_args=())
def _distinct_scores(
    importance: Tensor, x: Tensor, num_prefix: int, compared: int, coarse: bool
) -> tuple[Tensor, Tensor]:
    x = with_whole_rows(x)
    importance = importance.float().contiguous()
    scores = torch.empty_like(importance)
    num_tokens = importance.shape[1]
    few = compared < num_tokens
    with torch.cuda.device_of(x):
        inverse_norm = inverse_norms(x, num_prefix)
        best = rows = importance  # not read where all are compared
        if few:
            best, rows, _ = rank(importance, num_tokens - compared)
        tile = for_precision(FEW_ROWS_TILE if few else SCORE_TILE, x, coarse)
        _score_kernel[(x.shape[0] * triton.cdiv(compared, tile.rows),)](
            *(x, inverse_norm, importance, best, rows, scores, x.stride(0), x.stride(1), num_tokens, compared),
            FEW=few,
            **products(x, num_prefix, tile, coarse),
        )
    return scores, inverse_norm


@_distinct_scores.register_fake
def _(importance: Tensor, x: Tensor, num_prefix: int, compared: int, coarse: bool) -> tuple[Tensor, Tensor]:
    return tuple(importance.new_empty(importance.shape, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("dynamicvit::merge", mutates_args=())
def _merge(
    x: Tensor,
    scores: Tensor,
    num_keep: int,
    num_prefix: int,
    size: Tensor,
    weights: Tensor,
    inverse_norm: Tensor | None,
    keep_length: bool,
    coarse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = with_whole_rows(x)
    with torch.cuda.device_of(x):
        if inverse_norm is None:
            inverse_norm = inverse_norms(x, num_prefix)
        inverse_norm = inverse_norm.float().contiguous()
        kept, others, place = rank(scores.contiguous(), num_keep)
        if others.shape[1] > 0:
            join(x, inverse_norm, kept, others, place, num_prefix, coarse)
        merged, merged_size, length = average(
            x, inverse_norm, kept, others, place, size.contiguous(), weights.contiguous(), num_prefix, keep_length
        )
        if keep_length and others.shape[1] > 0:
            set_lengths(merged, length, num_prefix)
    return merged, kept, merged_size, place


@_merge.register_fake
def _(x: Tensor, scores: Tensor, num_keep: int, num_prefix: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_tokens = scores.shape
    return (
        x.new_empty(batch, num_prefix + num_keep, x.shape[2]),
        scores.new_empty(batch, num_keep, dtype=torch.long),
        x.new_empty(batch, num_keep, dtype=torch.float32),
        scores.new_empty(batch, num_tokens, dtype=torch.long),
    )


def rank(scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N) scores -> (B, K) places of the best, (B, N-K) of the others, both best first; (B, N) each token's rank,
    which is set for the kept ones only."""
    batch, num_tokens = scores.shape
    kept, others, place = (
        scores.new_empty(batch, count, dtype=torch.long) for count in (num_keep, num_tokens - num_keep, num_tokens)
    )
    _rank_kernel[(batch * triton.cdiv(num_tokens, RANK_TILE.rows),)](
        scores, kept, others, place, num_tokens, num_keep, BLOCK_M=RANK_TILE.rows, BLOCK_N=RANK_TILE.columns
    )
    return kept, others, place


def join(
    x: Tensor, inverse_norm: Tensor, kept: Tensor, others: Tensor, place: Tensor, num_prefix: int, coarse: bool = False
) -> None:
    """Sets the place of each of the (B, N-K) others to the number of the kept one that is most like it."""
    tile = for_precision(FEW_ROWS_TILE, x, coarse)
    _join_kernel[(x.shape[0] * triton.cdiv(others.shape[1], tile.rows),)](
        *(x, inverse_norm, kept, others, place, x.stride(0), x.stride(1), place.shape[1], kept.shape[1]),
        **products(x, num_prefix, tile, coarse),
    )


def average(
    x: Tensor,
    inverse_norm: Tensor,
    kept: Tensor,
    others: Tensor,
    place: Tensor,
    size: Tensor,
    weights: Tensor,
    num_prefix: int,
    keep_length: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, P+K, C) prefix tokens and means of the tokens in each place, (B, K) sums of sizes and, if keep_length, (B, K)
    mean lengths of the tokens in each, -1 where there is only one."""
    batch, _, channels = x.shape
    num_keep = kept.shape[1]
    merged = x.new_empty(batch, num_prefix + num_keep, channels)
    merged_size, length = size.new_empty(batch, num_keep), size.new_empty(batch, num_keep)
    tile = FLOAT32_MERGE_TILE if x.dtype == torch.float32 else MERGE_TILE
    if channels % tile.channels:  # 192: three tiles of 64, not two of 128
        tile = tile._replace(channels=min(tile.channels, 64))
    _merge_kernel[(batch * triton.cdiv(num_keep, tile.rows), triton.cdiv(channels, tile.channels))](
        *(x, inverse_norm, kept, others, place, size, weights, merged, merged_size, length),
        *(x.stride(0), x.stride(1), place.shape[1], num_keep),
        KEEP_LENGTH=keep_length,
        **products(x, num_prefix, tile),
    )
    return merged, merged_size, length


def set_lengths(merged: Tensor, length: Tensor, num_prefix: int) -> None:
    """Gives each token of more than one the (B, K) length, in place."""
    batch, num_keep = length.shape
    _length_kernel[(batch * triton.cdiv(num_keep, NORM_TILE.rows),)](
        *(merged, length, num_keep),
        C=merged.shape[2],
        P=num_prefix,
        SMALLEST=SMALLEST_NORM,
        BLOCK_M=NORM_TILE.rows,
        BLOCK_C=NORM_TILE.channels,
    )


def inverse_norms(x: Tensor, num_prefix: int) -> Tensor:
    """(B, P+N, C) -> (B, N) one over each patch token's length, float32."""
    batch, length, channels = x.shape
    inverse_norm = x.new_empty(batch, length - num_prefix, dtype=torch.float32)
    _norm_kernel[(batch * triton.cdiv(length - num_prefix, NORM_TILE.rows),)](
        *(x, inverse_norm, x.stride(0), x.stride(1), length - num_prefix),
        C=channels,
        P=num_prefix,
        SMALLEST=SMALLEST_NORM,
        BLOCK_M=NORM_TILE.rows,
        BLOCK_C=NORM_TILE.channels,
    )
    return inverse_norm


def products(x: Tensor, num_prefix: int, tile: Tile, coarse: bool = False) -> dict[str, Any]:
    """The constants of a kernel that multiplies tiles of x; coarse: see there."""
    return {
        "C": x.shape[2],
        "P": num_prefix,
        "PRECISION": "ieee" if x.dtype == torch.float32 and not coarse else "tf32",  # ignored for 16 bits
        "WIDEN": INTERPRETED,  # the interpreter multiplies bfloat16 as if it were integers
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_C": tile.channels,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def for_precision(tile: Tile, x: Tensor, coarse: bool) -> Tile:
    """The tile for products of 16-bit numbers, or its counterpart for what x holds."""
    if x.dtype != torch.float32:
        return tile
    return tile._replace(channels=tile.channels // 2) if coarse else FLOAT32_TILE  # coarse ones use tensor cores, too


def with_whole_rows(x: Tensor) -> Tensor:
    """x itself, where the channels of a token lie side by side, as they nearly always do."""
    return x if x.stride(2) == 1 else x.contiguous()


def _save_for_merge_gradients(ctx: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    x, _, _, ctx.num_prefix, _, weights, _, keep_length, _ = inputs
    if keep_length:
        raise NotImplementedError("keep_length has no gradient in the kernels: scale the means in plain code")
    merged, _, _, place = output
    ctx.save_for_backward(weights, place, *((x, merged) if ctx.needs_input_grad[5] else ()))


def _merge_gradients(
    ctx: Any, grad_merged: Tensor, grad_kept: None, grad_merged_size: Tensor, grad_place: None
) -> tuple[Tensor | None, ...]:
    """A mean's gradients: to a token its share, to a weight how far its token is from the mean."""
    weights, place, *tokens = ctx.saved_tensors
    num_prefix = ctx.num_prefix
    batch, end, _ = grad_merged.shape
    total = weights.new_zeros(batch, end - num_prefix).scatter_add(1, place, weights).gather(1, place)
    total = total.masked_fill(total == 0, 1.0)  # as in the kernel
    shares = F.pad(weights / total, (num_prefix, 0), value=1.0).to(grad_merged.dtype)
    prefix = torch.arange(num_prefix, device=place.device).expand(batch, -1)
    rows = torch.cat([prefix, place + num_prefix], dim=1)
    rows = (rows + end * torch.arange(batch, device=place.device)[:, None]).flatten()
    grads = grad_merged.flatten(0, 1).index_select(0, rows).unflatten(0, (batch, -1))
    grad_weights = None
    if tokens:
        x, merged = tokens
        beyond = x.float() - merged.flatten(0, 1).index_select(0, rows).unflatten(0, (batch, -1)).float()
        grad_weights = (grads.float() * beyond).sum(dim=-1)[:, num_prefix:] / total
    grad_x, grad_size = grads * shares[..., None], grad_merged_size.gather(1, place)
    return grad_x, None, None, None, grad_size, grad_weights, None, None, None


_merge.register_autograd(_merge_gradients, setup_context=_save_for_merge_gradients)


# What torch's flop counter counts for these operators; it passes shapes instead of tensors.
@register_flop_formula(torch.ops.dynamicvit.class_attention)
def _(query: Sequence[int], keys: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, _, dim = query
    return 2 * batch * heads * keys[2] * dim


@register_flop_formula(torch.ops.dynamicvit.outlying)
def _(tokens: Sequence[int], *_: Any, **__: Any) -> int:
    batch, num_tokens, channels = tokens
    return 2 * batch * num_tokens * channels * 2  # the mean, and its product with each token


@register_flop_formula(torch.ops.dynamicvit.distinct_scores)
def _(importance: Sequence[int], x: Sequence[int], num_prefix: int, compared: int, *_: Any, **__: Any) -> int:
    batch, num_tokens = importance
    return 2 * batch * compared * num_tokens * x[2]


@register_flop_formula(torch.ops.dynamicvit.merge)
def _(x: Sequence[int], scores: Sequence[int], num_keep: int, *_: Any, **__: Any) -> int:
    batch, num_tokens = scores
    return 2 * batch * (num_tokens - num_keep) * num_keep * x[2]


if triton is None:

    def jit(kernel: Any) -> Any:
        """Leaves the function as it is where there is no Triton, as nobody calls it there."""
        return kernel

    constexpr = Any
else:
    jit = triton.jit
    constexpr = tl.constexpr


# The kernels. A program takes one tile of one image (the first dimension of the grid counts tiles, then images, as its
# limit is the highest); b is int64, as batch times tokens times channels may leave int32.
@jit
def _logits_kernel(
    query,
    keys,
    size,
    logits,
    normaliser,
    query_image,
    query_head,
    query_channel,
    key_image,
    key_head,
    key_token,
    key_channel,
    L,
    H,
    queries_per_key,
    SCALE: constexpr,
    P: constexpr,
    HAS_SIZES: constexpr,
    D: constexpr,
    BLOCK_D: constexpr,
    BLOCK_L: constexpr,
):
    """One image and head: (B, H, N) logits of the patch tokens, (B, H) log of the sum of all L exponentials."""
    program = tl.program_id(0).to(tl.int64)
    b, h = program // H, program % H
    d = tl.arange(0, BLOCK_D)
    q = tl.load(query + b * query_image + h * query_head + d * query_channel, mask=d < D, other=0.0)
    q = q.to(tl.float32) * SCALE
    first_key = keys + b * key_image + h // queries_per_key * key_head
    top = -float("inf")
    total = 0.0
    for start in range(0, L, BLOCK_L):
        n = start + tl.arange(0, BLOCK_L)
        inside = n < L
        at = first_key + n[:, None] * key_token + d[None, :] * key_channel
        k = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        logit = tl.sum(k * q[None, :], 1)
        if HAS_SIZES:
            logit += tl.log(tl.load(size + b * (L - P) + n - P, mask=inside & (n >= P), other=1.0))
        tl.store(logits + program * (L - P) + n - P, logit, mask=inside & (n >= P))
        logit = tl.where(inside, logit, -float("inf"))
        new_top = tl.maximum(top, tl.max(logit, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logit - new_top), 0)
        top = new_top
    tl.store(normaliser + program, top + tl.log(total))


@jit
def _mean_kernel(logits, normaliser, importance, N, H, BLOCK_N: constexpr):
    """Mean over the heads of their softmax, for one tile of an image's patch tokens."""
    tiles = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for h in range(0, H):
        logit = tl.load(logits + (b * H + h) * N + n, mask=n < N, other=0.0)
        total += tl.exp(logit - tl.load(normaliser + b * H + h))
    tl.store(importance + b * N + n, total / H, mask=n < N)


@jit
def _direction_kernel(tokens, size, direction, image, token, N, C: constexpr, BLOCK_M: constexpr, BLOCK_C: constexpr):
    """(B, C) sums of tokens weighted by size; they point the same way as the means."""
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, N, BLOCK_M):
        n = start + tl.arange(0, BLOCK_M)
        at = tokens + b * image + n[:, None] * token + c[None, :]
        values = tl.load(at, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        sizes = tl.load(size + b * N + n, mask=n < N, other=0.0)
        sums += tl.sum(values * sizes[:, None], 0)
    tl.store(direction + b * C + c, sums, mask=c < C)


@jit
def _outlying_kernel(
    tokens,
    size,
    direction,
    importance,
    image,
    token,
    N,
    C: constexpr,
    SMALLEST: constexpr,
    BLOCK_M: constexpr,
    BLOCK_C: constexpr,
):
    tiles = tl.cdiv(N, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    product = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    toward_squares = 0.0
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = tokens + b * image + n[:, None] * token + c[None, :]
        values = tl.load(at, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        toward = tl.load(direction + b * C + c, mask=c < C, other=0.0)
        product += tl.sum(values * toward[None, :], 1)
        squares += tl.sum(values * values, 1)
        toward_squares += tl.sum(toward * toward, 0)
    norms = tl.maximum(tl.sqrt_rn(squares), SMALLEST) * tl.maximum(tl.sqrt_rn(toward_squares), SMALLEST)
    sizes = tl.load(size + b * N + n, mask=n < N, other=0.0)
    tl.store(importance + b * N + n, sizes * (1 - product / norms), mask=n < N)


@jit
def _norm_kernel(
    x,
    inverse_norm,
    x_image,
    x_token,
    N,
    C: constexpr,
    P: constexpr,
    SMALLEST: constexpr,
    BLOCK_M: constexpr,
    BLOCK_C: constexpr,
):
    tiles = tl.cdiv(N, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = x + b * x_image + (P + n)[:, None] * x_token + c[None, :]
        values = tl.load(at, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        squares += values * values
    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, 1)), SMALLEST)
    tl.store(inverse_norm + b * N + n, 1.0 / norm, mask=n < N)


@jit
def _inner_products(
    rows,
    row_inside,
    columns,
    column_inside,
    C: constexpr,
    PRECISION: constexpr,
    WIDEN: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_C: constexpr,
):
    """Pointers to tokens, (BLOCK_M,) and (BLOCK_N,) -> (BLOCK_M, BLOCK_N) inner products of each with each."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < C
        a = tl.load(rows[:, None] + c[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0)
        b = tl.load(columns[None, :] + c[:, None], mask=column_inside[None, :] & inside[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@jit
def _score_kernel(
    x,
    inverse_norm,
    importance,
    best,
    rows,
    scores,
    x_image,
    x_token,
    N,
    M,
    FEW: constexpr,
    C: constexpr,
    P: constexpr,
    PRECISION: constexpr,
    WIDEN: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_C: constexpr,
):
    """Scores all tokens or, if FEW, the M in rows; the N-M in best get scores above all of these, in the order of their
    importance."""
    tiles = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < M
    row = tl.load(rows + b * M + m, mask=inside, other=0) if FEW else m
    first = x + b * x_image + P * x_token
    row_importance = tl.load(importance + b * N + row, mask=inside, other=float("inf"))
    row_scale = tl.load(inverse_norm + b * N + row, mask=inside, other=0.0)
    nearest = tl.full((BLOCK_M,), -1.0, tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        column_importance = tl.load(importance + b * N + n, mask=n < N, other=-float("inf"))
        column_scale = tl.load(inverse_norm + b * N + n, mask=n < N, other=0.0)
        cosine = _inner_products(
            first + row * x_token, inside, first + n * x_token, n < N, C, PRECISION, WIDEN, BLOCK_M, BLOCK_N, BLOCK_C
        )
        cosine = cosine * row_scale[:, None] * column_scale[None, :]
        more_important = column_importance[None, :] > row_importance[:, None]
        nearest = tl.maximum(nearest, tl.max(tl.where(more_important, cosine, -1.0), 1))
    tl.store(scores + b * N + row, row_importance * (1 - nearest), mask=inside)
    if FEW:
        top = 2 * tl.load(importance + b * N + tl.load(best + b * (N - M)))
        for start in range(tile * BLOCK_M, N - M, tiles * BLOCK_M):
            k = start + tl.arange(0, BLOCK_M)
            token = tl.load(best + b * (N - M) + k, mask=k < N - M, other=0)
            above = tl.load(importance + b * N + token, mask=k < N - M, other=0.0) + top
            tl.store(scores + b * N + token, above, mask=k < N - M)


@jit
def _rank_kernel(scores, kept, others, place, N, K, BLOCK_M: constexpr, BLOCK_N: constexpr):
    """A token's rank is how many are ahead of it: no sort."""
    tiles = tl.cdiv(N, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    score = tl.load(scores + b * N + m, mask=m < N, other=0.0).to(tl.float32)
    score = tl.where(score == score, score, float("inf"))  # not a number: two tokens must not share a rank
    rank = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        other = tl.load(scores + b * N + n, mask=n < N, other=0.0).to(tl.float32)
        other = tl.where(other == other, other, float("inf"))
        before = n[None, :] < m[:, None]
        ahead = (other[None, :] > score[:, None]) | ((other[None, :] == score[:, None]) & before)
        rank += tl.sum((ahead & (n < N)[None, :]).to(tl.int32), 1)
    inside = m < N
    tl.store(kept + b * K + rank, m.to(tl.int64), mask=inside & (rank < K))
    tl.store(others + b * (N - K) + rank - K, m.to(tl.int64), mask=inside & (rank >= K))
    tl.store(place + b * N + m, rank.to(tl.int64), mask=inside & (rank < K))


@jit
def _join_kernel(
    x,
    inverse_norm,
    kept,
    others,
    place,
    x_image,
    x_token,
    N,
    K,
    C: constexpr,
    P: constexpr,
    PRECISION: constexpr,
    WIDEN: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_C: constexpr,
):
    """A row's own length changes none of its comparisons, so only the columns' lengths are divided out."""
    tiles = tl.cdiv(N - K, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = m < N - K
    row = tl.load(others + b * (N - K) + m, mask=row_inside, other=0)
    first = x + b * x_image + P * x_token
    nearest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    joined = tl.zeros((BLOCK_M,), tl.int32)
    for start in range(0, K, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        column = tl.load(kept + b * K + n, mask=n < K, other=0)
        column_scale = tl.load(inverse_norm + b * N + column, mask=n < K, other=0.0)
        cosine = _inner_products(
            first + row * x_token,
            row_inside,
            first + column * x_token,
            n < K,
            C,
            PRECISION,
            WIDEN,
            BLOCK_M,
            BLOCK_N,
            BLOCK_C,
        )
        cosine = tl.where((n < K)[None, :], cosine * column_scale[None, :], -float("inf"))
        value, number = tl.max(cosine, 1, return_indices=True)
        joined = tl.where(value > nearest, start + number, joined)
        nearest = tl.maximum(nearest, value)
    tl.store(place + b * N + row, joined.to(tl.int64), mask=row_inside)


@jit
def _joining(others, place, weights, b, start, k, N, K, BLOCK_N: constexpr):
    """BLOCK_N of the tokens that join others, from start on: numbers, which exist, who joins which row k, weights."""
    m = start + tl.arange(0, BLOCK_N)
    inside = m < N - K
    n = tl.load(others + b * (N - K) + m, mask=inside, other=0)
    here = tl.load(place + b * N + n, mask=inside, other=-1)[None, :] == k[:, None]
    return n, inside, here, tl.load(weights + b * N + n, mask=inside, other=0.0)


@jit
def _group_sums(
    inverse_norm,
    others,
    place,
    size,
    weights,
    own,
    own_weight,
    b,
    k,
    N,
    K,
    KEEP_LENGTH: constexpr,
    BLOCK_N: constexpr,
):
    """Sums over those that join the rows k and their own tokens: weights, sizes and, if KEEP_LENGTH, the weighted mean
    of lengths, -1 where none joins."""
    total = own_weight
    sizes = tl.load(size + b * N + own, mask=k < K, other=0.0)
    length = tl.zeros_like(total)
    joined = tl.zeros_like(total)
    if KEEP_LENGTH:
        length += own_weight / tl.load(inverse_norm + b * N + own, mask=k < K, other=1.0)
    for start in range(0, N - K, BLOCK_N):
        n, inside, here, weight = _joining(others, place, weights, b, start, k, N, K, BLOCK_N)
        total += tl.sum(tl.where(here, weight[None, :], 0.0), 1)
        sizes += tl.sum(tl.where(here, tl.load(size + b * N + n, mask=inside, other=0.0)[None, :], 0.0), 1)
        if KEEP_LENGTH:
            weighted = weight / tl.load(inverse_norm + b * N + n, mask=inside, other=1.0)
            length += tl.sum(tl.where(here, weighted[None, :], 0.0), 1)
            joined += tl.sum(here.to(tl.float32), 1)
    total = tl.where(total == 0, 1.0, total)
    return total, sizes, tl.where(joined > 0, length / total, -1.0)


@jit
def _merge_kernel(
    x,
    inverse_norm,
    kept,
    others,
    place,
    size,
    weights,
    merged,
    merged_size,
    length,
    x_image,
    x_token,
    N,
    K,
    KEEP_LENGTH: constexpr,
    C: constexpr,
    P: constexpr,
    PRECISION: constexpr,
    WIDEN: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_C: constexpr,
):
    """Means: a kept token times its own share, and a product of shares, built in registers, with those that join. Each
    token enters by its share, as sums of size times token could leave float16's range."""
    tiles = tl.cdiv(K, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    k = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    own = tl.load(kept + b * K + k, mask=k < K, other=0)
    own_weight = tl.load(weights + b * N + own, mask=k < K, other=0.0)
    total, sizes, mean_length = _group_sums(
        inverse_norm, others, place, size, weights, own, own_weight, b, k, N, K, KEEP_LENGTH, BLOCK_N
    )
    if tl.program_id(1) == 0:
        tl.store(merged_size + b * K + k, sizes, mask=k < K)
        if KEEP_LENGTH:
            tl.store(length + b * K + k, mean_length, mask=k < K)

    source = x + b * x_image
    target = merged + b * (P + K) * C
    inside = (k < K)[:, None] & (c < C)[None, :]
    mean = tl.load(source + (P + own)[:, None] * x_token + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean *= tl.div_rn(own_weight, total)[:, None]  # rounded as IEEE wants: 1 for a token that stays alone
    for start in range(0, N - K, BLOCK_N):
        n, joins, here, weight = _joining(others, place, weights, b, start, k, N, K, BLOCK_N)
        at = source + (P + n)[:, None] * x_token + c[None, :]
        tokens = tl.load(at, mask=joins[:, None] & (c < C)[None, :], other=0.0)
        shares = tl.where(here, weight[None, :] / total[:, None], 0.0).to(tokens.dtype)
        if WIDEN:
            shares, tokens = shares.to(tl.float32), tokens.to(tl.float32)
        mean = tl.dot(shares, tokens, mean, input_precision=PRECISION)
    tl.store(target + (P + k)[:, None] * C + c[None, :], mean.to(merged.dtype.element_ty), mask=inside)
    if tile == 0:
        for p in range(0, P):
            tl.store(target + p * C + c, tl.load(source + p * x_token + c, mask=c < C, other=0.0), mask=c < C)


@jit
def _length_kernel(
    merged, length, K, C: constexpr, P: constexpr, SMALLEST: constexpr, BLOCK_M: constexpr, BLOCK_C: constexpr
):
    """Most tokens stay alone, and are not even read."""
    tiles = tl.cdiv(K, BLOCK_M)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    k = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted = tl.load(length + b * K + k, mask=k < K, other=-1.0)
    row = merged + (b * (P + K) + P + k)[:, None] * C
    squares = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (wanted >= 0)[:, None] & (c < C)[None, :]
        values = tl.load(row + c[None, :], mask=inside, other=0.0).to(tl.float32)
        squares += values * values
    factor = wanted / tl.maximum(tl.sqrt_rn(tl.sum(squares, 1)), SMALLEST)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (wanted >= 0)[:, None] & (c < C)[None, :]
        values = tl.load(row + c[None, :], mask=inside, other=0.0).to(tl.float32) * factor[:, None]
        tl.store(row + c[None, :], values.to(merged.dtype.element_ty), mask=inside)
