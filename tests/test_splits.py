"Splits beyond the papers': by a seed, from training classes alone."

import numpy as np
import pytest
import torch

from dml_nb.data import load_dataset
from dml_nb.data.folders import load_folder
from dml_nb.data.image_sets import ImageSet, RetrievalData
from dml_nb.data.label_noise import symmetric_noise, with_noise
from dml_nb.data.splits import apply_split, class_folds, few_shot


def uneven():
    sizes = np.array([1, 2, 3, 5, 8, 13, 2, 4])
    pixels = np.random.default_rng(0).integers(0, 256, (sizes.sum(), 8, 8), np.uint8)
    whole = ImageSet("all", np.repeat(np.arange(8), sizes), list("abcdefgh"), array=pixels)
    return RetrievalData("uneven", whole.subset(range(6), "train"), whole.subset([6, 7], "test"))


@pytest.mark.parametrize("seed", [0, 3])
def test_folds_cover_every_training_class_once(seed):
    data = load_dataset("glyphs")
    folds = class_folds(data, 4, seed)
    held = [set(fold.test.classes) for fold in folds]
    assert set().union(*held) == set(data.train.classes) and sum(map(len, held)) == len(data.train.classes)
    assert max(map(len, held)) - min(map(len, held)) <= 1
    for fold, classes in zip(folds, held):
        assert not classes & set(fold.train.classes) and not set(fold.train.classes) & set(data.test.classes)
        assert len(fold.train) + len(fold.test) == len(data.train)


def test_few_shot_keeps_k_images_of_a_class_or_all():
    few = few_shot(uneven(), 3)
    assert few.train.labels.bincount().tolist() == [1, 2, 3, 3, 3, 3]
    whole = uneven().train
    for image, label in zip(few.train.array, few.train.labels):
        found = (whole.array == image).all((1, 2))
        assert found.sum() == 1 and whole.labels[found] == label
    assert len({image.tobytes() for image in few.train.array}) == len(few.train)


def test_every_image_can_be_drawn():
    drawn = {image.tobytes() for seed in range(60) for image in few_shot(uneven(), 2, seed).train.array}
    assert len(drawn) == len(uneven().train)


def test_few_images_of_files_keep_paths_labels_and_transform(glyph_folder):
    data = load_folder(glyph_folder)
    data.train.transform = np.asarray
    few = few_shot(data, 4, seed=1)
    assert few.train.transform is np.asarray and len(few.train) == 4 * len(data.train.classes)
    for path, label in zip(few.train.paths, few.train.labels):
        assert data.train.labels[[str(p) for p in data.train.paths].index(str(path))] == label
    assert few.checksum != data.checksum and few.test is data.test


def test_queries_of_a_subset_stay_queries():
    data = uneven()
    data.train.is_query = torch.arange(len(data.train)) % 2 == 0
    few, order = few_shot(data, 3).train, [image.tobytes() for image in data.train.array]
    for image, is_query in zip(few.array, few.is_query):
        assert is_query == data.train.is_query[order.index(image.tobytes())]


def test_images_with_noisy_labels_are_refused():
    data = uneven()
    noisy = with_noise(data, symmetric_noise(data.train.labels, 0.3, 6))
    for split in (lambda: few_shot(noisy, 2), lambda: class_folds(noisy, 2)):
        with pytest.raises(ValueError, match="noisy labels"):
            split()


def test_the_settings_of_a_run_choose_the_split():
    data = load_dataset("glyphs")
    assert apply_split(data) is data
    assert apply_split(data, holdout=1).checksum == data.holdout(0.3, 1).checksum
    both = apply_split(data, fold=2, shots=3, seed=4)
    assert both.checksum == few_shot(class_folds(data, seed=4)[2], 3, 4).checksum
    assert both.train.labels.bincount().tolist() == [3] * len(both.train.classes)
    assert both.test.checksum == class_folds(data, seed=4)[2].test.checksum  # evaluation uses all images
    assert "fold 2 of 4, seed 4" in both.name and "3 images per class" in both.name
    with pytest.raises(ValueError, match="no fold 4: choose from 0 to 3"):
        apply_split(data, fold=4)
    with pytest.raises(ValueError, match="choose one of them"):
        apply_split(data, holdout=0, fold=0)


def test_every_fold_has_two_classes_to_confuse():
    with pytest.raises(ValueError, match="4 folds need at least 8 training classes"):
        class_folds(uneven(), 4)
    assert all(len(fold.test.classes) == 3 for fold in class_folds(uneven(), 2))
