from __future__ import annotations

import pytest

from ggufrq.base import errors


def test_every_error_has_its_own_exit_code() -> None:
    classes = [errors.GgufrqError, *errors.GgufrqError.__subclasses__()]
    codes = [kind.exit_code for kind in classes]
    assert sorted(codes) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_message_and_remedy() -> None:
    with pytest.raises(errors.GgufrqError, match="it is broken") as caught:
        raise errors.ModelError("it is broken", remedy="mend it")
    assert caught.value.remedy == "mend it"
    assert str(caught.value) == "it is broken"
