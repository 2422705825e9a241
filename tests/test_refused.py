"""Networks without a limit, or beyond reach, are refused in the right words, naming the guilty line (refused.py)."""

import pytest

import anywidth as aw
import refused

ERRORS = {
    "limit": aw.NoLimitError,
    "structure": aw.NoLimitError,
    "unsupported": aw.UnsupportedError,
    "input": (aw.InputError, TypeError),
}


@pytest.mark.parametrize("entry", refused.REFUSED, ids=lambda entry: entry.name)
def test_refusal(entry):
    kernel = aw.nngp if entry.kernel == "nngp" else aw.ntk
    with pytest.raises(Exception) as caught:
        kernel(entry.net)(entry.x, entry.y)
    message = str(caught.value)
    assert any(isinstance(caught.value, ERRORS[reason]) for reason in entry.reason.split("|")), repr(caught.value)
    assert not entry.missing(message), message
    assert refused.names_guilty_line(entry, message), message


@pytest.mark.parametrize("entry", [e for e in refused.REFUSED if e.kernel == "ntk"], ids=lambda entry: entry.name)
def test_only_the_ntk_is_refused(entry):
    aw.nngp(entry.net)(entry.x, entry.y)
