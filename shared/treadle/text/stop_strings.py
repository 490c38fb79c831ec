"""Finds stop strings in text that arrives in pieces, and holds back what may become one.

The automaton of Aho and Corasick ("Efficient string matching", 1975): its state is the longest end of the
text that begins some stop string, which is just what must be held back. Work is linear in the text, whatever
the stop strings.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStringMatcher:
    """Watches one answer's text.

    The match is the stop string that is complete first; where several end at the same character, the
    longest of them. How the text was cut into pieces makes no difference. After a match nothing more is
    given out. Raises ValueError for an empty stop string.
    """

    def __init__(self, stop_strings: Sequence[str] = (), *, include_stop_string: bool = False) -> None:
        self._automaton = _Automaton(stop_strings)
        self._include = include_stop_string
        self._state = 0
        self._held: deque[str] = deque()
        self.matched: str | None = None
        """The stop string that was found."""

    @property
    def watches(self) -> bool:
        """Whether there is any stop string to look for."""
        return bool(self._automaton.stop_strings)

    def push(self, text: str, *, may_match: bool = True) -> str:
        """Takes the next piece; gives the text that belongs to the answer for certain.

        A stop string's own text is part of it only where it is to be included, and then nothing has to be
        held back. With `may_match` false, a stop string that is complete within this piece is text like any
        other; one that begins in it and is complete later counts.
        """
        if self.matched is not None:
            return ""
        if not self._automaton.stop_strings:
            return text
        out: list[str] = []
        for character in text:
            self._state = self._automaton.step(self._state, character)
            self._held.append(character)
            self.matched = self._automaton.match[self._state] if may_match else None
            if self.matched is not None:
                break
            keep = 0 if self._include else self._automaton.depth[self._state]
            while len(self._held) > keep:
                out.append(self._held.popleft())
        if self.matched is not None:
            end = len(self._held) - (0 if self._include else len(self.matched))
            out.extend(self._held.popleft() for _ in range(end))
            self._held.clear()
        return "".join(out)

    def flush(self) -> str:
        """The text that was held back and is no stop string after all: the answer is at its end."""
        text = "".join(self._held)
        self._held.clear()
        self._state = 0
        return text


class _Automaton:
    """States are the prefixes of the stop strings, the empty one first."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self.stop_strings = tuple(dict.fromkeys(stop_strings))
        self.depth = [0]
        """The length of each state's prefix, in characters."""
        self.match: list[str | None] = [None]
        """The longest stop string that a state ends with."""
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        for stop in self.stop_strings:
            self._insert(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character; constant work on average."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _insert(self, stop: str) -> None:
        if not stop:
            raise ValueError("a stop string must not be empty")
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
                self._fallback.append(0)
            state = self._next[state][character]
        self.match[state] = stop

    def _link(self) -> None:
        """Fallbacks by breadth: a state's is the longest proper end of it that is a prefix too."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], character)
                if self.match[child] is None:
                    self.match[child] = self.match[self._fallback[child]]
                queue.append(child)
