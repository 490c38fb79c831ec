"""The records of JSONL lines: {"text", "pair"}, {"context", "continuation"}, {"query", "documents"}."""

from __future__ import annotations

from treadle.cli.task_inputs import Parser
from treadle.client.task_request import Text
from treadle.errors import InvalidArgument, invalid_field

Query = tuple[str, tuple[str, ...]]
"""A query and its documents."""


def texts() -> Parser[Text]:
    """A text a line; a record, or a JSON string."""
    return Parser(lambda line: line, _text)


def single_texts() -> Parser[Text]:
    """The same, without a second sentence."""
    return Parser(lambda line: line, _single_text)


def text_fields(text: Text) -> dict[str, object]:
    """A text, or a pair, as a record has it."""
    return {"text": text} if isinstance(text, str) else {"text": text[0], "pair": text[1]}


def scored(context: str) -> Parser[tuple[str, str]]:
    """(context, continuation) a line; `context` stands where a line has none."""
    return Parser(lambda line: (context, line), lambda record: _scored(record, context))


def queries() -> Parser[Query]:
    """A query with its documents a line."""
    return Parser(None, _query)


def _text(record: object) -> Text:
    if isinstance(record, str):
        return record
    fields = _fields(record, ("text", "pair"))
    text = _string(fields, "text")
    return text if fields.get("pair") is None else (text, _string(fields, "pair"))


def _single_text(record: object) -> Text:
    text = _text(record)
    if not isinstance(text, str):
        raise invalid_field("pair", "must not be set: this task takes single texts")
    return text


def _scored(record: object, context: str) -> tuple[str, str]:
    fields = {"context": context} | _fields(record, ("context", "continuation"))
    return _string(fields, "context"), _string(fields, "continuation")


def _query(record: object) -> Query:
    fields = _fields(record, ("query", "documents"))
    documents = fields.get("documents")
    if not isinstance(documents, list) or not all(isinstance(one, str) for one in documents):
        raise invalid_field("documents", "must be a list of strings")
    return _string(fields, "query"), tuple(documents)


def _fields(record: object, known: tuple[str, ...]) -> dict[str, object]:
    if not isinstance(record, dict):
        raise InvalidArgument(
            f"the line is no JSON object with {' and '.join(known)}", reason="MALFORMED_LINE"
        )
    return record


def _string(fields: dict[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise invalid_field(name, f"must be a string; got {'nothing' if value is None else repr(value)[:80]}")
    return value
