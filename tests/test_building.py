"""Networks from names and import paths, and their weights from files: what is taken, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision

from lightning_ptq import PTQError
from lightning_ptq.building import build_model, build_network, load_weights
from lightning_ptq.models import digits_net, resnet20
from tests.helpers import TinyNet, assert_equal_states, tiny_net

DIGITS = Path(__file__).parents[1] / "lightning_ptq" / "demo" / "digits.pt"


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nowhere.pt", r"weights='nowhere.pt' is no file, seen from"),
        ("gone/weights", r"weights='gone/weights' is no file, seen from"),
        ("IMAGENET1K_V9", r"'IMAGENET1K_V9' is no file, and of 'resnet18' torchvision has IMAGENET1K_V1\. Name one"),
        ("ResNet18_Weights.IMAGENET1K_V9", r"'ResNet18_Weights.IMAGENET1K_V9' is no file, and of 'resnet18' torchvi"),
        ("ResNet50_Weights.IMAGENET1K_V1", r"'ResNet50_Weights.IMAGENET1K_V1' is no file, and of 'resnet18' torchvi"),
    ],
)
def test_weights_of_a_torchvision_model_that_are_not_there_are_named(weights: str, message: str) -> None:
    with pytest.raises(PTQError, match=message):
        build_network("resnet18", weights)


@pytest.mark.parametrize("weights", ["IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1", "DEFAULT"])
def test_weights_that_cannot_be_downloaded_are_named(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torchvision.models, "get_model", offline)
    with pytest.raises(PTQError, match=rf"'{weights}' of 'resnet18' can't be downloaded: .*no network"):
        build_network("resnet18", weights)


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            lambda folder: resnet20().state_dict(),
            r"do not fit CifarResNet: 72 unexpected \(layer1\.1\.conv1\.weight, layer1\.1\.bn1\.weight, "
            r"layer1\.1\.bn1\.bias, \.\.\.\), 2 of another shape \(conv1\.weight, linear\.weight\)\. Give",
        ),
        (lambda folder: [1, 2, 3], "do not fit CifarResNet: it holds a list, not a state dict"),
        (lambda folder: torch.zeros(3), "do not fit CifarResNet"),
        (lambda folder: {"epoch": 3}, "do not fit CifarResNet"),
        (lambda folder: {"state_dict": {}, "code": Bomb(folder / "ran")}, "can't be read"),
    ],
    ids=["another model", "a list", "a tensor", "no state dict", "code"],
)
def test_weights_that_do_not_fit_are_refused_and_run_no_code(
    tmp_path: Path, content: Callable[[Path], Any], message: str
) -> None:
    torch.save(content(tmp_path), tmp_path / "weights.pt")
    with pytest.raises(PTQError, match=message):
        build_network("lightning_ptq.models.digits_net", str(tmp_path / "weights.pt"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("prefix", ["module.", "model.net."])
def test_weights_that_a_wrapper_saved_are_the_model_s(tmp_path: Path, prefix: str) -> None:
    """Those of DDP, and of a LightningModule with parameters of its own."""
    trained, model = tiny_net(), TinyNet()
    wrapped = {prefix + key: value for key, value in trained.state_dict().items()}
    torch.save({"state_dict": {"loss.weight": torch.ones(3), **wrapped}}, tmp_path / "weights.pt")
    load_weights(model, str(tmp_path / "weights.pt"))
    assert_equal_states(model.state_dict(), trained.state_dict())
    del wrapped[f"{prefix}fc.bias"]
    torch.save(wrapped, tmp_path / "weights.pt")
    with pytest.raises(PTQError, match=r"do not fit TinyNet: .* missing"):
        load_weights(model, str(tmp_path / "weights.pt"))


def test_one_of_two_sets_of_weights_is_not_chosen_for_the_user(tmp_path: Path) -> None:
    """A LightningModule with an average of its weights holds them twice."""
    trained, other, path = tiny_net().state_dict(), TinyNet().state_dict(), tmp_path / "weights.pt"

    def save(second: dict[str, torch.Tensor]) -> None:
        both = {"net": trained, "ema": second}
        torch.save({f"{name}.{key}": value for name, state in both.items() for key, value in state.items()}, path)

    save(other)
    with pytest.raises(PTQError, match=r"holds weights of TinyNet below 'net\.' and 'ema\.', and they differ"):
        load_weights(TinyNet(), str(path))
    torch.save({**trained, **{f"ema.{key}": value for key, value in other.items()}}, path)
    with pytest.raises(PTQError, match=r"below '' and 'ema\.', and they differ"):
        load_weights(TinyNet(), str(path))
    save(trained)  # the same twice is no choice
    for extra in ({}, trained):
        torch.save({**torch.load(path, weights_only=True), **extra}, path)
        model = TinyNet()
        load_weights(model, str(path))
        assert_equal_states(model.state_dict(), trained)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_below_a_usual_key_are_found(tmp_path: Path, key: str) -> None:
    state = torch.load(DIGITS, weights_only=True)
    torch.save({key: state, "epoch": 3}, tmp_path / "weights.pt")
    model = digits_net()
    load_weights(model, str(tmp_path / "weights.pt"))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_of_torchvision_has_as_many_classes_as_its_weights(tmp_path: Path) -> None:
    trained = build_model("resnet18", num_classes=7)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    network = build_network("resnet18", str(tmp_path / "weights.pt"))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(network(images), trained.eval()(images))
    torch.save(build_model("resnet34").state_dict(), tmp_path / "other.pt")
    with pytest.raises(PTQError, match=r"other.pt' do not fit ResNet: \d+ unexpected"):
        build_network("resnet18", str(tmp_path / "other.pt"))


def test_networks_with_a_backbone_of_their_own_are_built_without_a_download() -> None:
    network = build_model("lraspp_mobilenet_v3_large")
    assert type(network).__name__ == "LRASPP"
