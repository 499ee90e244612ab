"""Every backend that can run here, for the one suite that each of them has to pass."""

from __future__ import annotations

import pytest

import backends
from tests.backends.support import opened


@pytest.fixture(params=backends.NAMES)
def backend(request):
    """Each backend present, in float32."""
    return opened(request.param, "float32")


@pytest.fixture(params=backends.NAMES)
def low(request):
    """low(precision): each backend present, in the half precision that the test names."""
    return lambda precision: opened(request.param, precision)
