"""Names by content."""

import hashlib

import pytest

from sah_core import hashing

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SAH_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"some bytes")
    return path


def test_a_hash_is_remembered_until_the_file_changes(source, monkeypatch):
    first = hashing.file_sha256(source)
    assert first == hashlib.sha256(b"some bytes").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(hashing, "sha256_of", lambda path: pytest.fail("read again"))
        assert hashing.file_sha256(source) == first
    source.write_bytes(b"other bytes")
    assert hashing.file_sha256(source) != first


def test_hashing_works_without_a_cache_folder(tmp_path, source, monkeypatch):
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("SAH_CACHE_DIR", str(tmp_path / "blocked"))
    assert hashing.file_sha256(source) == hashing.sha256_of(source)


def test_several_files_have_one_hash_that_names_and_contents_make(tmp_path):
    paths = [tmp_path / name for name in ("b", "a")]
    for path in paths:
        path.write_text(path.name)
    first = hashing.files_sha256(paths)
    assert hashing.files_sha256(paths[::-1]) == first
    paths[0].write_text("c")
    assert hashing.files_sha256(paths) != first
    paths[0].write_text("b")
    assert hashing.files_sha256([paths[1], paths[0].rename(tmp_path / "d")]) != first


def test_a_text_is_named_by_its_content():
    assert hashing.text_id("a") == hashlib.sha256(b"a").hexdigest()[:16]
