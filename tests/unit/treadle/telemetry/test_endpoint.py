"""The metrics endpoint, asked rightly, wrongly, too long, too slowly and too often."""

from __future__ import annotations

import asyncio
import gzip
import random
import threading
import time

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from waiting import until

from treadle.errors import InvalidArgument, Unavailable
from treadle.telemetry import endpoint
from treadle.telemetry.endpoint import MetricsEndpoint

LOOPBACK = "127.0.0.1:0"


def values(text: str) -> dict[str, float]:
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


async def test_a_scrape_reads_the_registry(registry, ask, get):
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        plain = await ask(served.port, get())
        packed = await ask(served.port, get(Accept_Encoding="gzip"))
        chosen = await ask(served.port, get("/metrics?name[]=treadle:other_total"))
    assert [answer.status for answer in (plain, packed, chosen)] == [200] * 3
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert values(plain.body.decode()) == {"treadle:seen_total": 7.0}
    assert values(gzip.decompress(packed.body).decode()) == {"treadle:seen_total": 7.0}
    assert chosen.body == b""
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", served.port)


@pytest.mark.parametrize("method", ["HEAD", "POST", "OPTIONS", "get", "DELETE"])
async def test_nothing_but_get_is_served(registry, ask, get, method):
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        refused = await ask(served.port, get(method=method) + b"x" * 100)
    assert refused.status == 405
    assert refused.headers["allow"] == "GET"
    assert b"treadle" not in refused.body


@pytest.mark.parametrize(
    "target", ["/", "/metrics/", "/favicon.ico", "*", "http://here/metrics", "//metrics"]
)
async def test_there_is_one_path(registry, ask, get, target):
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        assert (await ask(served.port, get(target))).status == 404


@pytest.mark.parametrize(
    "head",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"GET /metrics HTTP/2\r\n\r\n",
        b"GET /metrics HTTP/1.1 more\r\n\r\n",
        "GET /métrics HTTP/1.1\r\n\r\n".encode(),
        b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 500 + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_a_bad_one(registry, ask, head):
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        assert (await ask(served.port, head)).status == 400


async def test_a_head_has_a_bound(registry, ask, get):
    """Also where its end never comes: no more is read than the bound."""
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        fits = await ask(served.port, get(Padding="x" * (endpoint.MAX_HEAD_BYTES - 200)))
        whole = await ask(served.port, get(Padding="x" * (endpoint.MAX_HEAD_BYTES + 200)))
        endless = await ask(served.port, b"GET /metrics HTTP/1.1\r\nPadding: " + b"x" * (8 << 20))
    assert fits.status == 200
    # The rest of what is still being sent may turn the answer into a reset.
    assert whole.status in (431, 0)
    assert endless.status in (431, 0)
    print(f"{endpoint.MAX_HEAD_BYTES} bytes are the bound; over it: {whole.status}, 8 MiB: {endless.status}")


async def test_half_a_request_ends_with_the_deadline(registry, ask, get, monkeypatch):
    monkeypatch.setattr(endpoint, "DEADLINE_S", 0.3)
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        began = time.monotonic()
        halves = await asyncio.gather(*(ask(served.port, get()[:cut]) for cut in (0, 1, 20, -1)))
        took_s = time.monotonic() - began
        assert (await ask(served.port, get())).status == 200
    assert [half.status for half in halves] == [0] * 4
    assert took_s >= 0.3
    print(f"{len(halves)} halves were closed after {took_s:.2f} s")


async def test_a_scraper_that_does_not_read_ends_with_the_deadline(ask, get, monkeypatch):
    """An answer larger than what the sockets hold."""
    monkeypatch.setattr(endpoint, "DEADLINE_S", 0.5)

    class Large:
        def collect(self):
            family = GaugeMetricFamily("large", "x" * (32 << 20))
            family.add_metric([], 1.0)
            yield family

    registry = CollectorRegistry()
    registry.register(Large())
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1 << 10)
        writer.write(get())
        assert await reader.read(15) == b"HTTP/1.1 200 OK"
        await asyncio.sleep(1.5)
        received = 15
        with pytest.raises(ConnectionError):
            while part := await reader.read(1 << 16):
                received += len(part)
            raise ConnectionError("closed in the middle")
        writer.transport.abort()
        assert (await ask(served.port, get("/"))).status == 404
    assert received < 32 << 20
    print(f"cut off after {received} of {32 << 20} bytes")


async def test_so_many_connections_and_no_more(registry, ask, get):
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        idle = [
            await asyncio.open_connection("127.0.0.1", served.port) for _ in range(endpoint.MAX_CONNECTIONS)
        ]
        refused = [(await ask(served.port, get())).status for _ in range(3)]
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()

        async def served_again() -> bool:
            return (await ask(served.port, get())).status == 200

        await until(served_again, "there is room again", 10)
    assert refused == [0] * 3
    print(f"{len(idle)} idle connections, {len(refused)} refused, then served again")


async def test_garbage_is_survived(registry, ask, get):
    rng = random.Random(5)
    good = get(Accept="text/plain", Accept_Encoding="gzip")
    found: dict[int, int] = {}
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        for number in range(300):
            data = bytearray(good)
            if number % 3 == 0:
                data = bytearray(rng.randbytes(rng.randint(1, 400)) + b"\r\n\r\n")
            else:
                for _ in range(rng.randint(1, 8)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
                data += b"\r\n\r\n"
            status = (await ask(served.port, bytes(data))).status
            found[status] = found.get(status, 0) + 1
        assert (await ask(served.port, good)).status == 200
    assert sum(found.values()) == 300
    assert set(found) <= {200, 400, 404, 405}
    assert found[400] > 100
    print(f"300 damaged requests: {found}")


async def test_whatever_a_scraper_accepts_the_names_are_the_same(registry, ask, get):
    """As OpenMetrics, which every Prometheus asks for, prometheus_client loses the names' colon."""
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        found = [
            await ask(served.port, get(Accept=accept))
            for accept in (
                # Prometheus 2 and 3.
                "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4,*/*;q=0.1",
                "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.2",
                "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.2",
                "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited",
                "application/openmetrics-text; version=x.y",
                ",;=,;",
            )
        ]
    assert [answer.status for answer in found] == [200] * 6
    assert {answer.headers["content-type"] for answer in found} == {
        "text/plain; version=0.0.4; charset=utf-8"
    }
    assert all(values(answer.body.decode()) == {"treadle:seen_total": 7.0} for answer in found)


async def test_a_number_that_cannot_be_read_is_an_answer(registry, ask, get, caplog):
    def gone() -> float:
        raise ProcessLookupError("secret")

    Gauge("treadle:gone", "Gone.", registry=registry).set_function(gone)
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        failed = await ask(served.port, get())
        assert (await ask(served.port, get("/"))).status == 404
    assert (failed.status, failed.body) == (500, b"Internal Server Error\n")
    assert "a scrape failed" in caplog.text


async def test_a_scrape_takes_nothing_from_the_service(ask, get):
    """A collector that blocks its thread; the service's loop goes on meanwhile."""
    inside, go_on = threading.Event(), threading.Event()

    class Slow:
        def collect(self):
            inside.set()
            go_on.wait(10)
            yield GaugeMetricFamily("slow", "Slow.", value=float(threading.get_ident()))

    registry = CollectorRegistry()
    registry.register(Slow())
    inside.clear()  # registering collects once
    go_on.clear()
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        asked = asyncio.create_task(ask(served.port, get()))
        await until(inside.is_set, "the scrape is blocked", 10)
        turns = 0
        for _ in range(100):
            await asyncio.sleep(0)
            turns += 1
        assert not asked.done()
        go_on.set()
        answer = await asked
    assert turns == 100
    assert values(answer.body.decode())["slow"] != threading.get_ident()
    print(f"{turns} turns of the service's loop while one scrape was blocked")


async def test_leaving_waits_for_nobody(registry, ask, get):
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        _, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(b"GET /met")
        assert (await ask(served.port, get())).status == 200
        began = time.monotonic()
    assert time.monotonic() - began < endpoint.DEADLINE_S / 2
    assert not [thread for thread in threading.enumerate() if thread.name == "metrics"]
    writer.transport.abort()


async def test_an_address_is_said_to_be_taken_or_wrong(registry):
    async with MetricsEndpoint(LOOPBACK, registry) as served:
        with pytest.raises(Unavailable, match=str(served.port)) as taken:
            await MetricsEndpoint(f"127.0.0.1:{served.port}", registry).__aenter__()
    assert taken.value.reason == "ADDRESS_IN_USE"
    refused = 0
    for address in ("", "9051", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:70000"):
        with pytest.raises(InvalidArgument) as wrong:
            await MetricsEndpoint(address, registry).__aenter__()
        assert wrong.value.fields[0].field == "metrics_address"
        refused += 1
    assert refused == 6
