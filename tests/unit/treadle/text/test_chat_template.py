"""Chat templates: the same prompts as Transformers makes, and strangers' programs kept in bounds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from tokenizers import Tokenizer as Backend

from treadle.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, TreadleError, Unavailable
from treadle.text import template_process
from treadle.text.chat_template import ChatTemplate
from treadle.text.template_pool import TemplatePool

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "alternating": """
    {%- if messages[0]['role'] == 'system' -%}
        {%- set system = messages[0]['content'] | trim + '\n\n' -%}
        {%- set messages = messages[1:] -%}
    {%- else -%}
        {%- set system = '' -%}
    {%- endif -%}
    {{- bos_token -}}
    {%- for message in messages -%}
        {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
            {{- raise_exception('roles must alternate user/assistant, not ' ~ message['role']) -}}
        {%- endif -%}
        {%- if message['role'] == 'user' -%}
            {{- '[INST] ' + (system if loop.index0 == 0 else '') + message['content'] | trim + ' [/INST]' -}}
        {%- else -%}
            {{- ' ' + message['content'] | trim + eos_token -}}
        {%- endif -%}
    {%- endfor -%}
    """,
    "namespace": """
{%- set ns = namespace(found=false, last='') %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not ns.found %}
        {%- set ns.found = true %}
        {%- set ns.last = message.content %}
    {%- endif %}
{%- endfor %}
last: {{ ns.last }}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if loop.index > 3 %}
        {% break %}
    {% endif %}
{{ loop.index }}. {{ message.content.split('</think>')[-1].lstrip('\n') }}
{% endfor %}
""",
    "json": """{% for message in messages %}
{{ message | tojson }}
{{ message.content | tojson(indent=2) }} {{ message | tojson(separators=(',', ':'), sort_keys=true) }}
{{ message.content | tojson(ensure_ascii=true) }}
{% endfor %}{{ tools is none }} {{ documents is none }} {{ unk_token is defined }}""",
    "date": """{%- if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif -%}
Year {{ date_string }} {{ strftime_now(format='%Y') }}
{% macro turn(message) %}<{{ message.role | upper }}>{{ message.content | replace('a', 'A') }}{% endmacro %}
{% for message in messages %}{{ turn(message) }}
{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<no thinking>{% endif %}""",
    "generation": """{% for message in messages %}
  {% if message.role == 'assistant' %}
    {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
  {% else %}
{{ dict(role=message.role).role }}: {{ message.content }}
  {% endif %}
{% endfor %}
{%- if add_generation_prompt %}> {% endif %}""",
}
CONVERSATIONS = {
    "one": [{"role": "user", "content": "Hello, is it \"you\" <b>&</b> 'me'?"}],
    "system": [
        {"role": "system", "content": "  Be brief. \n"},
        {"role": "user", "content": "Grüße 👍🏽 你好\n\n{{ 7 * 7 }}"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHi."},
        {"role": "user", "content": "a\tb\\n\x7f"},
    ],
    "empty": [{"role": "user", "content": ""}],
    "odd": [{"role": "assistant", "content": "first"}, {"role": "tool", "content": "[1, 2]"}],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool() -> AsyncIterator[TemplatePool]:
    async with TemplatePool(size=2, deadline_s=1.0) as running:
        yield running


@pytest.fixture(scope="module")
def transformers_tokenizer() -> Any:
    """The oracle: only its chat templates are asked for."""
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


module_loop = pytest.mark.asyncio(loop_scope="module")


@module_loop
async def test_same_prompts_as_transformers(pool: TemplatePool, transformers_tokenizer: Any) -> None:
    equal = refused = 0
    for source in TEMPLATES.values():
        for messages in CONVERSATIONS.values():
            for generation_prompt in (True, False):
                arguments = {"enable_thinking": False} if "enable_thinking" in source else {}
                expected: str | None
                try:
                    expected = transformers_tokenizer.apply_chat_template(
                        messages,
                        chat_template=source,
                        tokenize=False,
                        add_generation_prompt=generation_prompt,
                        **arguments,
                    )
                except Exception:
                    expected = None
                try:
                    ours: str | None = await pool.render(
                        ChatTemplate(source, SPECIAL),
                        messages,
                        add_generation_prompt=generation_prompt,
                        arguments=arguments,
                    )
                except TreadleError:
                    ours = None
                assert ours == expected
                equal += expected is not None
                refused += expected is None
    print(f"{equal} prompts equal, {refused} refused by both")
    assert equal >= 40
    assert refused >= 2


@module_loop
async def test_packaged_model_as_transformers(pool: TemplatePool, smollm2_folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    config = json.loads((smollm2_folder / "tokenizer_config.json").read_text())
    special = {name: config[name] for name in ("bos_token", "eos_token") if isinstance(config.get(name), str)}
    oracle = PreTrainedTokenizerFast(tokenizer_file=str(smollm2_folder / "tokenizer.json"), **special)
    template = ChatTemplate.load(smollm2_folder, special)
    assert template is not None
    for messages in CONVERSATIONS.values():
        expected = oracle.apply_chat_template(
            messages, chat_template=template.source, tokenize=False, add_generation_prompt=True
        )
        assert await pool.render(template, messages) == expected
        assert "<|im_start|>assistant" in expected


@module_loop
async def test_the_templates_own_exception(pool: TemplatePool) -> None:
    with pytest.raises(InvalidArgument, match="roles must alternate user/assistant, not assistant") as caught:
        await pool.render(ChatTemplate(TEMPLATES["alternating"], SPECIAL), CONVERSATIONS["odd"])
    assert caught.value.reason == "CHAT_TEMPLATE_FAILED"


@module_loop
@pytest.mark.parametrize(
    "name", ["messages", "add_generation_prompt", "bos_token", "raise_exception", "unheard"]
)
async def test_arguments_are_the_templates_own(pool: TemplatePool, name: str) -> None:
    template = ChatTemplate("{{ bos_token }}{{ mood }}{{ messages }}{{ add_generation_prompt }}", SPECIAL)
    assert (await pool.render(template, [], arguments={"mood": "gay"})).startswith("<s>gay")
    with pytest.raises(InvalidArgument, match="it takes: mood") as caught:
        await pool.render(template, [], arguments={name: "x"})
    assert [violation.field for violation in caught.value.fields] == ["template_arguments_json"]


HOSTILE: Mapping[str, str] = {
    "endless loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power": "{{ (10 ** (10 ** 9)) is odd }}",
    "a long string": "{{ 'a' * 10 ** 9 }}",
    "a wide centre": "{{ 'a'.center(10 ** 9) }}",
    "a doubling": (
        "{% set ns = namespace(s='aaaaaaaa') %}"
        "{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}"
    ),
    "much output": "{% for i in range(99999) %}{{ 'abcdefgh' * 100 }}{% endfor %}",
    "a large range": "{{ range(10 ** 9) | list }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by filter": "{{ (messages | attr('__class__')).__mro__ }}",
    "a format string": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "globals of a function": "{{ raise_exception.__globals__['json'].codecs.open('/etc/passwd') }}",
    "a macro's globals": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._func.__globals__ }}",
    "names in a namespace": "{{ namespace(__class__=1) }}",
    "change of the messages": "{{ messages.append(1) }}",
    "an include": "{% include '/etc/passwd' %}",
    "half a character": '{{ "\\ud800" }}',
    "bad syntax": "{% for %}",
    "depth": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
}


async def worst_lag(stop: asyncio.Event) -> float:
    worst = 0.0
    while not stop.is_set():
        before = time.perf_counter()
        await asyncio.sleep(0.005)
        worst = max(worst, time.perf_counter() - before - 0.005)
    return worst


@module_loop
async def test_hostile_templates(pool: TemplatePool) -> None:
    stop = asyncio.Event()
    lag = asyncio.create_task(worst_lag(stop))
    killed = pool.num_killed
    good = ChatTemplate(CHATML)
    for name, source in HOSTILE.items():
        with pytest.raises(FailedPrecondition) as caught:
            print(name, await pool.render(ChatTemplate(source), CONVERSATIONS["one"]))
        assert caught.value.reason == "CHAT_TEMPLATE_FAILED", name
        assert "root:" not in caught.value.message
        # Others are served at once, by the same pool.
        assert "Hello" in await pool.render(good, CONVERSATIONS["one"])
    stop.set()
    print(
        f"{len(HOSTILE)} templates, {pool.num_killed - killed} children replaced, worst lag {await lag:.3f} s"
    )
    assert pool.num_killed - killed >= 4


@module_loop
async def test_children_that_die_are_replaced(pool: TemplatePool) -> None:
    killed = pool.num_killed
    for child in list(pool._children):
        child.kill()
        await child._process.wait()
    assert "Hello" in await pool.render(ChatTemplate(CHATML), CONVERSATIONS["one"])
    assert pool.num_killed >= killed + 1


@module_loop
async def test_a_rendering_that_is_called_off_frees_its_child(pool: TemplatePool) -> None:
    slow = ChatTemplate(HOSTILE["endless loops"])
    tasks = [asyncio.create_task(pool.render(slow, [])) for _ in range(3)]
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(error, asyncio.CancelledError) for error in done)
    prompts = await asyncio.gather(
        *(pool.render(ChatTemplate(CHATML), CONVERSATIONS["one"]) for _ in range(8))
    )
    assert len(set(prompts)) == 1


async def test_waiting_is_bounded() -> None:
    async with TemplatePool(size=1, deadline_s=5.0, wait_s=0.1, max_waiting=2) as pool:
        running = asyncio.create_task(pool.render(ChatTemplate(HOSTILE["endless loops"]), []))
        await asyncio.sleep(0.05)
        good = [asyncio.create_task(pool.render(ChatTemplate(CHATML), [])) for _ in range(5)]
        outcomes = await asyncio.gather(*good, return_exceptions=True)
        kinds = [type(outcome) for outcome in outcomes]
        print({kind.__name__: kinds.count(kind) for kind in set(kinds)})
        assert kinds.count(Unavailable) == 2
        assert kinds.count(ResourceExhausted) == 3
        assert all(outcome.retry_after_s for outcome in outcomes if isinstance(outcome, TreadleError))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@module_loop
async def test_large_conversations(pool: TemplatePool) -> None:
    text = "line 👍\n" * 80_000
    prompt = await pool.render(ChatTemplate("{{ messages[0].content }}"), [{"role": "user", "content": text}])
    assert prompt == text
    with pytest.raises(FailedPrecondition, match="wrote more than"):
        await pool.render(ChatTemplate("{{ messages[0].content * 4 }}"), [{"role": "user", "content": text}])
    with pytest.raises(InvalidArgument) as caught:
        await pool.render(
            ChatTemplate("x"), [{"role": "user", "content": "a" * template_process.MAX_REQUEST_BYTES}]
        )
    assert [violation.field for violation in caught.value.fields] == ["messages"]


def test_children_die_with_their_parent() -> None:
    """A parent that is killed without a word leaves none behind."""
    program = (
        "import asyncio, os, signal\n"
        "from treadle.text.template_pool import TemplatePool\n"
        "async def main():\n"
        "    async with TemplatePool(size=2) as pool:\n"
        "        print(*[child._process.pid for child in pool._children], flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.run(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, check=False
    )
    assert parent.returncode == -signal.SIGKILL
    children = [int(number) for number in parent.stdout.split()]
    assert len(children) == 2
    waited_until = time.monotonic() + 10
    while time.monotonic() < waited_until and any(alive(child) for child in children):
        time.sleep(0.02)
    assert not any(alive(child) for child in children)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        # A dead child that nobody has asked after yet is no longer running.
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": "{}"}, None),
        ({"tokenizer_config.json": '{"chat_template": "a"}'}, "a"),
        ({"tokenizer_config.json": '{"chat_template": "a"}', "chat_template.jinja": "b\r\n"}, "b\r\n"),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "chat_template": [
                            {"name": "rag", "template": "r"},
                            {"name": "default", "template": "d"},
                        ]
                    }
                )
            },
            "d",
        ),
    ],
)
def test_load(tmp_path: Path, files: dict[str, str], expected: str | None) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content.encode())
    template = ChatTemplate.load(tmp_path, SPECIAL)
    assert (template and template.source) == expected
    assert template is None or template.special_tokens == SPECIAL


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a" * ((1 << 20) + 1)])
def test_load_what_is_no_template(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(content)
    with pytest.raises(FailedPrecondition) as caught:
        ChatTemplate.load(tmp_path, {})
    assert caught.value.reason == "CHAT_TEMPLATE_FAILED"
