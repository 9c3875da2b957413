"""The text that importance matrices are made from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import chats
import gguf
import pytest

from ggufrq.base import paths
from ggufrq.make import mix

TOOLS = "days_in_february"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}{% endfor %}\n{% endfor %}"
)
#: Ten thousand million passes.
FOREVER = "{# tool_calls #}{% for i in range(99999) %}{% for j in range(99999) %}"


def test_all_kinds_come_in_turns() -> None:
    """A run over a part of it, too, sees prose, code, chat and tool calls."""
    whole = mix.text({})
    assert 150_000 < len(whole) < 220_000
    for quarter in range(4):
        part = whole[quarter * len(whole) // 4 : (quarter + 1) * len(whole) // 4]
        for sign in ("<|im_start|>user", "<tool_call>", "return "):
            assert sign in part, (quarter, sign)
    assert whole == mix.text({})
    assert len(mix.digest()) == 16


def test_nothing_of_it_is_held_out() -> None:
    held_out = set((paths.data_dir("texts") / "heldout.txt").read_text(encoding="utf-8").splitlines())
    lines = {line for line in mix.text({}).splitlines() if len(line) > 60}
    assert len(lines) > 500
    assert not lines & held_out


def test_conversations_are_whole() -> None:
    """Roles in turn, every call answered, every tool that is called described."""
    path = paths.data_dir("texts") / "mix" / "chat.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        conversation: dict[str, Any] = json.loads(line)
        names = {tool["function"]["name"] for tool in conversation.get("tools", ())}
        calls = 0
        for message in conversation["messages"]:
            assert message["content"] or message.get("tool_calls")
            for call in message.get("tool_calls", ()):
                assert call["function"]["name"] in names
                calls += 1
            calls -= message["role"] == "tool"
        assert calls == 0 and conversation["messages"][-1]["role"] == "assistant"


def test_the_models_own_template() -> None:
    values = {
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.ggml.tokens": ("<a>", "<s>"),
        "tokenizer.ggml.bos_token_id": 1,
    }
    whole = mix.text(values)
    assert "<s>[user] How long do I boil an egg" in whole
    assert "CALL read_file" in whole and "<|im_start|>" not in whole


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% if %}", "{{ messages[99].content.x }}", "", " "]
)
def test_a_template_that_takes_no_conversation(template: str) -> None:
    assert mix.text({"tokenizer.chat_template": template}) == mix.text({})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.role }};{% break %}{% endfor %}", "system;"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}", "x"),
        ("{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %};{% endfor %}", "user;"),
        ("{{ {'a': 'é<'} | tojson(ensure_ascii=False) }}", '{"a": "é<"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ pad_token }}{{ unk_token is defined }}", "<p>False"),
    ],
)
def test_templates_as_transformers_has_them(
    template: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it says nothing of a fallback, as the ones without calls of tools cause below."""
    values = {
        "tokenizer.chat_template": template + "{# tool_calls #}",
        "tokenizer.ggml.tokens": ("<a>", "<p>"),
        "tokenizer.ggml.padding_token_id": 1,
    }
    whole = mix.text(values)
    assert expected in whole and "<|im_start|>" not in whole
    assert "ChatML" not in capsys.readouterr().err


def test_the_template_for_tools_is_taken_for_them() -> None:
    values = {
        "tokenizer.chat_template": "plain {# tool_calls #}",
        "tokenizer.chat_template.tool_use": "with tools {# tool_calls #}",
    }
    whole = mix.text(values)
    assert "plain" in whole and "with tools" in whole


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% do messages.pop() %}", "unknown tag 'do'"),
        ("{{ raise_exception('no turns') }}{# tool_calls #}", "no turns"),
        ("{{ 1 / 0 }}{# tool_calls #}", "division by zero"),
        ("{% for m in messages %}[{{ m.role }}]{% endfor %}", "it knows no calls of tools"),
        (f"{FOREVER}{{% endfor %}}{{% endfor %}}", "it has not come to an end after 200,000 steps"),
        (
            f"{FOREVER}{{{{ messages }}}}{{% endfor %}}{{% endfor %}}",
            "it writes more than 1,000,000 characters",
        ),
    ],
)
def test_a_fallback_is_told_once(template: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    mix.text({"tokenizer.chat_template": template})
    told = [line for line in capsys.readouterr().err.splitlines() if "ChatML" in line]
    assert len([line for line in told if why in line]) == 1


def test_a_template_without_tools_does_not_lose_the_calls() -> None:
    whole = mix.text(
        {"tokenizer.chat_template": "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"}
    )
    assert "[user] How long" in whole and "<tool_call>" in whole


def test_the_date_is_always_the_same() -> None:
    whole = mix.text({"tokenizer.chat_template": "{{ strftime_now('%Y-%m-%d') }}"})
    assert "2026-01-01" in whole


def written(folder: Path, template: str) -> str:
    """The text of a model with this template."""
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama")
    writer.add_chat_template(template)
    writer.add_token_list(["<a>", "é<s>"])
    writer.add_bos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return mix.write(folder / "m.gguf", folder / mix.NAME).read_bytes().decode()


def test_the_text_of_a_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = {"tokenizer.ggml.tokens": ("<a>", "é<s>"), "tokenizer.ggml.bos_token_id": 1}
    whole = written(tmp_path, f"{TEMPLATE}{{# tool_calls #}}")
    assert whole == mix.text({"tokenizer.chat_template": f"{TEMPLATE}{{# tool_calls #}}", **values})
    assert "é<s>[user]" in whole and not capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
@pytest.mark.parametrize(
    "expression",
    [
        "'a' * 10**11",
        "'%99999999999d' % 1",
        "'a'.center(10**11)",
        "('a' * 10**6).replace('a', 'a' * 10**6)",
        "range(10**5) | join('a' * 10**6)",
    ],
)
def test_one_expression_that_takes_all_memory(
    expression: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert written(tmp_path, f"{{{{ {expression} }}}}{{# tool_calls #}}") == mix.text({})
    (told,) = capsys.readouterr().err.splitlines()
    assert told.endswith("where the chat template does not take it: it takes too much memory")


def test_one_expression_that_takes_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mix, "_SECONDS", 1)
    assert written(tmp_path, "{{ 10 ** (10 ** 9) }}{# tool_calls #}") == mix.text({})
    limits = {"linux": "1 seconds of a processor and 1024 MiB", "win32": "10 seconds"}
    (told,) = capsys.readouterr().err.splitlines()
    assert f"cannot be run in {limits.get(sys.platform, '1 seconds of a processor')}: python" in told


def test_where_only_the_clock_limits_a_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on Windows, which has no ``resource``."""
    (tmp_path / "resource.py").write_text("raise ImportError")  # before the standard library's
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(mix, "_SECONDS", 1)
    monkeypatch.setattr(mix, "_PATIENCE", 3)
    assert written(tmp_path, "{{ 10 ** (10 ** 9) }}{# tool_calls #}") == mix.text({})
    (told,) = capsys.readouterr().err.splitlines()
    assert told.endswith(" did not finish within 3 s and was stopped")


#: In the manner of real templates: what each family needs of jinja and of transformers.
STYLES = {path.stem: path for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}


@pytest.mark.parametrize("style", STYLES)
def test_as_transformers_writes_it(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    """To the byte, whatever the template uses."""
    pytest.importorskip("transformers")
    every = chats.conversations()
    same, told = chats.alike(STYLES[style].read_text(encoding="utf-8"), every, capsys)
    assert same == len(every) and not told


def test_a_template_that_takes_one_call_at_a_time_or_no_system_gets_that() -> None:
    every = chats.conversations()
    double = next(c for c in every if any(len(m.get("tool_calls", ())) > 1 for m in c["messages"]))
    forms = list(mix.forms(double))
    assert [len(f["messages"]) - len(double["messages"]) for f in forms][:2] == [0, 1]
    called = [m["tool_calls"][0]["id"] for m in forms[1]["messages"] if m.get("tool_calls")]
    assert called == [m["tool_call_id"] for m in forms[1]["messages"] if m["role"] == "tool"]
    system = next(c for c in every if c["messages"][0]["role"] == "system")
    user = list(mix.forms(system))[-1]["messages"][0]
    assert user["role"] == "user" and user["content"].startswith(system["messages"][0]["content"])
