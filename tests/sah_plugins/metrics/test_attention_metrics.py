"""Output error, mass and recall against double loops over rows and keys."""

import math

import attrs
import pytest
import torch

from sah_core import (
    Allowed,
    AttentionMetric,
    Inputs,
    KeyRange,
    Mask,
    Pipeline,
    measure,
    registry,
    weights,
)
from sah_core.attention import Session
from sah_plugins.metrics.mass import Mass
from sah_plugins.metrics.output_error import OutputError
from sah_plugins.metrics.recall import Recall

pytestmark = pytest.mark.unit

HEADS, KV_HEADS, DIM = 4, 2, 8


def call(query_len=3, key_len=12, batch=2, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    first = options.pop("first", None)
    allowed = options.pop("allowed", None)
    if allowed is None:
        first = None if first is None else torch.tensor(first, dtype=torch.int32)
        allowed = Allowed.causal(query_len, key_len, first=first)
    return Inputs(
        query=draw(batch, HEADS, query_len, DIM),
        key=draw(batch, KV_HEADS, key_len, DIM),
        value=draw(batch, KV_HEADS, key_len, 5),
        allowed=allowed,
        scaling=0.7,
        key_len=key_len,
        **options,
    )


def choose(inputs, share=0.5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(inputs.shape, generator=generator)
    return Mask.from_dense(torch.where(dense < share, dense + 0.2, 0.0))


def loop(inputs, mask):
    """Per row and head that may attend anything: logits, weights, sink weight, selected keys."""
    keep = inputs.allowed.to_dense(inputs.capacity).expand(inputs.shape)
    chosen = mask.to_dense().expand(inputs.shape) > 0
    group = HEADS // KV_HEADS
    for b in range(inputs.batch):
        for q in range(inputs.query_len):
            if not keep[b, :, q].any():
                continue
            heads = []
            for h in range(HEADS):
                logits = {}
                for k in range(inputs.capacity):
                    if keep[b, h, q, k]:
                        dot = inputs.query[b, h, q].double() @ inputs.key[b, h // group, k].double()
                        logit = float(dot) * inputs.scaling
                        if inputs.softcap is not None:
                            logit = inputs.softcap * math.tanh(logit / inputs.softcap)
                        logits[k] = logit
                selected = {k for k in logits if chosen[b, h, q, k]}
                value = inputs.value[b, h // group].double()
                heads.append((h, logits, selected, value))
            yield b, q, heads


def expected_error(inputs, mask, output):
    rows = []
    for b, q, heads in loop(inputs, mask):
        dense = torch.zeros(HEADS, 5, dtype=torch.float64)
        for h, logits, _, value in heads:
            total = sum(math.exp(logit) for logit in logits.values())
            if inputs.sinks is not None:
                total += math.exp(float(inputs.sinks[h]))
            for k, logit in logits.items():
                dense[h] += math.exp(logit) / total * value[k]
        rows.append([float((output[b, q].double() - dense).norm() / dense.norm())])
    return rows


def expected_mass(inputs, mask, output):
    return [
        [
            sum(math.exp(logits[k]) for k in selected) / sum(map(math.exp, logits.values()))
            for _, logits, selected, _ in heads
        ]
        for _, _, heads in loop(inputs, mask)
    ]


def expected_recall(inputs, mask, output, k=None):
    rows = []
    for _, _, heads in loop(inputs, mask):
        row = []
        for _, logits, selected, _ in heads:
            count = len(selected) if k is None else k(len(logits))
            count = max(1, min(count, len(logits)))
            top = sorted(logits, key=logits.get, reverse=True)[:count]
            row.append(len(selected & set(top)) / count)
        rows.append(row)
    return rows


METRICS = {
    "output-error": (OutputError, expected_error),
    "mass": (Mass, expected_mass),
    "recall": (Recall, expected_recall),
}
KEEP = torch.rand(2, 1, 3, 12, generator=torch.Generator().manual_seed(2)) < 0.5
KEEP_BY_HEAD = torch.rand(2, HEADS, 3, 12, generator=torch.Generator().manual_seed(2)) < 0.5
CALLS = {
    "question": {},
    "one token": {"query_len": 1},
    "softcap": {"softcap": 0.6},
    "learned sinks": {"sinks": torch.tensor([1.0, -2.0, 0.5, 3.0])},
    "left padding": {"query_len": 12, "first": (9, 0)},
    "model window": {"allowed": Allowed.causal(3, 12, window=4)},
    "foreign mask": {"allowed": Allowed.from_dense(KEEP)},
    "foreign mask by head": {"allowed": Allowed.from_dense(KEEP_BY_HEAD)},
    "bfloat16": {"dtype": torch.bfloat16},
}


def show(metric, inputs, mask, output=None):
    if output is None:
        output, _ = registry.backends["eager"]().attend(inputs, mask)
    metric.sah_attention_computed(inputs, mask, output)
    return output


@pytest.mark.parametrize("case", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", METRICS)
def test_value_of_a_call_is_what_the_definition_says(name, case, monkeypatch):
    monkeypatch.setattr(measure, "PIECE", 100)  # rows in several pieces
    monkeypatch.setattr(weights, "CHUNK", 60)  # keys too, where they are converted
    make, expected = METRICS[name]
    metric, inputs = make(), call(**case)
    mask = choose(inputs)
    output = show(metric, inputs, mask)
    rows = expected(inputs, mask, output)
    means = [sum(row) / len(row) for row in rows]
    [record] = metric.records()
    assert record["rows"] == len(rows)
    assert record["value"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert record["min"] == pytest.approx(min(map(min, rows)), rel=1e-4)
    assert record["max"] == pytest.approx(max(map(max, rows)), rel=1e-4)


@pytest.mark.parametrize(
    ("k", "count"), [(1, lambda n: 1), (5, lambda n: 5), (0.3, lambda n: int(0.3 * n))]
)
def test_recall_of_a_fixed_number_of_top_keys(k, count):
    inputs = call(query_len=12)
    mask = choose(inputs)
    metric = Recall(k=k)
    show(metric, inputs, mask)
    rows = expected_recall(inputs, mask, None, count)
    mean = sum(map(sum, rows)) / sum(map(len, rows))
    assert metric.result()["mean"] == pytest.approx(mean, rel=1e-4)


def test_recall_of_the_true_top_keys_is_1_and_ties_are_no_misses():
    inputs = call(query_len=1, batch=1)
    even = attrs.evolve(inputs, key=torch.ones_like(inputs.key))
    zero = torch.zeros(1, 1, 1, dtype=torch.int32)
    late = Mask.from_ranges(even.shape, [KeyRange(zero, zero, 4, 8, 12)])
    metric = Recall()
    show(metric, even, late)
    assert metric.result()["mean"] == 1.0
    metric = Recall(k=8)
    show(metric, even, late)
    assert metric.result()["mean"] == 0.5
    metric = Recall(k=2)
    show(metric, even, late)
    assert metric.result()["max"] == 1.0


def test_selecting_everything_has_no_error_and_loses_nothing():
    inputs = call(sinks=torch.tensor([1.0, -2.0, 0.5, 3.0]))
    whole = Mask.from_dense(torch.ones(inputs.shape))
    for metric, value in ((OutputError(), 0.0), (Mass(), 1.0), (Recall(), 1.0)):
        show(metric, inputs, whole)
        assert metric.result()["mean"] == pytest.approx(value, abs=1e-6)


def test_selecting_nothing_loses_everything():
    inputs = call()
    for metric, value in ((OutputError(), 1.0), (Mass(), 0.0), (Recall(), 0.0)):
        show(metric, inputs, Mask.empty(inputs.shape))
        assert metric.result()["mean"] == value


def test_a_full_mask_counts_without_being_computed(monkeypatch):
    inputs = call(query_len=12, first=(9, 0))
    for metric, value in ((OutputError(), 0.0), (Mass(), 1.0), (Recall(), 1.0)):
        monkeypatch.setattr(type(metric), "measure", lambda *arguments: 1 / 0)
        show(metric, inputs, Mask.full(inputs.shape))
        result = metric.result()
        assert (result["mean"], result["rows"]) == (value, 3 + 12)


def test_error_is_absolute_where_the_dense_output_is_0():
    inputs = call(query_len=1, batch=1)
    inputs = attrs.evolve(inputs, value=torch.zeros_like(inputs.value))
    metric = OutputError()
    output = torch.full((1, 1, HEADS, 5), 0.1)
    show(metric, inputs, choose(inputs), output)
    assert metric.result()["mean"] == pytest.approx(0.1 * math.sqrt(HEADS * 5))


@attrs.frozen(kw_only=True, eq=False)
class Position(AttentionMetric):
    """The index of the key of each query row."""

    name = "position"
    value_of_full = -1.0

    def measure(self, inputs, mask, output):
        assert output.shape[1] == inputs.query_len == mask.shape[2]
        return inputs.query_position.float().expand(inputs.batch, 1, -1)


def generation(metric, passes, layers=2, batch=1):
    """Show a metric a question of several rows and decoding steps."""
    key_len = 0
    for rows in passes:
        key_len += rows
        inputs = call(query_len=rows, key_len=key_len, batch=batch)
        for layer in range(layers):
            here = attrs.evolve(inputs, layer=layer, phase="question" if rows > 1 else "decode")
            show(metric, here, choose(here))


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [(0, 5, 2.0), (1, 1, 5.0), (2, 1, 6.0), (3, 2, 7.5), (4, 1, 9.0)]),
        (3, [(0, 2, 1.5), (2, 1, 6.0), (4, 1, 9.0)]),
        (7, [(0, 1, 0.0), (3, 1, 7.0)]),
        (50, [(0, 1, 0.0)]),
    ],
)
def test_each_nth_query_row_of_a_sample_is_measured(every, expected):
    metric = Position(every=every)
    generation(metric, [5, 1, 1, 2, 1])
    found = [(r["step"], r["rows"], r["value"]) for r in metric.records() if r["layer"] == 1]
    assert found == expected
    assert [r["layer"] for r in metric.records()] == [0, 1] * len(expected)


def test_rows_of_padding_count_nowhere():
    metric, inputs = Position(), call(query_len=12, first=(9, 0))
    show(metric, inputs, choose(inputs))
    [record] = metric.records()
    assert record["rows"] == 3 + 12
    assert record["value"] == pytest.approx((9 + 10 + 11 + sum(range(12))) / 15, rel=1e-5)


def test_passes_of_a_model_with_one_layer_are_told_apart():
    metric = Position()
    generation(metric, [3, 1, 1], layers=1)
    assert [(r["step"], r["rows"]) for r in metric.records()] == [(0, 3), (1, 1), (2, 1)]


def test_records_stop_at_the_cap_and_the_result_goes_on():
    metric, short = Position(), Position(cap=3)
    generation(metric, [5, 1, 1])
    generation(short, [5, 1, 1])
    assert short.records() == metric.records()[:3]
    whole, capped = metric.result(), short.result()
    assert (whole.pop("records"), whole.pop("dropped")) == (6, 0)
    assert (capped.pop("records"), capped.pop("dropped")) == (3, 3)
    assert whole == capped


def test_many_calls_are_fetched_together_and_stay_in_order(monkeypatch):
    whole = Position(cap=4)
    generation(whole, [5, 1, 1])
    monkeypatch.setattr(measure, "FETCH", 4)
    pieces = Position(cap=4)
    generation(pieces, [5, 1, 1])
    assert pieces.records() == whole.records()
    assert pieces.result() == whole.result()


def test_result_says_mean_extremes_and_means_per_layer():
    metric = Position()
    generation(metric, [3, 1], layers=3)
    assert metric.result() == {
        "mean": 1.5,
        "min": 0.0,
        "max": 3.0,
        "layers": {"0": 1.5, "1": 1.5, "2": 1.5},
        "rows": 12,
        "records": 6,
        "dropped": 0,
    }


def test_reset_begins_a_sample():
    metric = Position(every=2)
    generation(metric, [3, 1])
    first = metric.records(), metric.result()
    metric.reset()
    assert metric.result()["rows"] == 0
    assert metric.result()["mean"] is None
    assert metric.records() == []
    generation(metric, [3, 1])
    assert (metric.records(), metric.result()) == first


def test_results_combine_by_rows():
    metric = Position()
    results = []
    for passes in ([3, 1], [1], [2]):
        metric.reset()
        generation(metric, passes)
        results.append(metric.result())
    metric.reset()
    combined = Position.combine([*results, metric.result()])
    assert combined["mean"] == pytest.approx((0 + 1 + 2 + 3 + 0 + 0 + 1) / 7)
    assert (combined["min"], combined["max"], combined["rows"]) == (0.0, 3.0, 14)
    assert set(combined["layers"]) == {"0", "1"}
    assert (combined["records"], combined["dropped"]) == (8, 0)
    assert Position.combine([])["mean"] is None


def test_in_a_session_sparse_phases_are_measured_and_dense_layers_count_as_dense():
    pipeline = Pipeline.parse("sink(2) | local(3) @ dense_layers=[1]")
    metric = OutputError()
    session = Session(pipeline, ["full_attention"] * 3, observers=[metric])
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, 20, DIM, generator=generator)
    key = torch.randn(1, KV_HEADS, 20, DIM, generator=generator)
    for begin, end, phase in ((0, 12, "prefill"), (12, 17, "question"), (17, 18, "decode")):
        session.phase = phase
        limits = Allowed.causal(end - begin, end)
        for layer in range(3):
            session.attend(
                layer, query[:, :, begin:end], key[:, :, :end], key[:, :, :end], limits, 0.3
            )
    layers = metric.result()["layers"]
    assert layers["1"] == 0.0
    assert 0.01 < layers["0"] == layers["2"]
    assert [(r["phase"], r["step"], r["rows"]) for r in metric.records()[::3]] == [
        ("question", 0, 5),
        ("decode", 1, 1),
    ]


@pytest.mark.parametrize("name", METRICS)
def test_they_are_found_by_name_and_register_side_by_side(name):
    cls = registry.metrics[name]
    assert cls is METRICS[name][0]
    twins = [cls(every=2), cls(every=2)]
    assert twins[0] != twins[1]
    session = Session(Pipeline.parse("sink(2)"), ["full_attention"], observers=twins)
    assert len(session.hook.sah_attention_computed.get_hookimpls()) == 2
