"""Both record codecs, for the suites that run on each of them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from hatch_build import CannotBuild, build

from semel.wire import codec, pycodec
from tests.conftest import unavailable


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> codec.Codec:
    """The codec in C, compiled from the source as it is now, whatever was installed."""
    try:
        path = build(tmp_path_factory.mktemp("codec"), "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
    except CannotBuild as why:
        unavailable("the record codec in C", str(why))
    spec = spec_from_file_location("semel.wire._codec", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["python", "native"])
def each_codec(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything runs on the one codec, then on the other."""
    before = codec.in_use
    codec.in_use = pycodec if request.param == "python" else request.getfixturevalue("native")
    yield
    codec.in_use = before
