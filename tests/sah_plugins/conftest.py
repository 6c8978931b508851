"""Adapters around tiny models, for the tests of what an adapter answers."""

import pytest


@pytest.fixture(scope="module")
def make(models):
    """Makes adapters; a model is built once per family."""
    from sah_core.models import ModelSource
    from sah_plugins.adapters.hf import HuggingFaceAdapter
    from sah_plugins.adapters.hf.loading import Loaded

    built = {}

    def adapter(pipeline="dense", family="llama", **tokenizer):
        if family not in built:
            built[family] = models.build(family)
        source = ModelSource(kind="folder", location="tiny", label="tiny")
        loaded = Loaded(
            model=built[family],
            tokenizer=models.tokenizer(**tokenizer),
            source=source,
            weights_hash="0",
        )
        return HuggingFaceAdapter.of(loaded, pipeline)

    return adapter
