"""Both record codecs, for the suites that run on each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from semel.wire import codec, pycodec
from tests.services.extensions import compiled


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> codec.Codec:
    """The codec in C."""
    return compiled("semel/wire/_codec", tmp_path_factory.mktemp("codec"))


@pytest.fixture(scope="module", params=["python", "native"])
def each_codec(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything runs on the one codec, then on the other."""
    before = codec.in_use
    codec.in_use = pycodec if request.param == "python" else request.getfixturevalue("native")
    yield
    codec.in_use = before
