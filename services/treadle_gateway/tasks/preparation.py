"""From a checked task to what can be queued: the model, the ids of its texts, the work with its defaults."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from treadle.errors import TreadleError, invalid_field
from treadle_gateway.bounds import check_task
from treadle_gateway.clients import Tokenizer
from treadle_gateway.config import GatewayConfig
from treadle_gateway.deadlines import Deadline
from treadle_gateway.models import Models, ServedModel
from treadle_gateway.tasks import classification, embedding, ranking, scoring, tagging
from treadle_gateway.tasks.task import (
    ClassifyTask,
    EmbedTask,
    RerankTask,
    ScoreTask,
    TagTask,
    Task,
)
from treadle_gateway.tasks.texts import TextEncoder
from treadle_gateway.tasks.work import Plan, Prepared
from treadle_gateway.tokenizing import renamed

_PLANS: dict[type, Callable[[Any, TextEncoder], Awaitable[Plan]]] = {
    EmbedTask: embedding.plan,
    ClassifyTask: classification.plan,
    TagTask: tagging.plan,
    RerankTask: ranking.plan,
    ScoreTask: scoring.plan,
}
_TRIES = 3
"""How often a model may go while its texts are tokenised."""


class TaskPreparation:
    """Prepares tasks; holds nothing of any of them."""

    def __init__(self, models: Models, tokenizer: Tokenizer, limits: GatewayConfig) -> None:
        self._models = models
        self._tokenizer = tokenizer
        self._limits = limits

    async def prepare(self, task: Task, request_id: str, deadline: Deadline) -> Prepared:
        """The task for the model that answers now; raises what is wrong with it, its model or its time."""
        for _ in range(_TRIES):
            context = task.context
            finding = self._models.find(context.model, context.profile, request_id)
            model = await deadline.bound(_in_the_tasks_words(finding))
            prepared = await self._for(task, model, deadline)
            # Tokenising may take long enough for the model to be let go meanwhile.
            if await deadline.bound(self._models.is_ready(prepared.model)):
                break
        return prepared

    async def prepare_for(
        self, task: Task, artifact_digest: str, profile: str, deadline: Deadline
    ) -> Prepared:
        """The task as it was for the model that has answered it, whatever has become of that since."""
        model = await deadline.bound(_in_the_tasks_words(self._models.of(artifact_digest, profile)))
        return await self._for(task, model, deadline)

    async def _for(self, task: Task, model: ServedModel, deadline: Deadline) -> Prepared:
        check_task(task.name, model, "context.model")
        encoder = TextEncoder(self._tokenizer, model, deadline, timeout_s=self._limits.tokenizer_timeout_s)
        plan = await _PLANS[type(task)](task, encoder)
        tokens = sum(len(one.ids) for one in plan.inputs)
        if tokens > self._limits.max_task_tokens:
            raise invalid_field(
                "documents" if isinstance(task, RerankTask) else "inputs",
                f"have {tokens} tokens in all, at most {self._limits.max_task_tokens} are taken at once; "
                "send fewer a request",
            )
        return Prepared(model, plan, tokens)


async def _in_the_tasks_words(finding: Awaitable[ServedModel]) -> ServedModel:
    """The model; what is wrong with its name is named as a task names it."""
    try:
        return await finding
    except TreadleError as error:
        raise renamed(error, lambda field: field.replace("generation.", "context.", 1)) from error
