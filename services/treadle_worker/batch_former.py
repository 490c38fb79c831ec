"""Which texts an encoder's next step computes: a budget of tokens, over plain integers.

Priorities are strict: a text of a lower one is in a step only where every text of the higher ones is, too, or
did not fit. Within a priority tasks get tokens in turns, by start-time fair queueing (Goyal, Vin and Cheng,
1996): each text has a tag, the tokens that its task was given before it, and lower tags go first. A task that
arrives begins at the tag of whoever is computed now, so one with a thousand texts delays one with a single
text by no more than what was begun.

Texts of near length are put together, since those of equal length attend to themselves without padding or
mask. They are chosen from a window of the texts that come next by tag. The first of them is always in the
step, and what was left out MAX_SKIPS times is chosen before all others.

Tags alone would let a task starve: as long as new ones come as fast as they are computed, all of them begin
before its next text. So every ELDEST_STEPS-th step begins with a text of the task that came first, whatever
its tag is: each task comes first some time, and is then computed in a bounded number of steps.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

WINDOW_STEPS = 4
"""Steps' worth of texts to choose from."""
MAX_SKIPS = 2 * WINDOW_STEPS
ELDEST_STEPS = 8


@dataclass(slots=True, eq=False)
class Text:
    """A text that waits: the `index`-th of its task."""

    task_id: str
    index: int
    num_tokens: int
    cost: float
    """What it takes of a step's budget: its tokens, and what attention among them adds."""
    tag: float = 0.0
    order: int = 0
    """Of two with the same tag the lower one goes first."""
    num_skips: int = 0

    def __lt__(self, other: Text) -> bool:
        return (self.tag, self.order) < (other.tag, other.order)


@dataclass(slots=True, eq=False)
class _Task:
    """A task, and those of its texts that are not in the window yet."""

    priority: int
    arrival: int
    num_waiting: int
    texts: Iterator[Text]
    next: Text | None = None
    tag: float = 0.0

    def draw(self) -> Text:
        """The next text, its tag set; there must be one."""
        text = self.next
        assert text is not None, "a task that waits has a text"
        text.tag, text.order = self.tag, self.arrival
        self.tag += text.cost
        self.next = next(self.texts, None)
        return text


@dataclass(slots=True)
class _Queue:
    """What waits at one priority."""

    tasks: list[tuple[float, int, _Task]] = field(default_factory=list)
    """By the tag of the next text: a heap."""
    window: list[Text] = field(default_factory=list)
    """By tag."""
    window_cost: float = 0.0
    virtual_time: float = 0.0
    """The lowest tag of the texts that waited for the last step."""
    num_steps: int = 0
    """That began with a text from here."""

    def fill(self, cost: float) -> None:
        """Draws texts until so much is in the window; those that come before its last one in any case."""
        while self.tasks and (self.window_cost < cost or self.tasks[0][0] < self.window[-1].tag):
            _, arrival, task = self.tasks[0]
            text = task.draw()
            insort(self.window, text)
            self.window_cost += text.cost
            if task.next is None:
                heapq.heappop(self.tasks)
            else:
                heapq.heapreplace(self.tasks, (task.tag, arrival, task))

    def take(self, budget: float, *, is_first: bool) -> list[Text]:
        """Takes texts for up to `budget` out of the window; where `is_first` its first one in any case."""
        if not self.window:
            return []
        head = self.window[0]
        if head.cost > budget and not is_first:
            return []
        self.virtual_time = head.tag
        self.num_steps += is_first
        if is_first and self.num_steps % ELDEST_STEPS == 0:
            head = self._eldest()
        chosen, left = [head], budget - head.cost
        others = [text for text in self.window if text is not head]
        for text in sorted(others, key=lambda text: _distance(text, head)):
            if text.cost <= left:
                chosen.append(text)
                left -= text.cost
        self._remove(chosen)
        return chosen

    def _eldest(self) -> Text:
        """The next text of the task that came first, from the window or into it."""
        arrival, place = min(((entry[1], place) for place, entry in enumerate(self.tasks)), default=(0, -1))
        drawn = min(self.window, key=lambda text: (text.order, text.tag))
        if place < 0 or drawn.order <= arrival:
            return drawn
        task = self.tasks[place][2]
        text = task.draw()
        self.window.append(text)
        del self.tasks[place]
        if task.next is not None:
            self.tasks.append((task.tag, arrival, task))
        heapq.heapify(self.tasks)
        return text

    def _remove(self, chosen: Sequence[Text]) -> None:
        taken = {id(text) for text in chosen}
        self.window = [text for text in self.window if id(text) not in taken]
        self.window_cost = sum(text.cost for text in self.window)
        for text in self.window:
            text.num_skips += 1

    def drop(self, task_id: str, task: _Task) -> None:
        self.tasks = [entry for entry in self.tasks if entry[2] is not task]
        heapq.heapify(self.tasks)
        self.window = [text for text in self.window if text.task_id != task_id]
        self.window_cost = sum(text.cost for text in self.window)


def _distance(text: Text, head: Text) -> int:
    """How far from its head a text belongs; sorting keeps the order of those that are as far."""
    return -1 if text.num_skips >= MAX_SKIPS else abs(text.num_tokens - head.num_tokens)


class BatchFormer:
    """Owns the texts that wait. A text that is given out is forgotten here."""

    def __init__(self, max_num_batched_tokens: int, *, quadratic_tokens: float) -> None:
        """`quadratic_tokens`: the length at which attention among a text's tokens takes as long as all else.

        Raises ValueError for what is not positive.
        """
        if max_num_batched_tokens < 1 or quadratic_tokens <= 0:
            raise ValueError("the budget and the length must be positive")
        self.max_num_batched_tokens = max_num_batched_tokens
        self._quadratic_tokens = quadratic_tokens
        self._queues: dict[int, _Queue] = {}
        self._tasks: dict[str, _Task] = {}
        """Those of which texts wait."""
        self._num_arrivals = 0

    @property
    def num_waiting(self) -> int:
        """Texts that wait."""
        return sum(task.num_waiting for task in self._tasks.values())

    def cost(self, num_tokens: int) -> float:
        """What a text of that length takes of the budget."""
        return num_tokens * (1 + num_tokens / self._quadratic_tokens)

    def add(self, task_id: str, lengths: Sequence[int], priority: int = 0) -> None:
        """Lets the texts of a task wait; their lengths are in tokens.

        Raises ValueError for a task that is there, for one without texts, and for a text without tokens.
        """
        if task_id in self._tasks or not lengths or min(lengths) < 1:
            raise ValueError(f"task {task_id!r} is there already, or is empty")
        lengths = tuple(lengths)
        texts = (Text(task_id, index, length, self.cost(length)) for index, length in enumerate(lengths))
        queue = self._queues.setdefault(priority, _Queue())
        task = _Task(priority, self._num_arrivals, len(lengths), texts, next(texts), queue.virtual_time)
        self._num_arrivals += 1
        heapq.heappush(queue.tasks, (task.tag, task.arrival, task))
        self._tasks[task_id] = task

    def abort(self, task_id: str) -> None:
        """Forgets what waits of a task, if anything does."""
        if (task := self._tasks.pop(task_id, None)) is not None:
            self._queues[task.priority].drop(task_id, task)
            self._tidy(task.priority)

    def form(self, budget: float | None = None) -> list[Text]:
        """Takes the texts of the next step, those of equal length side by side; empty where none waits.

        Their cost is within `budget` (None: `max_num_batched_tokens`, which is also the most), unless the
        first one alone takes more: then it is the only one.
        """
        left = budget = min(self.max_num_batched_tokens, budget or self.max_num_batched_tokens)
        chosen: list[Text] = []
        for priority in sorted(self._queues, reverse=True):
            queue = self._queues[priority]
            queue.fill(WINDOW_STEPS * budget)
            taken = queue.take(left, is_first=not chosen)
            chosen += taken
            left -= sum(text.cost for text in taken)
            self._count(taken)
            self._tidy(priority)
            if priority in self._queues:
                break
        return sorted(chosen, key=lambda text: text.num_tokens)

    def _count(self, taken: Sequence[Text]) -> None:
        for text in taken:
            task = self._tasks[text.task_id]
            task.num_waiting -= 1
            if not task.num_waiting:
                del self._tasks[text.task_id]

    def _tidy(self, priority: int) -> None:
        """A priority at which nothing waits begins anew, its tags at 0."""
        queue = self._queues[priority]
        if not queue.tasks and not queue.window:
            del self._queues[priority]
