"""What guessing ahead is worth, by the type of the draft's cache: the table of docs/drafts.md.

    python bench/drafts.py MODEL DRAFT|mtp [--kv iso3] [--draft-kv f16,q8_0,iso4,iso3,iso2]

MODEL and DRAFT are as ``ggufrq serve`` takes them. Four prompts of 5,000 characters of the held-out text are
continued greedily by 128 tokens each, without a draft and with one in each type. For tokens per second run it
where nothing else runs.
"""

from __future__ import annotations

import argparse
from typing import Any

from ggufrq.base import loopback, paths
from ggufrq.build.builds import require_build
from ggufrq.cache.kv import parse_kv, parse_plan
from ggufrq.drive.serve import ANY_PORT, Draft, serving
from ggufrq.make.ready import head_beside, model_file
from ggufrq.tools.programs import Programs

TEXT = paths.data_dir("texts") / "heldout.txt"
PROMPTS, CHARACTERS, APART, TOKENS = 4, 5000, 9000, 128


def generated(model: str, kv: str, draft: Draft | None) -> list[dict[str, Any]]:
    """Text and timings of each prompt."""
    text = TEXT.read_text(encoding="utf-8")
    plan, programs = parse_plan(kv).as_usual(), Programs.of_build(require_build())
    answers = []
    with serving(model_file(model), plan, programs, port=ANY_PORT, draft=draft) as running:
        for prompt in range(PROMPTS):
            body = {
                "prompt": text[prompt * APART : prompt * APART + CHARACTERS],
                "n_predict": TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
            answer = loopback.session().post(f"{running.url}/completion", json=body, timeout=600)
            answer.raise_for_status()
            answers.append(answer.json())
    return answers


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("draft", help="a model, or mtp")
    parser.add_argument("--kv", default="iso3")
    parser.add_argument("--draft-kv", default="f16,q8_0,iso4,iso3,iso2")
    args = parser.parse_args()
    print("| draft's cache | guessed | right | tokens a step | tokens/s | text as without |")
    print("|---|---|---|---|---|---|")
    plain: list[str] = []
    model = model_file(args.model, head=args.draft == "mtp")
    path = head_beside(model) if args.draft == "mtp" else model_file(args.draft, draft=True)
    for kind in (None, *args.draft_kv.split(",")):
        answers = generated(str(model), args.kv, None if kind is None else Draft(path, parse_kv(kind)))
        texts, timings = [a["content"] for a in answers], [a["timings"] for a in answers]
        plain = plain or texts
        guessed, right = (sum(t.get(key, 0) for t in timings) for key in ("draft_n", "draft_n_accepted"))
        speed = 1000 * sum(t["predicted_n"] for t in timings) / sum(t["predicted_ms"] for t in timings)
        steps = TOKENS * PROMPTS - right
        same = sum(a == b for a, b in zip(texts, plain, strict=True))
        print(
            f"| {kind or 'no draft'} | {guessed} | {right} | {TOKENS * PROMPTS / steps:.2f} | {speed:.0f} "
            f"| {same} of {PROMPTS} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
