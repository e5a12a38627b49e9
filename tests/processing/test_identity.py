"""Identity: the same after every restart, and one for all processes of a host."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from semel.env import Env
from semel.errors import ConfigurationError
from semel.processing.identity import instance_id, transactional_id
from semel.settings import Settings


def test_an_instance_id_is_made_once_and_kept(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "new")
    first = instance_id(settings, Env())
    assert instance_id(settings, Env()) == first
    assert instance_id(Settings(data=tmp_path / "other"), Env()) != first
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["instance"]


def test_many_first_starts_agree(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    with ThreadPoolExecutor(16) as pool:
        assert len(set(pool.map(lambda _: instance_id(settings, Env()), range(64)))) == 1


def test_the_environments_name_wins(tmp_path: Path) -> None:
    assert instance_id(Settings(data=tmp_path, instance="blue-1"), Env()) == "blue-1"
    assert not list(tmp_path.iterdir())
    assert transactional_id("shop", "reserve", "blue-1", 2) == "shop.reserve.blue-1.2"


@pytest.mark.parametrize("name", ["a.b", "a b", "-", "x" * 65])
def test_a_name_that_would_blur_the_id_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="SEMEL_INSTANCE"):
        instance_id(Settings(instance=name), Env())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="SEMEL_DATA"):
        instance_id(Settings(data=tmp_path / "file" / "below"), Env())


def test_an_empty_file_is_not_an_identity(tmp_path: Path) -> None:
    (tmp_path / "instance").write_text("")
    with pytest.raises(ConfigurationError, match="instance"):
        instance_id(Settings(data=tmp_path), Env())
