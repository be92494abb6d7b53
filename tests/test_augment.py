"""Images changed at random."""

import pytest
import torch

from lightning_ptq import Augmentation, PTQError


def test_every_image_is_a_window_of_its_mirrored_surroundings() -> None:
    images = torch.randn(64, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    changed = Augmentation(flip=True, shift=2)(images, torch.Generator().manual_seed(1))
    assert changed.shape == images.shape
    seen = set()
    for image, result in zip(images, changed, strict=True):
        for flip in (False, True):
            padded = torch.nn.functional.pad((image.flip(2) if flip else image)[None], [2, 2, 2, 2], "reflect")[0]
            windows = {(y, x): padded[:, y : y + 5, x : x + 7] for y in range(5) for x in range(5)}
            seen |= {(flip, *place) for place, window in windows.items() if torch.equal(window, result)}
    assert len(seen) > 30, "64 draws of 50 equally likely changes"
    assert {flip for flip, *_ in seen} == {False, True}


def test_it_is_a_function_of_the_generator() -> None:
    images = torch.randn(8, 3, 6, 6)
    change = Augmentation(flip=True, shift=1)
    same = [change(images, torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_nothing_to_change() -> None:
    images = torch.randn(2, 3, 4, 4)
    assert not Augmentation()
    assert Augmentation()(images, torch.Generator()) is images


def test_refusals() -> None:
    with pytest.raises(PTQError, match="shift=-1 is no number of pixels"):
        Augmentation(shift=-1)
    with pytest.raises(PTQError, match="shift=4 needs larger images than 4 x 9"):
        Augmentation(shift=4).check(torch.zeros(1, 1, 4, 9))
    Augmentation(shift=3).check(torch.zeros(1, 1, 4, 9))
