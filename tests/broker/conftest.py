"""A broker without sockets for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from semel.broker.config import BrokerConfig
from tests.broker.core import Core


@pytest.fixture
def core(tmp_path: Path) -> Core:
    return Core(tmp_path)


@pytest.fixture
def core_v1(tmp_path: Path) -> Core:
    return Core(tmp_path, BrokerConfig(transaction_version=1))
