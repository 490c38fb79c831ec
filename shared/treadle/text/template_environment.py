"""The Jinja environment that chat templates are written for: what Transformers gives them, and no more.

Blocks are trimmed, `break` and `continue` work, `tojson` keeps characters as they are, `raise_exception` and
`strftime_now` are there, and `{% generation %}` marks what the model says. Everything runs in Jinja's
immutable sandbox; that bounds neither time nor memory, so a process of its own has to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils


class RaisedByTemplate(jinja2.TemplateError):
    """The template called raise_exception: it does not take this conversation."""


class UnknownArgument(Exception):
    """An argument that the template never reads, or one that is not the caller's to set."""


class TooMuchOutput(Exception):
    """The template wrote more than the bound."""


class CompiledTemplate:
    """A chat template, ready to render; raises jinja2.TemplateError where it is no template."""

    def __init__(self, source: str) -> None:
        self._environment = _environment()
        self._template = self._environment.from_string(source)
        read = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
        self._arguments = read - self._environment.globals.keys() - {"messages", "add_generation_prompt"}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        special_tokens: Mapping[str, str],
        arguments: Mapping[str, Any],
        max_characters: int,
    ) -> str:
        """The prompt. Raises the errors above, and whatever the template's expressions raise."""
        taken = self._arguments - special_tokens.keys()
        if unknown := sorted(arguments.keys() - taken):
            names = ", ".join(sorted(taken)) or "none"
            raise UnknownArgument(f"the template takes no argument {unknown[0]!r}; it takes: {names}")
        variables = {
            "tools": None,
            "documents": None,
            **special_tokens,
            **arguments,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces, characters = [], 0
        for piece in self._template.generate(variables):
            characters += len(piece)
            if characters > max_characters:
                raise TooMuchOutput(f"the template wrote more than {max_characters} characters")
            pieces.append(piece)
        return "".join(pieces)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = TemplateNamespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a prompt is not.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise RaisedByTemplate(str(message))


def _strftime_now(format: str) -> str:  # noqa: A002 - templates may name it
    # The local time, without a zone: so the templates' authors saw it.
    return datetime.now().strftime(format)  # noqa: DTZ005


class TemplateNamespace(jinja2.utils.Namespace):
    """Jinja's namespace, without names that reach into Python's own attributes."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args
        merged = dict(*rest, **attributes)
        for name in merged:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, merged)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have an attribute {name!r}")


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for training; here its body just renders."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
