"""Every kind of torchvision classification CNN: same numbers, every layer quantized, cut at its blocks.

`python -m benchmarks.census` has all of them.
"""

import pytest
import torch
import torchvision
from torch import nn

from lightning_ptq.config import QuantConfig
from lightning_ptq.graph import build_chain

TRANSFORMERS = ("vit", "swin", "maxvit")
# More of the same blocks.
LARGE = {"regnet_y_128gf", "regnet_y_32gf", "regnet_x_32gf", "convnext_base", "convnext_large"}
LARGE |= {"vgg11", "vgg13", "vgg13_bn", "vgg16_bn", "vgg19", "vgg19_bn", "efficientnet_v2_l", "wide_resnet101_2"}
LARGE |= {"resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "resnet152", "convnext_small", "efficientnet_v2_m"}
LARGE |= {f"efficientnet_b{i}" for i in range(2, 8)} | {"densenet161", "densenet169", "densenet201"}
LARGE |= {f"regnet_{kind}_{size}" for kind in "xy" for size in ("16gf", "8gf", "3_2gf")}
MODELS = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not name.startswith(TRANSFORMERS) and name not in LARGE
]
SIZES = {"inception_v3": 75, "googlenet": 64}

# Units counted by hand from the papers: single layers outside blocks + blocks + head.
BLOCK_UNITS = {
    "alexnet": 8,
    "vgg16": 16,
    "vgg11_bn": 11,
    "resnet18": 1 + 8 + 1,
    "resnet50": 1 + 16 + 1,
    "resnet101": 1 + 33 + 1,
    "resnext50_32x4d": 1 + 16 + 1,
    "mobilenet_v2": 1 + 17 + 1 + 1,
    "mobilenet_v3_large": 1 + 15 + 1 + 2,
    "mobilenet_v3_small": 1 + 11 + 1 + 2,
    "mnasnet1_0": 3 + 16 + 1 + 1,
    "efficientnet_b0": 1 + 16 + 1 + 1,
    "efficientnet_v2_s": 1 + 40 + 1 + 1,
    "regnet_y_400mf": 1 + 16 + 1,
    "regnet_x_400mf": 1 + 22 + 1,
    "convnext_tiny": 1 + 18 + 3 + 1,
    "densenet121": 1 + 4 + 3 + 1,
    "squeezenet1_0": 1 + 8 + 1,
    "squeezenet1_1": 1 + 8 + 1,
    "shufflenet_v2_x1_0": 1 + 16 + 1 + 1,
    "googlenet": 3 + 9 + 1,
    "inception_v3": 5 + 11 + 1,
}


@pytest.fixture(autouse=True)
def _skip_initialisation(monkeypatch):
    for name in [name for name in vars(nn.init) if name.endswith("_") and not name.startswith("_")]:
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


def random_model(name: str) -> nn.Module:
    """The model with random weights that keep the size of activations, and batch norm that is not the identity."""
    options = {"aux_logits": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100_003, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(noise.repeat(parameter.numel() // len(noise) + 1)[: parameter.numel()].view_as(parameter))
            if parameter.dim() > 1:
                parameter.mul_((2 / parameter[0].numel()) ** 0.5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for value, low, high in ((module.weight, 0.5, 1.0), (module.running_var, 0.5, 1.5)):
                    value.uniform_(low, high, generator=generator)
                for value in (module.bias, module.running_mean):
                    value.uniform_(-0.2, 0.2, generator=generator)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_chains_equal_the_model_and_every_layer_is_quantized(name):
    # In fp64, since random deep networks can be chaotic: efficientnet_v2_m in fp32 is 20 % off itself in fp64.
    model = random_model(name).double()
    layers = []
    hooks = [
        module.register_forward_hook(lambda module, args, output, path=path: layers.append(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    size = SIZES.get(name, 64)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
    for hook in hooks:
        hook.remove()

    pair = build_chain(model, QuantConfig(), "block")
    with torch.no_grad():
        teacher, student = pair.teacher(x), pair.student(x)

    assert expected.isfinite().all()
    # What the image changes, not the size of the output: some random networks hardly look at their input.
    scale = (expected[0] - expected[1]).abs().max()
    assert scale > 0
    for actual in (teacher, student):
        assert (actual - expected).abs().max() <= 1e-5 * scale
    assert sorted(plan.name for plan in pair.layers) == sorted(layers)
    assert len(set(pair.student.names)) == len(pair.student)
    assert {plan.unit for plan in pair.layers} == set(range(len(pair.student)))
    if name in BLOCK_UNITS:
        assert len(pair.student) == BLOCK_UNITS[name], pair.student.names


def test_the_expected_table_names_models_that_run():
    assert set(BLOCK_UNITS) <= set(MODELS)
