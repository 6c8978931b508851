"""`sah-bench ask`: answers side by side, where they part, and what is wrong with a command line."""

import io
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from rich.console import Console

from sah_bench.asking import Answer, Difference, first_difference
from sah_bench.cli import main
from sah_bench.commands.ask import print_answers
from sah_core.requests import AnswerDetail

pytestmark = pytest.mark.unit

SPARSE = "sink(4) | local(8)"
SPARSE_PREFILL = "sink(5) @ prefill=sparse"


def ask(*arguments, text=("--text", "Some text."), question="Who?", **options):
    words = ["ask", "--adapter", "fake", "--model", "m", *text]
    words += ["--question", question] if question else []
    return CliRunner().invoke(main, [*words, *arguments], **options)


def answers(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["questions"]


def calls(fakes, *kinds):
    return [call for call in fakes.FakeAdapter.calls if call[0] in kinds]


def test_dense_answers_first_and_every_pipeline_beside_it(fakes):
    options = ["--question", "When?", "--pipeline", SPARSE, "--pipeline", "dense", "--json"]
    who, when = answers(ask(*options))
    assert (who["question"], when["question"]) == ("Who?", "When?")
    assert [a["pipeline"] for a in who["answers"]] == ["dense", SPARSE]
    assert [a["text"] for a in when["answers"]] == ["?nehW", "no"]
    dense, sparse = who["answers"]
    assert (dense["density"], dense["output_error"], dense["difference"]) == (1.0, 0.0, None)
    assert (dense["saving"], sparse["saving"]) == ("none", "realised")
    assert (dense["backends"], sparse["backends"]) == ([], ["gather"])
    assert sparse["difference"] == {"token": 1, "before": "", "dense": "?ohW", "here": "no"}


def test_times_are_of_answers_without_observers(fakes):
    [row] = answers(ask("--pipeline", SPARSE, "--json"))
    for answer in row["answers"]:
        assert answer["seconds_to_first_token"] == 2.0  # 1.5 for the prefill, 0.5 after it
        assert answer["tokens_per_second"] == pytest.approx(1 / 1.5)
    kinds = [call[0] for call in fakes.FakeAdapter.calls if call[1] == "dense"]
    assert kinds == ["answer", "answer"]


def test_one_prefill_serves_all_pipelines_but_those_that_prefill_sparsely(fakes):
    answers(ask("--pipeline", SPARSE, "--pipeline", SPARSE_PREFILL, "--json"))
    own = "sink(sink_size=5) @ prefill=sparse"
    found = [(c[0], c[2]) for c in calls(fakes, "prefill", "watched prefill")[1:]]
    assert found == [("prefill", None), ("prefill", own), ("watched prefill", own)]


def test_options_reach_the_adapter(fakes):
    options = ["--max-new-tokens", "7", "--generation", "temperature=0.5", "--generation", "a=[1]"]
    options += ["--max-context-length", "99", "--json"]
    answers(ask(*options))
    generation = calls(fakes, "answer")[-1][3]
    assert generation == {"temperature": 0.5, "a": [1], "do_sample": True, "max_new_tokens": 7}
    assert calls(fakes, "prefill")[1][3] == {"max_context_length": 99}


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        (["top_p=0.9"], True),
        (["temperature=0.5", "do_sample=false"], False),
        (["temperature=0"], None),
        (["temperature=null"], None),
        (["penalty_alpha=0.6", "top_k=4"], None),
        (["penalty_alpha=0", "top_k=4"], True),
    ],
)
def test_what_is_said_of_sampling_asks_for_it(fakes, options, samples):
    answers(ask(*(word for option in options for word in ("--generation", option)), "--json"))
    assert calls(fakes, "answer")[-1][3].get("do_sample") is samples


@pytest.mark.parametrize("name", ["notes.txt", "-"])
def test_the_text_comes_from_a_file_or_from_standard_input(fakes, tmp_path, name):
    path = name
    if name != "-":
        path = tmp_path / name
        path.write_text("From here. é", encoding="utf-8")
    answers(ask("--json", text=("--context", str(path)), input="From here. é"))
    assert calls(fakes, "prefill")[1][1] == "From here. é"


def test_the_table_shows_every_answer_and_what_was_measured(fakes):
    result = ask("--pipeline", SPARSE, "--pipeline", "sink(15)")
    assert result.exit_code == 0
    text = result.stdout
    for word in ("question: Who?", "dense", SPARSE, "?ohW", "2.00 s", "realised", "at token 1"):
        assert word in text
    assert "2, eos (*)" in text
    assert "(*) the observed pass gave other tokens" in text
    assert result.stderr.splitlines()[:2] == ["loading m ...", "reading the context ..."]


def test_a_pipeline_that_fails_leaves_the_others(fakes):
    result = ask("--pipeline", "sink(13)", "--pipeline", SPARSE, "--no-progress")
    assert result.exit_code == 1
    assert "error: RuntimeError: boom" in " ".join(result.stdout.split())
    assert "realised" in result.stdout
    assert result.stderr == "error: sink(13): RuntimeError: boom\n"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {"question": None}, "no question: give at least one --question"),
        ([], {"question": " "}, "question 0 is empty"),
        ([], {"text": ()}, "no text: give --context FILE, --context - or --text TEXT"),
        (["--context", "x"], {}, "two texts: give --context FILE, --context - or --text TEXT"),
        ([], {"text": ("--context", "absent.txt")}, "'absent.txt' cannot be read: No such file"),
        ([], {"text": ("--context", ".")}, "'.' cannot be read: Is a directory"),
        ([], {"text": ("--context", "bytes")}, "'bytes' cannot be read: it is no UTF-8 text"),
        ([], {"text": ("--text", " \n")}, "the text is empty (--text)"),
        ([], {"text": ("--context", "-"), "input": ""}, "the text is empty (-)"),
        (["--pipeline", "snk"], {}, "no masker named 'snk'. did you mean 'sink'?"),
        (["--pipeline", "sink(4"], {}, "found the end of the text at column 7"),
        (
            ["--pipeline", "hash-attention(64, hat_weight_file='a.pt')"],
            {},
            "'a.pt': there is no such file",
        ),
        (["--backend", "gathr"], {}, "no backend named 'gathr'. did you mean 'gather'?"),
        (["--adapter", "fke"], {}, "no adapter named 'fke'"),
        (["--generation", "hot"], {}, "--generation 'hot': expected name=value"),
        (["--generation", "max_new_tokens=3"], {}, "give --max-new-tokens"),
        (["--generation", "max_length=30"], {}, "max_length: give --max-new-tokens"),
        (
            ["--adapter", "hf", "--generation", "temp=1"],
            {},
            "generation option 'temp' is not known; did you mean 'temperature'?",
        ),
        (
            ["--adapter", "hf", "--generation", "custom_generate=nobody/nowhere"],
            {},
            "runs code from 'nobody/nowhere'; it needs trust_remote_code=True beside it",
        ),
        (
            ["--adapter", "hf", "--generation", "custom_generate=nobody/nowhere"]
            + ["--generation", "trust_remote_code=true"],
            {},
            "code from 'nobody/nowhere', which is no folder, and the local hub cache lacks it",
        ),
        (["--max-new-tokens", "0"], {}, "0 is not in the range x>=1"),
        (["--truncation", "tail"], {}, "'tail' is not one of 'none', 'middle', 'head'"),
        (["--model", "missing"], {}, "model 'missing' not found"),
        (["--text", "too long"], {"text": ()}, "the prompt is too long: 9000 tokens"),
    ],
)
def test_bad_input_is_one_line(fakes, tmp_path, monkeypatch, arguments, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    result = ask(*arguments, "--no-progress", **options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    if "missing" not in arguments and "too long" not in arguments:
        assert not fakes.FakeAdapter.calls  # nothing was loaded for it


def detail(text, *tokens, healed=None):
    return AnswerDetail(
        text=text,
        token_ids=tokens,
        prompt_tokens=1,
        context_tokens=1,
        new_tokens=len(tokens),
        seconds_prefill=1.0,
        seconds_decode=1.0,
        finished="eos",
        healed_token=healed,
    )


def test_two_answers_part_at_once_where_they_heal_the_prompt_otherwise():
    dense, here = detail("//x y", 1, 2, healed=7), detail(" y", 1, 2)
    assert first_difference(dense, here) == Difference(token=0, before="", dense="//x y", here=" y")
    assert first_difference(dense, dense) is None


@pytest.mark.parametrize(
    ("dense", "here", "expected"),
    [
        (("a b", 1, 2), ("a b", 1, 2), None),
        (("a b", 1, 2), ("a c", 1, 3), (1, "a ", "b", "c")),
        (("a b", 1, 2), ("a", 1), (1, "a", " b", "")),
        (("a", 1, 2), ("a", 1, 3), (1, "a", "", "")),
        (
            ("x" + " one two three" * 5 + " end", 1, 2),
            ("x" + " one two three" * 5 + " four" * 20, 1, 3),
            (
                1,
                "…two three one two three one two three ",
                "end",
                "four four four four four four four four…",
            ),
        ),
    ],
)
def test_where_two_answers_part(dense, here, expected):
    found = first_difference(detail(*dense), detail(*here))
    if expected is None:
        assert found is None
    else:
        assert (found.token, found.before, found.dense, found.here) == expected


def test_further_sequences_stand_below_the_first():
    row = [Answer(pipeline="dense", question=0, text="first", others=("second", ""))]
    console = Console(file=io.StringIO(), width=80)
    print_answers(["why?"], [row], console)
    words = console.file.getvalue().split()
    assert words.index("first") < words.index("second") < words.index("(nothing)")


def shown(width, pipelines=2):
    row = [
        Answer(pipeline=f"pipeline {i}", question=0, text=f"text {i} " + "word " * 30)
        for i in range(pipelines)
    ]
    console = Console(file=io.StringIO(), width=width)
    print_answers(["why?"], [row], console)
    return console.file.getvalue()


def test_answers_stand_side_by_side_where_they_fit_and_below_one_another_elsewhere():
    wide, narrow = shown(120), shown(60)
    assert any("text 0" in line and "text 1" in line for line in wide.splitlines())
    assert not any("text 0" in line and "text 1" in line for line in narrow.splitlines())
    for text in (wide, narrow):
        assert text.count("word") >= 60
    assert max(map(len, narrow.splitlines())) <= 60


def test_below_one_another_the_numbers_of_all_pipelines_stand_in_one_table():
    row = [
        Answer(pipeline="dense", question=0, text="blue", density=1.0, new_tokens=1),
        Answer(
            pipeline="sink(4) | local(16)",
            question=0,
            text="green",
            density=0.25,
            output_error=0.5,
            seconds_to_first_token=1.25,
            tokens_per_second=11.0,
            new_tokens=64,
            finished="length",
            observed_alike=False,
            saving="realised",
            difference=Difference(token=0, before="", dense="blue", here="green"),
        ),
        Answer(pipeline="sink(2)", question=0, error="boom"),
    ]
    console = Console(file=io.StringIO(), width=80)
    print_answers(["why?"], [row], console)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    head = next(i for i, line in enumerate(lines) if "first token" in line)
    words = "density, output error, first token, tokens per s, new tokens, saving"
    assert " ".join(lines[head].split()) == words.replace(",", "")
    assert lines[head + 5].split() == (
        ["0.2500", "0.5000", "1.25", "s", "11.0", "64,", "length", "(*)", "realised"]
    )
    assert lines[head + 4] == "sink(4) | local(16)"
    assert "  differs at token 0: dense “blue”, here “green”" in lines[:head]
    assert "  error: boom" in lines[:head]
    assert lines.count("sink(2)") == 1


@pytest.mark.integration
@pytest.mark.usefixtures("real_model")
def test_on_the_real_model_a_window_loses_what_dense_attention_finds(tmp_path):
    filler = "The grass is green. The sky is blue. The sun is yellow. " * 6
    path = tmp_path / "notes.txt"
    path.write_text(f"{filler}The secret word is marmalade. {filler}", encoding="utf-8")
    arguments = ["ask", "--model", "smollm2-135m", "--context", str(path), "--json"]
    arguments += ["--question", "What is the secret word?", "--answer-prefix", "The secret word is"]
    arguments += ["--pipeline", "sink(4) | local(16)", "--max-new-tokens", "6", "--no-progress"]
    done = subprocess.run(
        [sys.executable, "-c", "from sah_bench.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout)["questions"]
    dense, window = row["answers"]
    assert "marmalade" in dense["text"]
    assert "marmalade" not in window["text"]
    assert 0.05 < window["density"] < 0.3
    assert window["output_error"] > 0.05
    assert window["difference"]["here"] != window["difference"]["dense"]
    assert window["seconds_to_first_token"] > window["seconds_prefill"] > 0
