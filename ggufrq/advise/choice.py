"""What is known of a cache on a model before it is used: the one that was recommended, and a word of warning
where another one was measured as ruinous or what the model's header says foretells trouble."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ggufrq.advise import ladder
from ggufrq.base import log
from ggufrq.base.errors import GgufrqError, ModelError
from ggufrq.build.project import Build
from ggufrq.cache.kv import DEFAULT_KV, KvPlan, Sought
from ggufrq.ggufs.files import model_header
from ggufrq.ggufs.header import Header
from ggufrq.measure.verdict import RUINOUS
from ggufrq.report import numbers
from ggufrq.runtimes.fallback import fits

if TYPE_CHECKING:  # numpy takes a while to import
    from ggufrq.profile.facts import Facts

#: K in more bits than these was never seen to suffer from a bias (docs/real-models.md).
_FEW_BITS = 5.25


def recommended(model: Path, build: Build | None, name: str) -> str:
    """The types for a GGUF model, ``name`` to the user, as ``--kv`` takes them: those that ``ggufrq advise``
    recommended, or the usual ones. Says which in one line."""
    advice = ladder.kept(model, build) if build is not None else None
    found = advice["recommended"] if advice is not None else None
    if advice is None or found is None:
        why = "is not known yet" if advice is None else "does not fit as it was asked for"
        log.say(f"the best cache for this model {why}; taking {DEFAULT_KV}: ggufrq advise {name}")
        return DEFAULT_KV
    rung = next(rung for rung in advice["rungs"] if rung["kv"] == found)
    loss = "" if rung["kld"] is None else f", a mean KLD of {numbers.significant(rung['kld'], 2)}"
    log.say(f"--kv {found}, as ggufrq advise recommends for this model{loss}")
    return str(found)


def warning(model: Path, plan: KvPlan, build: Build | None, name: str) -> str | None:
    """One sentence about a plan that is bad for a GGUF model, with a better choice; None when nothing is
    known against it. What was measured counts more than what the header foretells."""
    if plan.name == "f16":
        return None
    try:
        advice = ladder.kept(model, build) if build is not None else None
        header = model_header(model)
    except GgufrqError:  # what is wrong with the file is told by what runs it
        return None
    titles = {plan.title}
    if plan.profile is Sought.AUTO:  # it was measured without where none could be made
        titles.add(plan.with_profile(None).title)
    rung = next((r for r in advice["rungs"] if r["title"] in titles), None) if advice else None
    if advice is None or rung is None or (rung["kld"] is None and rung["why_not"] is None):
        return _foretold(header, plan, name, gpu=build is not None and build.lacks_five_bits)
    best = advice["recommended"] or "q8_0"
    better = f": better --kv {shlex.quote(best)}"
    if best == rung["kv"]:
        better = "; nothing better fits what ggufrq advise was asked for"
    if rung["why_not"] is not None:
        why = rung["why_not"].removeprefix(f"{rung['title']}: ")
        return f"{plan.name} cannot be used on this model ({why}){better}"
    if rung["words"] != RUINOUS:
        return None
    loss = numbers.significant(rung["kld"], 2)
    return f"{plan.name} was measured as ruinous on this model, a mean KLD of {loss}{better}"


def _foretold(header: Header, plan: KvPlan, name: str, *, gpu: bool) -> str | None:
    from ggufrq.profile.facts import Facts, has_sinks

    facts = Facts(header.values)
    names = [tensor.name for tensor in header.tensors]
    k = min((pair.k for pair in plan.pairs), key=lambda kind: kind.bits)
    biased = any(tensor.endswith(("attn_k.bias", "attn_qkv.bias")) for tensor in names)
    can_be_made = _is_known(facts)
    profiled = can_be_made and plan.profile is not None and k.ours
    takes_out = can_be_made and facts.mean_is_exact(names)
    if biased and k.bits <= _FEW_BITS and not (profiled and takes_out):
        usable = takes_out and fits(facts.values, DEFAULT_KV, gpu=gpu)
        better = f"--kv {DEFAULT_KV} with its profile" if usable else "--kv q8_0"
        said = f"{k.name} without a profile may turn to noise, as it does in Qwen2.5"
        if profiled:
            beside = "attention sinks" if has_sinks(names) else "capped scores"
            said += f", and no profile can take out beside {beside}"
        return f"keys of this model have a bias, which {said}: better {better}"
    what = "attention sinks" if has_sinks(names) else facts.architecture if facts.listed("sensitive") else ""
    if what and (k.bits < 16 or any(pair.v.bits < 16 for pair in plan.pairs)):
        return (
            f"models with {what} lose more than most, even with q8_0: ggufrq advise {name} measures it, "
            "--kv f16 loses nothing"
        )
    return None


def _is_known(facts: Facts) -> bool:
    """Whether a profile can be made from the weights of such a model."""
    try:
        _ = facts.pairing
    except ModelError:
        return False
    return True
