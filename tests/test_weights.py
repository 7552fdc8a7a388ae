"Download of the BN-Inception weights from a local HTTP server, over intact and failing connections."

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from dml_nb.models.bn_inception import BNInception, bn_inception_weights


def checkpoint(folder, change=lambda state: state, **save_options):
    "A small checkpoint with the key names of the public one; its file name contains its SHA-256."
    keys = {k: v.shape for k, v in BNInception().state_dict().items() if not k.endswith("num_batches_tracked")}
    state = {k: torch.tensor(float(i)).expand(shape) for i, (k, shape) in enumerate(keys.items())}
    state |= {"last_linear.weight": torch.zeros(1).expand(1000, 1024), "last_linear.bias": torch.zeros(1000)}
    raw = folder / "raw.pth"
    torch.save(change(state), raw, **save_options)
    return raw.rename(folder / f"bn_inception-{hashlib.sha256(raw.read_bytes()).hexdigest()[:9]}.pth")


@pytest.fixture
def server():
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

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.files, httpd.cut, httpd.asked = {}, 0, []
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def publish(server, file, name=None):
    "Put a file on the server and return its address."
    path = f"/{name or file.name}"
    server.files[path] = file.read_bytes()
    return server.url + path


@pytest.mark.parametrize("zipped", [True, False], ids=["new format", "format of the public file"])
def test_weights_are_loaded_and_downloaded_only_once(server, tmp_path, zipped):
    url = publish(server, checkpoint(tmp_path, _use_new_zipfile_serialization=zipped))
    net = BNInception()
    net.load_state_dict(bn_inception_weights(url, tmp_path / "cache"))
    values = [v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")]
    assert all((v == i).all() for i, v in enumerate(values))
    bn_inception_weights(url, tmp_path / "cache")
    assert len(server.asked) == 1


def test_tensors_of_shape_1_c_are_squeezed(server, tmp_path):
    def one_row(state):
        return {k: v[None] if "_bn." in k else v for k, v in state.items()}

    state = bn_inception_weights(publish(server, checkpoint(tmp_path, one_row)), tmp_path / "cache")
    assert state["conv1_7x7_s2_bn.running_var"].shape == (64,)
    assert "last_linear.weight" not in state
    BNInception().load_state_dict(state)


def test_default_folder_is_in_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("DML_NB_CACHE", str(tmp_path / "root"))
    file = checkpoint(tmp_path)
    bn_inception_weights(publish(server, file))
    assert (tmp_path / "root" / "weights" / file.name).exists()


def test_file_with_a_wrong_hash_is_deleted(server, tmp_path):
    url = publish(server, checkpoint(tmp_path), "bn_inception-52deb4733.pth")
    with pytest.raises(RuntimeError, match="is damaged"):
        bn_inception_weights(url, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_truncated_download_is_deleted_and_can_be_repeated(server, tmp_path):
    url, server.cut = publish(server, checkpoint(tmp_path)), 1000
    with pytest.raises(RuntimeError, match=url):
        bn_inception_weights(url, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    server.cut = 0
    assert bn_inception_weights(url, tmp_path / "cache")


def test_error_for_a_missing_file_states_address_and_remedy(server, tmp_path):
    url = f"{server.url}/bn_inception-52deb4733.pth"
    with pytest.raises(RuntimeError) as error:
        bn_inception_weights(url, tmp_path / "cache")
    for part in (url, "404", f"put it into {tmp_path / 'cache'}", "pretrained=False"):
        assert part in str(error.value)


def test_unreachable_server(server, tmp_path):
    url = f"{server.url}/bn_inception-52deb4733.pth"
    server.server_close()
    with pytest.raises(RuntimeError, match="cannot download .* pretrained=False"):
        bn_inception_weights(url, tmp_path / "cache")


def test_file_copied_by_hand_needs_no_network(server, tmp_path):
    file = checkpoint(tmp_path)
    assert bn_inception_weights(f"{server.url}/{file.name}", tmp_path)
    assert server.asked == []


def test_damaged_file_copied_by_hand_is_refused_and_kept(server, tmp_path):
    file = checkpoint(tmp_path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="is damaged or not the right file"):
        bn_inception_weights(f"{server.url}/{file.name}", tmp_path)
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
    with pytest.raises(RuntimeError, match=f"1 keys are missing, unknown or of another shape, first '{first}'"):
        bn_inception_weights(publish(server, checkpoint(tmp_path, change)), tmp_path / "cache")
