"""random-at-budget: as many keys as another pipeline selects, none of its choice."""

import pytest
import torch

from sah_core import (
    Allowed,
    Capabilities,
    Mask,
    Pipeline,
    PipelineError,
    PipelineSyntaxError,
    selection,
)
from sah_core.attention import Session, build_mask
from sah_core.errors import ArtifactError, MissingParameterError, UnknownPluginError
from sah_core.hookspecs import hookimpl
from sah_core.parameters import from_plain
from sah_core.testing import CHECKS
from sah_plugins.maskers.oracle_top_k import OracleTopK
from sah_plugins.maskers.random_at_budget import RandomAtBudget

pytestmark = pytest.mark.unit

MODELS = (
    "sink(2) | local(3)",
    "sink(2) | oracle-top-k(4)",
    "oracle-top-p(0.5)",
    "local(3) | random-sampling(5)",
    "sink(2) | quest(16, page_size=4) | value-aware-top-k(0.1)",
    "local(100%) | twilight(0.6)",
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_conformance(check, weighted, tmp_path):
    example = RandomAtBudget.example(tmp_path)
    check(RandomAtBudget(pipeline=example.pipeline, weighted=weighted))


@pytest.mark.parametrize("check", CHECKS)
def test_conformance_of_the_control_of_a_method_with_an_index(check):
    check(RandomAtBudget(pipeline="pq-cache(8) | random-sampling(4)"))


@pytest.mark.parametrize("text", MODELS)
@pytest.mark.parametrize(
    "case",
    [{}, {"query_len": 1}, {"query_len": 20, "first": (7, 0)}, {"keep_heads": 4}],
    ids=str,
)
def test_every_row_selects_as_many_keys_as_the_named_pipeline(calls, text, case):
    inputs = calls.make(**case)
    model = calls.effective(build_mask(Pipeline.parse(text).steps, inputs), inputs) > 0
    found = calls.effective(build_mask((RandomAtBudget(pipeline=text),), inputs), inputs)
    assert torch.equal((found > 0).sum(-1), model.sum(-1))
    assert ((found == 0) | (found == 1)).all()


@pytest.mark.parametrize("kind", ["ranges", "keys", "both", "pages", "dense"])
def test_the_keys_come_on_top_of_what_is_selected(calls, kind):
    inputs = calls.make(query_len=20, first=(7, 0))
    previous = calls.previous(kind, inputs)
    before = calls.effective(previous, inputs)
    masker = RandomAtBudget(pipeline="oracle-top-k(4)", weighted=True)
    after = calls.effective(masker.add_mask(inputs, previous), inputs)
    assert torch.equal(after[before > 0], before[before > 0])
    keep = inputs.allowed.to_dense(20).expand(inputs.shape)
    total, left = keep.sum(-1), (keep & (before == 0)).sum(-1)
    drawn = (after > 0) & (before == 0)
    assert torch.equal(drawn.sum(-1), torch.minimum(left, total.clamp(max=4)))
    chance = (drawn.sum(-1) / left.clamp(min=1)).unsqueeze(-1).expand_as(drawn)
    assert torch.allclose(after[drawn], chance[drawn])


def test_the_weighted_control_is_unbiased(calls):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    masker = RandomAtBudget(pipeline="oracle-top-p(0.5)", weighted=True)
    calls.Draws((masker,), logits).check_unbiased()


def test_which_keys_is_chance(calls):
    inputs = calls.make(key_len=400, query_len=4)
    text = "oracle-top-k(40)"
    model = build_mask(Pipeline.parse(text).steps, inputs).to_dense() > 0
    for seed in (0, 1):
        found = build_mask((RandomAtBudget(pipeline=text),), inputs, seed=seed).to_dense() > 0
        shared = float((found & model).sum() / model.sum())
        assert abs(shared - 0.1) < 0.03


def test_a_sampler_in_the_named_pipeline_does_not_share_its_numbers(calls):
    inputs = calls.make(key_len=400, query_len=4)
    text = "random-sampling(40)"
    model = build_mask(Pipeline.parse(text).steps, inputs).to_dense() > 0
    found = build_mask((RandomAtBudget(pipeline=text),), inputs).to_dense() > 0
    assert abs(float((found & model).sum() / model.sum()) - 0.1) < 0.03


def test_a_full_mask_of_the_named_pipeline_is_full_here(calls):
    inputs = calls.make()
    mask = build_mask((RandomAtBudget(pipeline="local(100%)"),), inputs)
    keep = inputs.allowed.to_dense(20).expand(inputs.shape).float()
    assert torch.equal(calls.effective(mask, inputs), keep)


@pytest.mark.parametrize("text", ["sink(2) | value-aware-top-k(6)", "quest(16, page_size=4)"])
def test_states_follow_a_request_like_those_of_the_named_pipeline(calls, text):
    """Contexts in chunks, decoding, and a question that is rolled back."""
    tokens = calls.make(query_len=60, key_len=60)

    class Counts:
        def __init__(self):
            self.rows = []

        @hookimpl
        def sah_mask_built(self, inputs, mask):
            chosen, _ = mask.counts(inputs.allowed)
            self.rows.append(chosen.expand(inputs.shape[:3]).clone())

    seen = []
    for pipeline in (text, f'random-at-budget("{text}")'):
        counts = Counts()
        session = Session(Pipeline.parse(pipeline), ["full_attention"], observers=[counts])

        def attend(begin, end, session=session):
            limits = Allowed.causal(end - begin, end)
            query = tokens.query[:, :, begin:end]
            session.attend(0, query, tokens.key[:, :, :end], tokens.value[:, :, :end], limits, 0.4)

        session.phase = "prefill"
        attend(0, 30)
        attend(30, 47)
        session.phase = None
        session.start_question()
        base = session.snapshot()
        for _ in range(2):
            attend(47, 52)
            attend(52, 53)
            session.restore(base)
        seen.append(counts.rows)
    assert len(seen[0]) == len(seen[1]) == 4
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_pieces_of_rows_draw_what_all_rows_do(calls, monkeypatch):
    inputs = calls.make(query_len=20, first=(7, 0))
    previous = calls.previous("both", inputs)
    masker = RandomAtBudget(pipeline="oracle-top-p(0.5)")
    whole = masker.add_mask(inputs, previous).to_dense()
    monkeypatch.setattr(selection, "SCORE_BYTES", 3 * 32 * 2 * 4 * 20)
    assert torch.equal(masker.add_mask(inputs, previous).to_dense(), whole)


def test_a_length_on_the_device_draws_what_a_host_length_does(calls):
    inputs = calls.make(query_len=1, first=(0, 9))
    live = calls.captured(inputs)
    masker = RandomAtBudget(pipeline="sink(2) | local(2) | oracle-top-k(0.2)")
    here = calls.effective(masker.add_mask(inputs, Mask.empty(inputs.shape)), inputs)
    there = calls.effective(masker.add_mask(live, Mask.empty(live.shape)), live)
    assert torch.equal(there[..., :20], here)


def test_the_text_form_quotes_the_named_pipeline():
    text = 'sink(4) | random-at-budget("oracle-top-k(8)")'
    pipeline = Pipeline.parse(text)
    assert pipeline.steps[1] == RandomAtBudget(pipeline="oracle-top-k(8)")
    assert Pipeline.parse(pipeline.text) == pipeline
    nested = Pipeline.of(RandomAtBudget(pipeline=pipeline.text))
    assert Pipeline.parse(nested.text) == nested


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("dense", PipelineError, "'dense' selects no keys to count"),
        ("sink(4) @ dense_layers=[0]", PipelineError, "belong after the whole pipeline"),
        ("sink(4", PipelineSyntaxError, "expected"),
        ("no-such-masker", UnknownPluginError, "no masker named 'no-such-masker'"),
    ],
)
def test_a_pipeline_that_cannot_be_counted_is_refused(text, error, message):
    with pytest.raises(error, match=message):
        RandomAtBudget(pipeline=text)


def test_steps_that_need_the_outer_call_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(OracleTopK, "capabilities", Capabilities(needs=frozenset({"lse"})))
        with pytest.raises(PipelineError, match="oracle-top-k cannot be counted: it needs lse"):
            RandomAtBudget(pipeline="oracle-top-k(111)")
    with monkeypatch.context() as patch:
        patch.setattr(OracleTopK, "after_attention", lambda *_: None)
        with pytest.raises(PipelineError, match="it learns from the attention of its own choice"):
            RandomAtBudget(pipeline="oracle-top-k(112)")


def test_the_pipeline_must_be_given():
    with pytest.raises(MissingParameterError, match="pipeline is missing"):
        from_plain(RandomAtBudget, {})


def test_the_files_of_the_named_pipeline_are_its_own(tmp_path):
    file = tmp_path / "channels.json"
    labels = f"double-sparsity(4, sorted_channel_file={file})"
    masker = RandomAtBudget(
        pipeline=f"sink(2) | {labels} | hash-attention(2, hat_weight_file={file})"
    )
    assert masker.artifacts() == {"1.sorted_channel_file": file, "2.hat_weight_file": file}
    with pytest.raises(ArtifactError, match="there is no such file"):
        masker.check_artifacts()
    file.write_text("{}")
    with pytest.raises(ArtifactError, match="nothing in it is named like"):
        masker.check_artifacts()
