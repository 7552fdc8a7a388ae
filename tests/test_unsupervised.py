"Training without labels: the teacher across an interruption, bad input in one sentence, a flat folder, and the rows."

import warnings

import pytest
import torch
from fastai.callback.core import Callback

from dml_nb.data.glyphs import letter_folder
from dml_nb.data.unlabelled import load_unlabelled
from dml_nb.experiments import unlabelled_training
from dml_nb.experiments.recipes import settings_for
from dml_nb.experiments.tables import find_rows, load_recipes, row_of, slug
from dml_nb.losses import create_loss
from dml_nb.losses.momentum_teacher import exponential_average, flat
from dml_nb.models.embedder import EmbeddingHead, create_embedder
from dml_nb.training.checkpoint import Checkpoint, resume
from dml_nb.training.learner import dml_learner, feature_dls, image_dls

pytestmark = pytest.mark.filterwarnings("ignore:the training has", "ignore:batch_size")
WITH_TEACHER = dict(stml=dict(second_size=12, momentum=0.9), instance_discrimination=dict(memory_size=40, momentum=0.9))
WITHOUT_LABELS = load_recipes()["without_labels"]


def features(images=48):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 16, generator=generator)[torch.arange(images) % 6] + torch.randn(
        images, 16, generator=generator
    )


def new_learner(name="stml", x=None, batch_size=12, cbs=(), **params):
    "A head on features, whose labels are all 0."
    torch.manual_seed(0)
    x = features() if x is None else x
    dls = feature_dls(x, torch.zeros(len(x)), x[:0], torch.zeros(0), batch_size=batch_size)
    loss = create_loss(name, embedding_size=8, **WITH_TEACHER.get(name, {}) | params)
    learn = dml_learner(dls, EmbeddingHead(16, 8), loss, lr=1e-2, proxy_lr_mult=1, warm_epochs=0, cbs=cbs)
    return learn


class KeepStudents(Callback):
    "Copy everything that the teacher averages after each step."

    order = 60  # after `MomentumTeacher`

    def __init__(self, students, stop_after=None):
        self.students, self.stop_after = students, stop_after

    def after_create(self):
        if not self.students:
            self.students.append(flat(self.loss_func.averaged_state(self.model)))

    def after_step(self):
        self.students.append(flat(self.loss_func.averaged_state(self.model)))

    def after_batch(self):
        if len(self.students) - 1 == self.stop_after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_is_the_average_to_the_last_bit_also_after_an_interruption(name, tmp_path):
    whole, parts = [], []
    new_learner(name, cbs=[KeepStudents(whole)]).fit(2)
    with pytest.raises(KeyboardInterrupt):
        new_learner(name, cbs=[KeepStudents(parts, stop_after=6)]).fit(2, cbs=[Checkpoint(tmp_path, minutes=0)])
    learn = new_learner(name, cbs=[KeepStudents(parts)])
    resume(learn, tmp_path / "checkpoint.pt", "")
    learn.fit(2)
    assert len(parts) == len(whole) == 9 and all(a.equal(b) for a, b in zip(parts, whole))
    expected = parts[0]
    for student in parts[1:]:
        expected = exponential_average(expected, student, 0.9)
    assert learn.loss_func.teacher_P.equal(expected)


@pytest.mark.parametrize(
    "name, images, batch_size, message",
    [
        ("stml", 48, 4, "a batch of 4 images has no room for 5 neighbours: raise batch_size, or lower neighbours."),
        ("stml", 48, 1, "a batch of 1 images has no room for 5 neighbours"),
        ("stml", 4, 4, "a batch of 4 images has no room for 5 neighbours"),
    ],
)
def test_neighbours_that_are_not_there_are_one_sentence(name, images, batch_size, message):
    with pytest.raises(ValueError, match=message):
        new_learner(name, features(images), batch_size)


@pytest.mark.parametrize("name", WITHOUT_LABELS)
@pytest.mark.parametrize("images", [1, 48], ids=["a batch of one", "copies of one picture"])
def test_degenerate_images_train_to_finite_weights(name, images):
    params = dict(neighbours=1) if name == "stml" else {}
    learn = new_learner(name, features()[:1].repeat(images, 1), min(images, 12), **params)
    if name == "pseudo_labels":
        warnings.filterwarnings("ignore", "Number of distinct clusters")  # of scikit-learn
    learn.fit(1)
    assert all(value.isfinite().all() for value in [*learn.model.parameters(), *learn.loss_func.parameters()])


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_views_that_are_not_finite_name_the_images(name):
    learn = new_learner(name)

    class BreakView(Callback):
        def before_batch(self):
            self.learn.xb = (self.xb[0].index_fill(0, torch.tensor([3]), torch.nan),)

    with pytest.raises(FloatingPointError, match="an embedding is NaN or infinite in epoch 0 at step 0, with the"):
        learn.fit(1, cbs=[BreakView()])


@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_a_flat_folder_of_images_trains_a_network(name, tmp_path):
    letter_folder(tmp_path / "letters")
    data = load_unlabelled(tmp_path / "letters" / "a")
    model = create_embedder("small_cnn", 8, pool="avg", pretrained=False)
    params = dict(second_size=12) if name == "stml" else {}
    loss = create_loss(name, embedding_size=8, **params)
    learn = dml_learner(image_dls(data, model.spec, 10), model, loss, warm_epochs=0)
    before = flat(model.state_dict())
    with learn.no_bar(), learn.no_logging():
        assert learn.fit_schedule(1) == {}  # nothing is evaluated
    assert not flat(model.state_dict()).equal(before) and "R@1" not in learn.retrieval_metrics.history[0]


def test_no_row_without_labels_draws_batches_by_class():
    rows = [row_of(f"own/{slug(loss)}") for loss in WITHOUT_LABELS] + find_rows("unsupervised")
    for row in rows:
        assert row.recipe["loss"] in WITHOUT_LABELS
        for where in (dict(dataset="glyphs", backbone="small_cnn"), dict(dataset="cub", backbone="bn_inception")):
            assert "per_class" not in settings_for(row, **where)


@pytest.mark.parametrize("loss", WITHOUT_LABELS)
def test_batches_by_class_are_refused_without_labels(loss):
    row, where = row_of(f"own/{slug(loss)}"), dict(dataset="glyphs", backbone="small_cnn", batch_size=100)
    with pytest.raises(ValueError, match=f"per_class concerns labels, which {loss} must not read"):
        settings_for(row, **where, per_class=5)
    assert "per_class" not in settings_for(row, **where, per_class=None)
    for name, value in dict(noise="20%", shots=4).items():
        with pytest.raises(ValueError, match=f"{name} concerns labels"):
            settings_for(row, **where, **{name: value})


def test_a_training_on_unlabelled_pictures_uses_each_setting(tmp_path):
    letter_folder(tmp_path / "letters")
    small = dict(epochs=1, embedding_size=8, batch_size=10, second_size=12, image_size=32)

    def weights(**settings):
        trained, _ = unlabelled_training.train_unlabelled(tmp_path / "letters" / "a", "small_cnn", **small | settings)
        return flat(trained.state_dict())

    resized = dict(train_crop="resize", image_resize=40)
    settings = [{}, dict(crop_scale=1.0), dict(optimizer="sgd"), resized, resized | dict(image_resize=64)]
    assert len({tuple(weights(**setting).tolist()) for setting in settings}) == len(settings)


def test_the_table_of_methods_without_labels():
    claimed = {row.id.split("/")[1]: row.claimed["R@1"] for row in find_rows("unsupervised")}
    assert claimed == {
        "cub-stml": "60.6",
        "cars-stml": "50.5",
        "sop-stml": "65.3",
        "cub-stml-128-d": "59.7",
        "cars-stml-128-d": "49.0",
        "sop-stml-128-d": "65.8",
        "cub-moco": "51.0",
        "cars-moco": "39.0",
        "sop-moco": "53.4",
    }
    on_sop, on_cub = (settings_for(row_of(f"003-unsupervised/{data}-stml")) for data in ("sop", "cub"))
    assert on_sop["params"] == dict(delta=0.9, neighbours=2, momentum=0.9) and on_cub["params"] == {}
    assert (on_cub["epochs"], on_cub["batch_size"], on_cub["schedule"]) == (90, 120, "cosine")
    assert (on_sop["head_lr"], on_cub["head_lr"]) == (0.01, None)
    here = find_rows("unsupervised", "groceries-mini")
    assert [row.embedding_size for row in here] == [512, 128, 512]
