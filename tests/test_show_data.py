"The page that shows a data set: names of other people, noise, queries and gallery."

import re

import numpy as np
import pytest
import torch

from dml_nb.data.image_sets import ImageSet, RetrievalData
from dml_nb.data.label_noise import LabelNoise, symmetric_noise, with_noise
from dml_nb.data.show_data import IMAGES_SHOWN, WRONG_SHOWN, write_data_page


def data(names=("a", "b", "c", "d", "e", "f"), each=10):
    pixels = np.random.default_rng(0).integers(0, 256, (len(names) * each, 20, 30, 3), np.uint8)
    labels, half = np.arange(len(pixels)) // each, len(names) // 2
    whole = ImageSet("all", labels, list(names), array=pixels)
    return RetrievalData("small", whole.subset(range(half), "train"), whole.subset(range(half, len(names)), "test"))


def page_of(*args, **kwargs):
    return write_data_page(*args, **kwargs).read_text(encoding="utf-8")


def test_the_page_shows_classes_counts_and_sizes(tmp_path):
    page = page_of(data(), tmp_path / "new folder" / "page.html")
    assert [f.name for f in (tmp_path / "new folder").iterdir()] == ["page.html"]
    assert page.count("<tr>") == 6 and page.count("10 images</th>") == 6
    assert page.count("30 images of 3 classes") == 2
    assert page.count("<img ") == 6 * IMAGES_SHOWN + 2  # and two histograms
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere


def test_names_are_text_and_never_markup(tmp_path):
    bad = ["<script>alert(1)</script>", 'b" onerror="x', "c & d", "é\udcff", "$x^2$", "</table>"]
    whole = data(bad)
    whole.name = "<b>name</b>"
    noise = LabelNoise("<i>rule</i>", (whole.train.labels + 1) % 3, whole.train.labels, torch.arange(3))
    page = page_of(whole, tmp_path / "page.html", noise)
    for tag in ("<script", "<b>", "<i>", 'onerror="'):
        assert tag not in page
    assert page.count("</table>") == 2
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "c &amp; d" in page


@pytest.mark.parametrize("apply", [False, True])
def test_wrong_labels_stand_beside_the_right_ones(apply, tmp_path):
    clean = data()
    noise = symmetric_noise(clean.train.labels, 0.4, 3)
    page = page_of(with_noise(clean, noise), tmp_path / "p") if apply else page_of(clean, tmp_path / "p", noise)
    shown = re.findall(r"<figcaption><del>(.*?)</del><br>(.*?)</figcaption>", page)
    wrong = noise.wrong.nonzero()[:, 0]
    names = clean.train.classes
    assert shown == [(names[noise.true[i]], names[noise.given[i]]) for i in wrong][:WRONG_SHOWN]


def test_noise_with_labels_of_no_class_and_classes_without_a_label(tmp_path):
    clean, given = data(), torch.tensor([0, 1, 2, -1, 0] * 6)
    noise = LabelNoise("list", given, clean.train.labels, torch.tensor([0, 1, -1]))
    for page in (page_of(clean, tmp_path / "a", noise), page_of(with_noise(clean, noise), tmp_path / "b")):
        assert page.count("<figure>") == int(noise.wrong.sum())
        assert "label 2" in page


def test_queries_and_gallery_are_counted(tmp_path):
    whole = data()
    whole.test.is_query = torch.arange(30) % 3 == 0
    page = page_of(whole, tmp_path / "page.html")
    assert "10 queries, 20 gallery images; queries come first" in page
    rows = page.split("<h2>Test")[1].split("<tr>")[1:]
    for row in rows:
        frames = ['class="query"' in picture for picture in row.split("<img")[1:]]
        assert any(frames) and frames == sorted(frames, reverse=True)


def test_many_classes_and_images_make_a_small_page(tmp_path):
    page = page_of(data([f"class {c}" for c in range(400)], each=12), tmp_path / "page.html")
    assert page.count("<tr>") == 24 and len(page) < 2_000_000
    assert "class 0<br>" in page and "class 399<br>" in page
