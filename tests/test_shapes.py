"""The generated data set: always the same images, and an object where the mask says."""

import hashlib
import pickle
import random

import numpy as np
import pytest
import torch
from dynamicvit.data.shapes import COVERAGE, OUTLINES, PALETTE, Shapes

SPLITS = pytest.mark.parametrize("train", [True, False], ids=["train", "val"])


def pixels_of(dataset: Shapes, i: int) -> np.ndarray:
    return np.asarray(dataset[i][0]).astype(int)


@pytest.mark.parametrize(
    ("train", "digest"),
    [
        (True, "f9924a28545a5e8fb7ecafe9eda23f957311d5ef2fb2b20661388c8544963956"),
        (False, "7a67c0f487439629716a82594c0fa37a23920683bb2ce0822e3d452a10156cf7"),
    ],
    ids=["train", "val"],
)
def test_images_are_the_same_on_every_machine(train, digest):
    dataset = Shapes(train)
    images = b"".join(dataset[i][0].tobytes() for i in range(9))
    assert hashlib.sha256(images).hexdigest() == digest


@SPLITS
def test_images_do_not_depend_on_what_was_read_before(train):
    forwards, backwards = Shapes(train), Shapes(train, length=20)
    expected = [pixels_of(forwards, i) for i in range(20)]
    for i in reversed(range(20)):
        backwards.object_mask(i)
        np.testing.assert_array_equal(pixels_of(backwards, i), expected[i])


def test_every_image_is_different():
    images = {Shapes(train)[i][0].tobytes() for train in (True, False) for i in range(50)}
    assert len(images) == 100


@SPLITS
def test_global_generators_are_left_alone(train):
    def states():
        return random.getstate(), pickle.dumps(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    Shapes(train)[0]
    Shapes(train).object_mask(0)
    assert states() == before


@SPLITS
def test_labels_are_balanced(train):
    dataset = Shapes(train, size=32, length=90)
    labels = [label for _, label in dataset]
    assert np.bincount(labels, minlength=len(dataset.classes)).tolist() == [10] * 9


@pytest.mark.parametrize(("train", "length"), [(True, 6000), (False, 2000)])
def test_length(train, length):
    assert len(Shapes(train)) == length
    assert len(Shapes(train, length=5)) == 5
    for outside in (-1, 5):
        with pytest.raises(IndexError):
            Shapes(train, length=5)[outside]
        with pytest.raises(IndexError):
            Shapes(train, length=5).object_mask(outside)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_any_size_shows_the_same_scene(size):
    dataset, large = Shapes(False, size=size), Shapes(False, size=size * 3)
    for i in range(9):
        image, label = dataset[i]
        assert (image.size, image.mode, label) == ((size, size), "RGB", large[i][1])
        shrunk = large.object_mask(i).reshape(size, 3, size, 3).mean(axis=(1, 3))
        # Exactly so, but for pixels on the outline.
        assert dataset.object_mask(i)[shrunk == 1].all()
        assert not dataset.object_mask(i)[shrunk == 0].any()


def test_small_sizes_are_refused():
    with pytest.raises(ValueError, match="31"):
        Shapes(True, size=31)


@SPLITS
def test_mask_marks_the_pixels_that_have_the_colour_of_the_class(train):
    dataset = Shapes(train)
    for i in range(60):
        pixels, mask = pixels_of(dataset, i), dataset.object_mask(i)
        colour = PALETTE[dataset[i][1] // len(OUTLINES)]
        # 30 is the spread of an object's colour, 25 that of the noise, which hits all channels alike.
        assert abs(pixels[mask].mean(axis=0) - colour).max() < 30 + 4
        assert abs(pixels[mask] - pixels[mask].mean(axis=0)).max() < 25 + 4
        assert abs(pixels[~mask] - pixels[mask].mean(axis=0)).max(axis=1).mean() > 40


@SPLITS
def test_objects_lie_inside_and_cover_what_they_should(train):
    dataset = Shapes(train)
    masks = np.stack([dataset.object_mask(i) for i in range(200)])
    areas = masks.mean(axis=(1, 2))
    assert COVERAGE[0] - 0.005 < areas.min() < areas.max() < COVERAGE[1] + 0.005
    # Nothing is cut off: discs and rings are round, as wide as they are high.
    for mask in (mask for i, mask in enumerate(masks) if i % len(OUTLINES) < 2):
        assert abs(int(mask.any(axis=0).sum()) - int(mask.any(axis=1).sum())) <= 2


def test_size_does_not_give_the_class_away():
    dataset = Shapes(True)
    areas = np.array([dataset.object_mask(i).mean() for i in range(600)])
    for k in range(len(OUTLINES)):
        assert areas[k :: len(OUTLINES)].mean() == pytest.approx(np.mean(COVERAGE), abs=0.006)
