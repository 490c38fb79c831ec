"""The encoder's engine with real kernels: batched equals alone to the bit, no padding, as transformers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import VOCABULARY, make, save_canonical
from transformers import PreTrainedModel

from treadle.errors import FailedPrecondition
from treadle_worker.config import EngineConfig
from treadle_worker.encoder_engine import EncoderEngine
from treadle_worker.encoder_loader import load_encoder_engine
from treadle_worker.encoder_runner import EncoderRunner
from treadle_worker.engine_process import load_engine
from treadle_worker.engine_protocol import AddTask, EngineStart, TaskInput

LONGEST = 120
PROFILES = [
    ("float32", "", "native"),
    ("float32", "", "torch"),
    ("float32", "int8", "native"),
    ("bfloat16", "", "native"),
]


def start(folder: Path, **settings: object) -> EngineStart:
    config = EngineConfig(device="cpu", **settings)
    return EngineStart(model_folder=str(folder), **config.model_dump())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[PreTrainedModel, Path]]:
    """A model with each head, and one with a single output."""
    made = {}
    for head, labels in (("", 2), ("sequence", 3), ("sequence", 1), ("token", 5)):
        model = make("bert", head, seed=len(made), num_labels=labels)
        folder = tmp_path_factory.mktemp("encoder")
        made[f"{head}{labels}"] = model, save_canonical(model, folder)
    return made


def inputs(rng: random.Random, count: int, *, pairs: bool = True) -> list[TaskInput]:
    made = []
    for _ in range(count):
        length = rng.choice([1, 2, rng.randint(3, 30), rng.randint(3, LONGEST)])
        second = rng.randint(0, length) if pairs else length
        type_ids = [0] * second + [1] * (length - second)
        token_ids = [rng.randrange(VOCABULARY) for _ in range(length)]
        made.append(
            TaskInput(token_ids=token_ids, type_ids=type_ids if rng.random() < 0.7 else [], first=length // 3)
        )
    return made


def run(engine: EncoderEngine, tasks: Sequence[AddTask], *, together: bool) -> tuple[dict[str, bytes], int]:
    """The results, and how many steps computed more than one text."""
    data: dict[str, bytes] = {}
    shared = 0
    for each in tasks:
        engine.add_task(each)
        while not together and engine.has_work:
            shared += _step(engine, data)
    while engine.has_work:
        shared += _step(engine, data)
    return data, shared


def _step(engine: EncoderEngine, data: dict[str, bytes]) -> bool:
    before = engine.stats().num_task_inputs
    for output in engine.step().task_outputs:
        assert not output.error, output.error
        data[output.request_id] = output.data
    return engine.stats().num_task_inputs - before > 1


def asked(head: str, rng: random.Random) -> list[AddTask]:
    """Tasks of every kind that the head can do, each of several texts."""
    kinds: dict[str, list[dict[str, object]]] = {
        "2": [
            {"task": "embed", "pooling": pooling, "dimensions": dimensions, "normalize": normalize}
            for pooling in ("mean", "cls", "last")
            for dimensions in (0, 17)
            for normalize in (True, False)
        ]
        + [{"task": "rank", "pooling": "mean", "normalize": True}],
        "sequence3": [{"task": "classify", "activation": each} for each in ("", "softmax", "sigmoid")],
        "sequence1": [{"task": "rank", "activation": each} for each in ("", "sigmoid")],
        "token5": [{"task": "tag"}] * 3,
    }
    return [
        AddTask(request_id=str(number), inputs=inputs(rng, rng.randint(2, 12)), **fields)
        for number, fields in enumerate(kinds[head])
    ]


def alone(tasks: Sequence[AddTask]) -> list[AddTask]:
    """A task for every text by itself; of a ranking by embeddings, with its query."""
    made = []
    for each in tasks:
        by_embeddings = each.task == "rank" and each.pooling
        for index, one in enumerate(each.inputs):
            texts = [one]
            if by_embeddings:
                if not index:
                    continue
                texts = [each.inputs[0], one]
            fields = {name: getattr(each, name) for name in ("task", "pooling", "normalize", "dimensions")}
            made.append(
                AddTask(
                    request_id=f"{each.request_id}/{index}",
                    inputs=texts,
                    activation=each.activation,
                    **fields,
                )
            )
    return made


@pytest.mark.parametrize("head", ["2", "sequence3", "sequence1", "token5"])
@pytest.mark.parametrize(("dtype", "quantization", "kernels"), PROFILES, ids=str)
def test_a_text_alone_and_among_others_is_the_same_to_the_bit(
    folders, head, dtype, quantization, kernels, rng
):
    engine = load_encoder_engine(
        start(folders[head][1], dtype=dtype, quantization=quantization, kernels=kernels)
    )
    runner = engine.runner
    assert isinstance(runner, EncoderRunner)
    tasks = asked(head, rng)
    before = runner.num_rows
    batched, shared = run(engine, tasks, together=True)
    tokens = sum(len(one.token_ids) for each in tasks for one in each.inputs)
    assert runner.num_rows - before == tokens, "as many rows are computed as there are tokens"
    single = []
    for each in alone(tasks):
        if len(each.inputs) == 1:
            single.append(run(engine, [each], together=False)[0][each.request_id])
        else:  # two steps: the budget holds one text
            engine.former.max_num_batched_tokens = 1
            single.append(run(engine, [each], together=False)[0][each.request_id])
            engine.former.max_num_batched_tokens = 2048
    compared = sum(len(each.inputs) for each in tasks)
    print(f"{compared} texts, {tokens} tokens and rows; {shared} steps with more than one text")
    assert shared > 0
    assert b"".join(batched[each.request_id] for each in tasks) == b"".join(single)


def test_auto_means_float32_and_the_config_says_what_can_be_asked(folders):
    said = {head: load_engine(start(folder)).ready() for head, (_, folder) in folders.items()}
    assert {head: ready.tasks for head, ready in said.items()} == {
        "2": ["embed", "rank"],
        "sequence3": ["classify"],
        "sequence1": ["classify", "rank"],
        "token5": ["tag"],
    }
    for ready in said.values():
        assert not ready.generates
        assert (ready.max_model_len, ready.vocab_size, ready.num_blocks) == (130, VOCABULARY, 0)
    engine = load_encoder_engine(start(folders["2"][1], max_model_len=40))
    assert engine.ready().max_model_len == 40
    assert engine.runner.model.embeddings.words.weight.dtype is torch.float32


def test_int4_is_refused_by_name(folders):
    with pytest.raises(FailedPrecondition, match="int8"):
        load_engine(start(folders["2"][1], quantization="int4"))


@pytest.mark.parametrize("head", ["2", "sequence3", "sequence1", "token5"])
def test_the_numbers_are_transformers(folders, head, rng):
    model, folder = folders[head]
    engine = load_encoder_engine(start(folder))
    tasks = asked(head, rng)
    data, _ = run(engine, tasks, together=True)
    compared = 0
    for each in tasks:
        wanted = _wanted(model, each)
        if each.task == "tag":
            got = np.frombuffer(data[each.request_id], [("label", "<u4"), ("probability", "<f4")])
            assert (got["label"] == wanted.argmax(-1)).all()
            assert got["probability"] == pytest.approx(wanted.max(-1), abs=1e-4)
        else:
            got = np.frombuffer(data[each.request_id], "<f4")
            assert got == pytest.approx(wanted.ravel(), abs=1e-4)
        compared += wanted.size
    print(f"{compared} numbers compared")
    assert compared


@torch.no_grad()
def _wanted(model: PreTrainedModel, task: AddTask) -> np.ndarray:
    """What transformers and a few lines say of the task."""
    rows = []
    for one in task.inputs:
        ids = torch.tensor([one.token_ids])
        types = torch.tensor([one.type_ids or [0] * len(one.token_ids)])
        said = model(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=types)
        if task.pooling:
            hidden_TE = said.last_hidden_state[0].double()
            pooled = {
                "cls": hidden_TE[0],
                "last": hidden_TE[-1],
                "mean": hidden_TE[one.first :].mean(0),
            }[task.pooling]
            row = pooled[: task.dimensions or None]
            rows.append(row / row.norm() if task.normalize else row)
        else:
            logits = said.logits[0].double()
            if task.task == "tag" or task.activation == "softmax":
                logits = logits.softmax(-1)
            elif task.activation == "sigmoid":
                logits = logits.sigmoid()
            rows.append(logits)
    if task.task == "rank" and task.pooling:
        query, *documents = rows
        return np.array([float(document @ query) for document in documents])
    return torch.cat([row if row.dim() > 1 else row[None] for row in rows]).numpy()


@pytest.mark.parametrize("head", ["2", "sequence3", "token5"])
def test_a_text_with_nan_fails_its_task_alone(folders, head, rng, tmp_path):
    _, folder = folders[head]
    tensors = load_file(folder / "model.safetensors")
    words = next(name for name in tensors if "word" in name)
    broken = VOCABULARY - 1
    tensors[words][broken] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    engine = load_encoder_engine(start(tmp_path))
    tasks = [
        AddTask(
            request_id=each.request_id,
            task=each.task,
            pooling=each.pooling,
            activation=each.activation,
            inputs=[
                TaskInput(token_ids=[min(token, broken - 1) for token in one.token_ids])
                for one in each.inputs
            ],
        )
        for each in asked(head, rng)
    ]
    good, _ = run(engine, tasks, together=True)
    fields = {"task": tasks[0].task, "pooling": tasks[0].pooling}
    bad = AddTask(request_id="bad", inputs=[TaskInput(token_ids=[5, broken, 7])], **fields)
    errors, data = {}, {}
    for each in (tasks[0], bad, *tasks[1:]):
        engine.add_task(each)
    before = engine.stats().num_steps
    while engine.has_work:
        for output in engine.step().task_outputs:
            errors[output.request_id], data[output.request_id] = output.error, output.data
    assert engine.stats().num_steps > before
    assert "not finite" in errors.pop("bad")
    assert not any(errors.values())
    assert {request_id: data[request_id] for request_id in good} == good
    print(f"{len(good)} tasks beside a broken one are the same to the bit")
