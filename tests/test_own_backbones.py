"Networks of timm and of the user as backbones: their input, their features, their model folder, and what is missing."

import json
import socket
import sys
import time

import pytest
import torch
from torch import nn

from dml_nb.face.model_folder import FACTS, load_model, save_model
from dml_nb.models import create_embedder, weights, why_no_weights
from dml_nb.models.embedder import GREY32
from dml_nb.models.features import cached_features
from dml_nb.models.input_spec import InputSpec

VIT = "timm/test_vit"


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="the extra timm is not installed")


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise socket.gaierror("Temporary failure in name resolution")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    weights.reachable_servers.cache_clear()
    yield tmp_path / "hub"
    weights.reachable_servers.cache_clear()


@pytest.mark.parametrize("name, side", [("test_vit", 1), ("test_convnext", 5), ("test_resnet", 5)])
def test_the_input_is_that_of_timms_own_transform(timm, name, side):
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    from dml_nb.models.input_spec import image_transform

    net = create_embedder(f"timm/{name}", 8, pretrained=False).eval()
    picture = Image.effect_mandelbrot((300, 260), (-2, -1.2, 1, 1.2), 50).convert("RGB")
    theirs = create_transform(**resolve_model_data_config(net.backbone.net))(picture)
    ours = image_transform(net.spec)(picture)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with torch.inference_mode():
        assert net.backbone(ours[None]).shape[2:] == (side, side)


def test_the_features_of_a_transformer_are_those_of_timm(timm):
    net = create_embedder(VIT, 8, pool="avg", pretrained=False).eval()
    theirs = timm.create_model("test_vit", num_classes=0).eval()
    theirs.load_state_dict(net.backbone.net.state_dict())
    x = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        torch.testing.assert_close(net.features(x), theirs(x))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_model_folder_names_a_network_of_timm(timm, tmp_path, name):
    "Also one for another size of image, which changes the parameters of a transformer."
    net = create_embedder(f"timm/{name}", 8, pretrained=False, image_size=96).eval()
    folder = save_model(net, tmp_path / "model")
    info = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    assert info["architecture"]["backbone"] == f"timm/{name}" and info["input"]["interpolation"] == "bicubic"
    assert info["weights_licence"].startswith("apache-2.0 (timm, timm/")
    loaded, x = load_model(folder), torch.randn(2, 3, 96, 96)
    assert loaded.spec == net.spec and loaded.spec.crop == 96
    with torch.inference_mode():
        assert loaded(x).equal(net(x))


def test_without_timm_one_sentence_says_how_to_get_it(timm, tmp_path, monkeypatch):
    folder = save_model(create_embedder(VIT, 8, pretrained=False), tmp_path / "model")
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    for call in (lambda: create_embedder(VIT, 8), lambda: load_model(folder)):
        with pytest.raises(ModuleNotFoundError, match=r"timm/test_vit: .*pip install 'dml_nb\[timm\]'\.$"):
            call()
    assert "pip install 'dml_nb[timm]'" in why_no_weights(VIT)


def test_weights_of_timm_that_cannot_be_had_are_known_at_once(timm, no_network):
    started = time.perf_counter()
    with pytest.raises(OSError, match=f"its weights are not in {no_network} and huggingface.co does not answer"):
        create_embedder(VIT, 8)
    assert time.perf_counter() - started < 3
    (no_network / "models--timm--test_vit.r160_in1k").mkdir(parents=True)
    assert why_no_weights(VIT) is None


def test_a_wrong_name_of_timm_is_one_sentence(timm, tmp_path):
    with pytest.raises(ValueError, match="unknown network of timm 'test_vitt': did you mean 'test_vit"):
        create_embedder("timm/test_vitt", 8)
    with pytest.raises(ValueError, match="timm/test_vit.nope cannot be made: Invalid pretrained tag"):
        create_embedder("timm/test_vit.nope", 8, pretrained=False)
    with pytest.raises(ValueError, match="unknown network of timm 'hf-hub:a/b'"):  # a name never leads to a download
        create_embedder("timm/hf-hub:a/b", 8, pretrained=False)


def test_a_size_that_a_transformer_cannot_have_is_one_sentence(timm):
    with pytest.raises(ValueError, match=r"the backbone fails for an input of shape \(1, 3, 100, 100\)"):
        create_embedder(VIT, 8, pretrained=False, image_size=100)


def test_a_network_made_by_timm_needs_no_input(timm):
    net = create_embedder(timm.create_model("test_convnext", num_classes=0, global_pool=""), 8)
    assert (net.spec.crop, net.backbone.name) == (160, "own/ConvNeXt")


def test_features_of_timm_are_cached_and_a_run_accepts_the_name(timm, draw_photos, tmp_path, shell, no_network):
    data, files = draw_photos(), tmp_path / "cache" / "features"
    spec = create_embedder(VIT, 8, pretrained=False, image_size=96).spec
    features = cached_features(VIT, data.train, spec=spec, cache=tmp_path / "cache", workers=0, allow_random=True)
    assert features.shape == (len(data.train), 64)
    assert [file.name.startswith("timm-test_vit-96") for file in files.iterdir()] == [True]
    output = shell("run", "circle", "--dataset", "glyphs", "--backbone", VIT, status=1)
    assert "the backbone timm/test_vit cannot be trained here: its weights are not in" in output


def test_nothing_of_a_users_module_is_stored_but_its_numbers(tmp_path):
    class Evil(nn.Flatten):
        def __reduce__(self):
            raise AssertionError("the module was pickled")

    net = create_embedder(Evil(), 8, pool="avg", input_spec=GREY32)
    folder = save_model(net, tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "model.safetensors"]
    x = torch.randn(2, 1, 32, 32)
    with torch.inference_mode():
        assert load_model(folder, backbone=nn.Flatten())(x).equal(net.eval()(x))
    with pytest.raises(ValueError, match="own module of the class Evil: load_model"):
        load_model(folder)


def test_a_module_keeps_its_mode_and_its_statistics():
    net = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten())
    create_embedder(net, 8, input_spec=GREY32)
    assert net.training and net[0].num_batches_tracked == 0
    with pytest.raises(ValueError, match="needs its input"):
        create_embedder(net, 8)
    assert InputSpec((0.5,), (0.5,), channels=1).interpolation == "bilinear"
