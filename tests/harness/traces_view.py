"""The spans of a stack's services, which write them to their logs (OTEL_TRACES_EXPORTER=console)."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from service_stack import ServiceStack
from waiting import until


@dataclass(frozen=True)
class Seen:
    """A span as a service told it."""

    service: str
    name: str
    span_id: str
    parent_id: str
    kind: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]
    error: str
    """The status' description, where it is an error's."""

    @property
    def event_names(self) -> list[str]:
        return [name for name, _ in self.events]


class Traces:
    """The spans in the logs of a stack's services."""

    def __init__(self, stack: ServiceStack) -> None:
        self._stack = stack

    def of(self, trace_id: str) -> list[Seen]:
        """Those of one trace, in the order of their beginning."""
        found = [
            (line["start_time"], _seen(service.name, line))
            for service in self._stack.services.values()
            for line in service.log()
            if "context" in line and line["context"]["trace_id"] == f"0x{trace_id}"
        ]
        return [seen for _, seen in sorted(found, key=lambda pair: pair[0])]

    async def whole(self, trace_id: str, *names: str) -> list[Seen]:
        """A trace's spans, once there are as many of each of these names; they are the first ones."""

        def there() -> bool:
            have = [span.name for span in self.of(trace_id)]
            return all(have.count(name) >= names.count(name) for name in names)

        await until(there, f"{names} are told", 20, every_s=0.1)
        return self.of(trace_id)


def _seen(service: str, line: dict[str, Any]) -> Seen:
    return Seen(
        service,
        line["name"],
        line["context"]["span_id"].removeprefix("0x"),
        (line["parent_id"] or "").removeprefix("0x"),
        line["kind"].removeprefix("SpanKind."),
        line["attributes"],
        [(event["name"], event["attributes"]) for event in line["events"]],
        line["status"].get("description", "") if line["status"]["status_code"] == "ERROR" else "",
    )


@dataclass(frozen=True)
class Caller:
    """A client's span."""

    trace_id: str
    span_id: str

    @classmethod
    def begin(cls) -> Caller:
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("traceparent", f"00-{self.trace_id}-{self.span_id}-01"),)


def tree(spans: list[Seen]) -> dict[str, str]:
    """Each span's parent, by what they are: a trace in which a name stands once."""
    by_id = {span.span_id: f"{span.service.partition('-')[0]}: {span.name}" for span in spans}
    return {by_id[span.span_id]: by_id.get(span.parent_id, span.parent_id) for span in spans}


def input_output(span: Seen) -> tuple[int, int]:
    return span.attributes["gen_ai.usage.input_tokens"], span.attributes["gen_ai.usage.output_tokens"]
