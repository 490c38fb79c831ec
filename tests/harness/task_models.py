"""The labels of the random models that the tests of tasks ask."""

from __future__ import annotations

MOODS = ("joy", "anger", "fear", "calm", "grief")
ENTITIES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
