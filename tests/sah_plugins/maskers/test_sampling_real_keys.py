"""The bound of adaptive sampling on the keys of a real text, once the heavy ones are selected."""

import importlib.util
from pathlib import Path

import pytest

from sah_core import registry
from sah_core.errors import SahError
from sah_plugins.maskers.adaptive_sampling import AdaptiveSampling
from sah_plugins.maskers.oracle_top_k import OracleTopK

pytestmark = pytest.mark.integration

STUDY = Path(__file__).parents[2] / "studies" / "sampling_coverage.py"


def test_the_two_sided_bound_is_kept_on_real_keys_behind_the_heavy_ones():
    try:
        registry.models["smollm2-135m"]()
    except SahError as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("sampling_coverage", STUDY)
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    epsilon, delta, draws = 0.1, 0.1, 400
    masker = AdaptiveSampling(base_rate_sampling=0.03, epsilon=epsilon, delta=delta)
    for case in study.model_cases(tokens=1024):
        found = study.coverage(case, (OracleTopK(heavy_size=0.1), masker), epsilon, draws)
        error = (delta * (1 - delta) / (draws * found.denominator.numel())) ** 0.5
        assert float(found.denominator.mean()) >= 1 - delta - 3 * error
        assert found.density < 0.5
