"""bench/metal.py, all but the Mac: what it reads and what it writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ggufrq.base.errors import ToolError, UsageError

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import metal

# lines of test-backend-ops on the CPU, one of them made to fail, and upstream's text for what is not there
OUTPUT = """\
Testing 2 devices

Backend 1/2: MTL0
  GET_ROWS(type=iso3,n=256,m=5,r=4,be1=1,be2=1,v=0,vs0=0,offset_cols=0): \x1b[1;32mOK\x1b[0m
  GET_ROWS(type=iso3,n=256,m=5,r=4,be1=7,be2=1,v=1,vs0=1,offset_cols=0): \x1b[1;32mOK\x1b[0m
  GET_ROWS(type=iso2,n=256,m=5,r=4,be1=1,be2=1,v=0,vs0=0,offset_cols=0): \
[GET_ROWS] NMSE = 0.5 > 0.0000001 \x1b[1;31mFAIL\x1b[0m
  FLASH_ATTN_EXT(hsk=128,hsv=128,nh=2,type_K=iso3,type_V=planar4): not supported [MTL0]
  2/3 tests passed
  Backend MTL0: \x1b[1;31mFAIL\x1b[0m
Backend 2/2: CPU
  Skipping CPU backend
"""


def test_outcomes_are_counted() -> None:
    assert metal.parse_outcome(OUTPUT) == metal.Outcome(agree=2, differ=1, refused=1)


def test_a_run_without_a_gpu_is_no_success() -> None:
    with pytest.raises(ToolError, match="tested no GPU"):
        metal.parse_outcome("Backend 1/1: CPU\n  Skipping CPU backend\n1/1 backends passed\n")


def test_the_document_has_a_place_for_the_table() -> None:
    document = metal.DOCUMENT.read_text(encoding="utf-8")
    outcomes = {"SET_ROWS": metal.Outcome(9, 0, 1)}
    speeds = {"f16": {0: (1234.5, 67.8), 4096: (999.0, 50.0)}, "iso3": {0: (1.0, 2.0), 4096: (3.0, 4.0)}}
    section = metal.render(outcomes, speeds, "Apple M9", 3)
    written = metal.insert(document, section)
    assert "| SET_ROWS | 9 | 0 | 1 |" in written and "| f16 | 1,234 | 999 | 67.8 | 50.0 |" in written
    assert metal.insert(written, section) == written
    with pytest.raises(UsageError, match="no place"):
        metal.insert("# another document\n", section)
