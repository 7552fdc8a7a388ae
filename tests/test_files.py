"Files as other people and other programs find them."

import os

import pytest
import torch
from safetensors.torch import save_file

from dml_nb.core.files import write_atomically


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_those_who_share_a_cache_can_read_what_one_of_them_wrote(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "text", lambda path: path.write_text("x", encoding="utf-8"))
        write_atomically(tmp_path / "features", lambda path: save_file(dict(x=torch.ones(2)), path))
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("text", "features")] == [mode] * 2
