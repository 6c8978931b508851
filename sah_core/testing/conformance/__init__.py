"""Conformance checks: what every masker must do, whatever its method.

Each check is a function of a masker that raises `AssertionError`, saying what is wrong and what to
change, or `CheckSkipped`, saying why it cannot apply, which pytest reports as a skipped test. A
plugin's test suite runs them all:

    @pytest.mark.parametrize("check", CHECKS)
    def test_conformance(check, tmp_path):
        check(MyMasker.example(tmp_path))

A masker is checked with the parameters that it is given; small budgets say more than large ones.
Small random tensors go through the same `Session` that a model goes through, without a backend.
"""

from __future__ import annotations

from collections.abc import Iterable

from sah_core.masker import Masker

from .calls import MODEL, Model
from .definition import (
    check_docstring,
    check_frozen,
    check_import_weight,
    check_parameters_round_trip,
    check_pickling,
)
from .device import (
    check_captured_decode,
    check_density,
    check_device,
    check_memory,
    check_no_host_sync,
)
from .previous import (
    check_no_readmission,
    check_nothing_is_edited,
    check_previous_empty_and_full,
    check_previous_respected,
)
from .requests import (
    check_chunked_append,
    check_determinism,
    check_layers_are_independent,
    check_probabilities,
    check_reorder,
    check_same_masker_twice,
    check_snapshot_and_restore,
)
from .selection import (
    check_allowed_only,
    check_causality,
    check_dtypes,
    check_kv_groups,
    check_left_padding,
    check_position_only,
    check_shape,
    check_short_keys,
)
from .verdict import Check, CheckResult, CheckSkipped, run_each

__all__ = ["CHECKS", "MODEL", "Check", "CheckResult", "CheckSkipped", "Model", "run_checks"]


def run_checks(masker: Masker, checks: Iterable[Check] | None = None) -> list[CheckResult]:
    """Run the checks over a masker, all of them by default.

    Whatever a masker raises fails the check during which it did.
    """
    return run_each(masker, CHECKS if checks is None else checks)


CHECKS: tuple[Check, ...] = (
    check_docstring,
    check_frozen,
    check_parameters_round_trip,
    check_pickling,
    check_import_weight,
    check_shape,
    check_short_keys,
    check_dtypes,
    check_allowed_only,
    check_no_readmission,
    check_causality,
    check_previous_respected,
    check_previous_empty_and_full,
    check_kv_groups,
    check_left_padding,
    check_nothing_is_edited,
    check_determinism,
    check_probabilities,
    check_layers_are_independent,
    check_chunked_append,
    check_snapshot_and_restore,
    check_reorder,
    check_same_masker_twice,
    check_position_only,
    check_density,
    check_device,
    check_no_host_sync,
    check_captured_decode,
    check_memory,
)
