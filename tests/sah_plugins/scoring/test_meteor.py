"""METEOR and the WordNet reader, on a small database of invented words."""

import zipfile

import pytest

from sah_core.errors import MissingLibraryError
from sah_plugins.scoring import wordnet
from sah_plugins.scoring.meteor import meteor

pytestmark = pytest.mark.unit

PARTS = {
    "noun": (
        "00000000 03 n 03 car 0 auto 0 motor_car 0 000 | a vehicle",
        "00000000 03 n 02 knife 0 blade 0 000 | a tool",
    ),
    "verb": ("00000000 29 v 02 go 0 move 0 000 | change place",),
    "adj": ("00000000 00 a 02 fast 0 quick(a) 0 000 | not slow",),
    "adv": (),
}
EXCEPTIONS = {"verb": "went go\n"}


def write(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for part, lines in PARTS.items():
        data = "  1 a line of the licence\n"
        places: dict[str, list[int]] = {}
        for line in lines:
            for name in line.split(" ")[4 : 4 + 2 * int(line.split(" ")[3], 16) : 2]:
                places.setdefault(name.partition("(")[0], []).append(len(data))
            data += line + "\n"
        (folder / f"data.{part}").write_text(data)
        index = "  1 a line of the licence\n"
        for name in sorted(places):
            offsets = " ".join(f"{offset:08d}" for offset in places[name])
            index += f"{name} {part[0]} {len(places[name])} 0 {len(places[name])} 0 {offsets}\n"
        (folder / f"index.{part}").write_text(index)
        (folder / f"{part}.exc").write_text(EXCEPTIONS.get(part, "zzz zz\n"))


@pytest.fixture(autouse=True)
def fresh():
    caches = (wordnet.synonyms, wordnet._offsets, wordnet._exceptions, wordnet._file)
    caches = (*caches, wordnet._database)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def database(tmp_path, monkeypatch):
    write(tmp_path / "dict")
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path / "dict"))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("car", {"car", "auto"}),
        ("cars", {"cars", "car", "auto"}),
        ("knives", {"knives"}),  # the rule makes "knif" of it, and only the real exceptions "knife"
        ("went", {"went", "go", "move"}),
        ("moving", {"moving", "move", "go"}),
        ("quickest", {"quickest", "quick", "fast"}),
        ("motor_car", {"motor_car", "car", "auto"}),
        ("carsss", {"carsss", "car", "auto"}),
        ("nothing", {"nothing"}),
        ("", {""}),
    ],
)
def test_synonyms_are_those_of_all_base_forms(database, word, expected):
    assert wordnet.synonyms(word) == expected


def test_nltk_data_in_an_archive_will_do(tmp_path, monkeypatch):
    write(tmp_path / "dict")
    folder = tmp_path / "nltk_data" / "corpora"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "wordnet.zip", "w") as archive:
        for file in (tmp_path / "dict").iterdir():
            archive.write(file, f"wordnet/{file.name}")
    monkeypatch.delenv("WNSEARCHDIR", raising=False)
    monkeypatch.setattr(wordnet, "_DEBIAN", tmp_path / "nowhere")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk_data"))
    assert wordnet.synonyms("cars") == {"cars", "car", "auto"}


def test_without_wordnet_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(wordnet, "_places", lambda: iter(()))
    with pytest.raises(MissingLibraryError) as caught:
        meteor(["a"], ["b"])
    assert str(caught.value) == (
        "METEOR needs WordNet 3.0: apt install wordnet-base, or name its folder of index.* and "
        "data.* files in WNSEARCHDIR"
    )


@pytest.mark.parametrize(
    ("prediction", "reference", "matches", "chunks"),
    [
        ("the car goes", "the car goes", 3, 1),
        ("the auto goes", "the car goes", 3, 1),
        ("walked home", "walking home", 2, 1),
        ("goes car the", "the car goes", 3, 3),
        ("The Car", "the car stands there", 2, 1),
        ("red", "blue", 0, 0),
        ("", "blue", 0, 0),
        ("red", "", 0, 0),
    ],
)
def test_meteor_by_its_definition(database, prediction, reference, matches, chunks):
    predicted, expected = prediction.split(), reference.split()
    score = meteor(predicted, expected)
    if not matches:
        assert score == 0.0
        return
    precision, recall = matches / len(predicted), matches / len(expected)
    mean = 10 * precision * recall / (recall + 9 * precision)
    assert score == pytest.approx(mean * (1 - 0.5 * (chunks / matches) ** 3))


def test_of_equal_words_the_last_free_one_is_matched(database):
    # "a" goes with the second "a" of the reference, so that "a b" is one chunk.
    assert meteor(["a", "b"], ["a", "a", "b"]) == pytest.approx(
        (10 * 1.0 * (2 / 3) / (2 / 3 + 9.0)) * (1 - 0.5 * (1 / 2) ** 3)
    )
