"""The bounds of adaptive sampling on the keys of a real text, once the heavy ones are selected."""

import importlib.util
from pathlib import Path

import pytest

from sah_core import registry
from sah_core.errors import SahError
from sah_plugins.maskers.adaptive_sampling import AdaptiveSampling
from sah_plugins.maskers.oracle_top_k import OracleTopK

pytestmark = pytest.mark.integration

STUDY = Path(__file__).parents[2] / "studies" / "sampling_coverage.py"


@pytest.fixture(scope="module")
def study():
    """The script that publishes the figures."""
    spec = importlib.util.spec_from_file_location("sampling_coverage", STUDY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cases(study):
    """The last row of a text in some layers of SmolLM2: the model reads it once."""
    try:
        registry.models["smollm2-135m"]()
    except SahError as error:
        pytest.skip(str(error))
    return list(study.model_cases(tokens=1024))


@pytest.mark.parametrize(
    ("bound", "epsilon", "most"),
    [("denominator", 0.1, 0.2), ("numerator", 0.1, 0.7), ("attention", 0.2, 0.7)],
)
def test_the_two_sided_bounds_are_kept_on_real_keys_behind_the_heavy_ones(
    study, cases, bound, epsilon, most
):
    delta, draws = 0.1, 300
    masker = AdaptiveSampling(base_rate_sampling=0.03, epsilon=epsilon, delta=delta, bound=bound)
    for case in cases:
        found = study.coverage(case, (OracleTopK(heavy_size=0.1), masker), epsilon, draws)
        kept = getattr(found, bound)
        error = (delta * (1 - delta) / draws) ** 0.5
        assert float(kept.mean()) >= 1 - delta - 3 * error / kept.numel() ** 0.5
        assert float(kept.min()) >= 1 - delta - 3 * error
        # a budget of everything keeps any bound
        assert found.density < most
