"""One suite for all of these tests: the packaged all-MiniLM, three random encoders with heads, a decoder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from encoder_folders import write_encoder
from running_suite import Suite, running_suite
from task_models import ENTITIES, MOODS
from tiny_model import write_tiny_model

from treadle.api.inference.v1 import inference_pb2_grpc
from treadle.rpc import open_channel

SETTINGS = {"TREADLE_ENGINE_KV_CACHE_BYTES": str(64 << 20), "TREADLE_ENGINE_NUM_THREADS": "1"}


@pytest.fixture(scope="package")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The random models by their aliases."""
    home = tmp_path_factory.mktemp("models")
    made = {name: home / name for name in ("moods", "topics", "entities", "ranker", "tiny")}
    write_encoder(made["moods"], "bert", "ForSequenceClassification", MOODS)
    topics = {"problem_type": "multi_label_classification"}
    write_encoder(made["topics"], "distilbert", "ForSequenceClassification", MOODS, **topics)
    write_encoder(made["entities"], "bert", "ForTokenClassification", ENTITIES, seed=3)
    write_encoder(made["ranker"], "roberta", "ForSequenceClassification", ["relevance"])
    write_tiny_model(made["tiny"])
    return made


@pytest.fixture(scope="package")
def suite(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    home = tmp_path_factory.mktemp("home")
    models = [f"--model={alias}={folder}" for alias, folder in folders.items()]
    with running_suite(home, "--port", "0", "--model=minilm", *models, environment=SETTINGS) as running:
        yield running


@pytest.fixture
async def stub(suite: Suite) -> AsyncIterator[inference_pb2_grpc.InferenceServiceAsyncStub]:
    async with open_channel(suite.addresses["gateway"]) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)
