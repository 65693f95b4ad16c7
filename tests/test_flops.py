import copy

import pytest
import torch
from dynamicvit.models import create_model
from dynamicvit.models.flops import count_gflops, gflops_of


@pytest.mark.parametrize(
    ("arch", "base_rate", "published"),
    [
        ("deit_256", 0.7, 1.375),
        ("deit_small", 0.7, 2.981),
        ("deit_base", 0.7, 11.476),
        ("lvvit_s", 0.5, 3.790),
        ("lvvit_s", 0.7, 4.650),
        ("lvvit_m", 0.7, 8.593),
    ],
)
def test_published_models(arch: str, base_rate: float, published: float) -> None:
    assert count_gflops(create_model(arch, base_rate), 224) == pytest.approx(published, rel=0.005)


def test_dense_model() -> None:
    assert count_gflops(create_model("deit_small", dense=True), (224, 224)) == pytest.approx(4.6, rel=0.005)


def test_small_case_worked_by_hand() -> None:
    model = create_model(
        "deit_tiny", img_size=32, patch_size=8, embed_dim=8, num_heads=2, depth=2, mlp_ratio=2,
        num_classes=5, pruning_loc=[1], keep_rates=[0.5],
    )  # fmt: skip

    def block(tokens: int) -> int:
        attention = tokens * 8 * 24 + 2 * tokens * tokens * 8 + tokens * 8 * 8  # qkv; q k' and a v; proj
        return attention + 2 * tokens * 8 * 16  # both layers of the MLP

    patch_embed = 16 * (3 * 8 * 8) * 8  # 4 x 4 patches
    predictor = 16 * (8 * 8 + 8 * 4 + 4 * 2 + 2 * 2)
    head = 8 * 5
    expected = patch_embed + block(1 + 16) + predictor + block(1 + 8) + head
    assert count_gflops(model, 32) == pytest.approx(expected / 1e9, rel=1e-12)


def test_model_stays_as_it_is() -> None:
    model = create_model("lvvit_s", img_size=32, embed_dim=16, num_heads=2, depth=2, pruning_loc=[1], num_classes=5)
    before = copy.deepcopy(model.state_dict())
    count_gflops(model.train(), 32)
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_backward_pass_is_counted() -> None:
    layer, rows = torch.nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    assert gflops_of(lambda: layer(rows).sum().backward()) == pytest.approx(3 * 7 * 3 * 5 / 1e9)
