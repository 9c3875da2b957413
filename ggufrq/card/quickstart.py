"""Commands for the reader of a card, each run before it is printed, or labelled as not run."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import log, paths, proc
from ggufrq.base.errors import ToolError
from ggufrq.build.project import Build
from ggufrq.cache.kv import KvPlan, parse_plan
from ggufrq.card.facts import Facts
from ggufrq.drive import cache_check
from ggufrq.drive.serve import ANY_PORT, choose_port, started
from ggufrq.tools import completion, server
from ggufrq.tools.logs import Context, ended, parse_context, parse_draft, retried

#: The quickstart that has a section of its own.
AHEAD = "llama-server, tokens guessed ahead"
PROMPT = "Why is the sky blue?"
_BIN = "$(ggufrq where bin)/"
_CTX, _PORT = 4096, 8080
#: Added to what is printed when it is run: a few tokens are enough, and the log tells of the cache.
_TOKENS = 8
_LOGGED = ["-lv", "4", "--log-colors", "off"]
_TIMEOUT = 600.0
#: Characters after which the next option begins a line.
_WIDE = 60


@dataclass(frozen=True)
class Quickstart:
    """Command lines under a title; ``ran`` tells whether they were run just so, with a few more options that
    limit the answer and show the log, and ``by`` what ran them where that is not what is printed."""

    title: str
    lines: tuple[str, ...]
    ran: bool
    by: str = ""


def quickstarts(facts: Facts, build: Build, *, run: bool = True) -> list[Quickstart]:
    """The quickstarts of a family, with its smallest file. With ``run`` each is run first; raises ToolError
    when one fails or does not keep its cache as it says."""
    starts = _Starts(facts, build, run)
    kv = facts.cache_type
    found = [starts.ggufrq(kv), starts.cli(f"llama-cli, {kv}", kv), starts.server(kv)]
    if facts.thinks:
        found += [
            starts.cli("llama-cli, with thinking", kv, "--reasoning", "on"),
            starts.cli("llama-cli, without thinking", kv, "--reasoning", "off"),
        ]
    if facts.guesses:
        found.append(starts.ahead(kv))
    if kv != "q8_0":
        found.append(starts.cli("upstream llama.cpp, q8_0", "q8_0", upstream=True))
    return found


class _Starts:
    def __init__(self, facts: Facts, build: Build, run: bool) -> None:
        self.facts = facts
        self.build = build
        self.run = run
        self.file = facts.smallest.path.name
        self.log = paths.logs_dir() / "card-quickstart.log"

    def ggufrq(self, kv: str) -> Quickstart:
        """One prompt by ggufrq itself."""
        args = ["run", self.file, "-p", PROMPT, "--kv", kv]
        if self.run:
            self._tell("ggufrq run", kv)
            program = [sys.executable, "-m", "ggufrq", *args, "-n", str(_TOKENS), "--json"]
            done = proc.run(program, cwd=self.facts.folder, log=self.log, timeout=_TIMEOUT)
            answer = json.loads(done.stdout)
            if (answer["type_k"], answer["type_v"]) != (kv, kv) or not answer["tokens"]:
                raise self._failed("ggufrq run", f"the cache was kept in {answer['kv']}")
        return Quickstart(f"ggufrq, {kv}", (shlex.join(["ggufrq", *args]),), self.run)

    def cli(self, title: str, kv: str, *more: str, upstream: bool = False) -> Quickstart:
        """One turn of llama-cli; ``upstream`` prints it for a llama.cpp that is not ours."""
        args = ["-m", self.file, "-c", str(_CTX), *_cache(self._plan(kv)), "-st", *more, "-p", PROMPT]
        if self.run:
            self._tell("llama-cli", kv)

            def attempt() -> Context:
                done = proc.run(
                    [self.build.tool("llama-cli"), *args, "-n", str(_TOKENS), "--simple-io", *_LOGGED],
                    cwd=self.facts.folder,
                    log=self.log,
                    check=False,
                    timeout=_TIMEOUT,
                )
                if done.rc != 0:
                    raise ToolError(ended(done))
                return completion.parse_timing(done.stderr).context

            self._check("llama-cli", retried(attempt), kv)
        program = "llama-cli" if upstream else f"{_BIN}llama-cli"
        by = ", by the patched build, which takes the same options" if upstream else ""
        return Quickstart(title, (_line(program, args),), self.run, by)

    def ahead(self, kv: str) -> Quickstart:
        """llama-server with the model's own head, which guesses further tokens."""
        head = self.facts.head
        draft = ["-md", head.parts[0]] if head is not None else []
        return self.server(kv, "--spec-type", "draft-mtp", *draft, title=AHEAD)

    def server(self, kv: str, *more: str, title: str = "llama-server") -> Quickstart:
        """llama-server, and a request to it."""
        args = ["-m", self.file, "-c", str(_CTX), *_cache(self._plan(kv)), *more, "--port"]
        body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 64}
        if self.run:
            self._tell("llama-server", kv)
            self._serve([*args, str(choose_port("127.0.0.1", ANY_PORT))], {**body, "max_tokens": _TOKENS}, kv)
        curl = [
            f"http://127.0.0.1:{_PORT}/v1/chat/completions",
            "-H",
            "Content-Type: application/json",
            "-d",
            json.dumps(body),
        ]
        lines = (_line(f"{_BIN}llama-server", [*args, str(_PORT)]), _line("curl", curl))
        return Quickstart(f"{title}, {kv}", lines, self.run)

    def _serve(self, args: Sequence[str], body: dict[str, object], kv: str) -> None:
        url = f"http://127.0.0.1:{args[-1]}"
        command: list[str | Path] = [self.build.tool("llama-server"), *args, *_LOGGED]
        try:
            with (
                started(command, url, cwd=self.facts.folder, log_path=self.log),
                server.Connection(url) as connection,
            ):
                answer = connection.post("v1/chat/completions", body, timeout=_TIMEOUT)
        except ToolError as error:
            raise self._failed("llama-server", error.message) from error
        text = self.log.read_text(encoding="utf-8", errors="replace")
        if not answer["usage"]["completion_tokens"]:
            raise self._failed("llama-server", "its answer is empty")
        self._check("llama-server", parse_context(text), kv)
        if "--spec-type" in args and parse_draft(text) is None:
            raise self._failed("llama-server", "no tokens are guessed ahead")

    def _check(self, program: str, context: Context | None, kv: str) -> None:
        if context is None or not cache_check.as_asked(context, self._plan(kv)):
            raise self._failed(program, "the cache was not kept as the command says")

    def _plan(self, kv: str) -> KvPlan:
        """The cache in a type as ``ggufrq run`` keeps it, with the profile that lies beside the file."""
        plan, profile = parse_plan(kv).with_wished(None, None), self.facts.profile
        return plan.with_profile(Path(profile)) if profile is not None and plan.k_ours else plan

    def _failed(self, program: str, why: str) -> ToolError:
        return ToolError(
            f"the quickstart for {program} does not work with {self.file}: {why}",
            remedy=f"see {self.log}; --no-run prints it as not run",
        )

    def _tell(self, program: str, kv: str) -> None:
        log.say(f"running the quickstart: {program} with {self.file} and {kv}")


def _line(program: str, args: Sequence[str]) -> str:
    """A command line as people type it, on several lines where it is long."""
    lines = [program]
    for word in args:
        quoted = shlex.quote(word)
        if word.startswith("-") and len(lines[-1]) > _WIDE:
            lines[-1] += " \\"
            lines.append(f"  {quoted}")
        else:
            lines[-1] += f" {quoted}"
    return "\n".join(lines)


def _cache(plan: KvPlan) -> list[str]:
    types = ["--cache-type-k", plan.base.k.name, "--cache-type-v", plan.base.v.name]
    return ["-fa", "on", *types, *plan.arguments()[len(plan.base.arguments()) :]]
