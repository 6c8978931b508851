"""Files that maskers need: read once, checked, hashed; and what watches a model to make them."""

import hashlib
import os
from typing import ClassVar

import attrs
import pytest
import torch

from sah_core import Masker, param
from sah_core.artifacts import content_hash, read_once, require_file, watch_attention
from sah_core.errors import ArtifactError

pytestmark = pytest.mark.unit

READ = []


def reader(path):
    READ.append(path)
    return path.read_text()


@attrs.frozen(kw_only=True)
class Learned(Masker):
    """Has one file that it needs and one that it may have."""

    name: ClassVar[str] = "learned"
    weights_file: str = param(type=str, artifact=True, help="Needed.")
    more_file: str | None = param(None, type=str, artifact=True, help="Not needed.")
    other: str = param("x", type=str, help="No file.")


def test_a_file_is_read_once_until_it_changes(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    READ.clear()
    assert [read_once(file, reader), read_once(str(file), reader)] == ["one", "one"]
    assert len(READ) == 1
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert read_once(file, reader) == "two"
    assert len(READ) == 2


def test_what_a_reader_refuses_is_not_kept(tmp_path):
    file = tmp_path / "a"
    file.write_text("1")

    def fail(path):
        raise ArtifactError(str(path), "it is damaged")

    for _ in range(2):
        with pytest.raises(ArtifactError, match="damaged"):
            read_once(file, fail)


def test_the_content_hash_follows_the_content(tmp_path):
    file = tmp_path / "a"
    for number, content in enumerate((b"one", b"three")):
        file.write_bytes(content)
        os.utime(file, ns=(number, number))
        assert content_hash(file) == hashlib.sha256(content).hexdigest()


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="there is no such file"):
        require_file(tmp_path / "none")
    with pytest.raises(ArtifactError, match="it is no file"):
        require_file(tmp_path)


def test_a_masker_names_the_files_of_its_parameters(tmp_path):
    masker = Learned(weights_file=str(tmp_path / "w"))
    assert masker.artifacts() == {"weights_file": tmp_path / "w"}
    with pytest.raises(ArtifactError, match="no such file"):
        masker.check_artifacts()
    (tmp_path / "w").touch()
    masker.check_artifacts()
    assert Learned(weights_file="w", more_file="m").artifacts().keys() == {
        "weights_file",
        "more_file",
    }
    assert Masker().artifacts() == {}


def test_every_layer_shows_the_queries_and_keys_that_attention_sees(models):
    model = models.build("llama")
    ids = models.tokens(1, 9)
    seen = {}
    watch_attention(model, ids, lambda inputs: seen.update({inputs.layer: inputs}))
    assert sorted(seen) == list(range(model.config.num_hidden_layers))
    last = seen[max(seen)]
    assert last.query.shape[2] == last.key.shape[2] == 9
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    torch.testing.assert_close(last.key, cache.layers[-1].keys)
