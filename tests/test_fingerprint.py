"""What identifies a run, and the message when it does not fit."""

import pytest
import torch

from lightning_ptq import PTQError
from lightning_ptq.fingerprint import check_same, data_digest, model_digest
from tests.helpers import tiny_images, tiny_net


def test_model_digest_follows_every_value() -> None:
    net, other = tiny_net(), tiny_net()
    assert model_digest(net) == model_digest(other)
    other.blocks[1].bn2.running_var[3] += 1e-6
    assert model_digest(net) != model_digest(other)


def test_data_digest_follows_the_images_and_their_order() -> None:
    images = tiny_images(6)
    assert data_digest(images) == data_digest(images.clone())
    assert data_digest(images) != data_digest(images.flip(0)), "steps and judgement go by it"
    changed = images.clone()
    changed[2, 0, 0, 0] += 1e-6
    assert data_digest(changed) != data_digest(images)


def test_differences_are_named() -> None:
    check_same({"a": 1}, {"a": 1}, "config")
    with pytest.raises(
        PTQError, match="another config: a=1 in the checkpoint, 2 here; b=None in the checkpoint, 3 here"
    ):
        check_same({"a": 1}, {"a": 2, "b": 3}, "config")


def test_digest_of_half_precision_weights() -> None:
    assert len({model_digest(torch.nn.Linear(2, 2).to(dtype)) for dtype in (torch.half, torch.bfloat16)}) == 2
