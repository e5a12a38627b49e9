"""Duplicates at once while HTTP instances are killed: one effect, one answer, and nobody is left without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ingress import duplicates
from tests.ingress.duplicates import Plan
from tests.services.kafka import KafkaNode


@pytest.mark.timeout(300)
def test_eight_copies_of_fifty_requests_while_instances_are_killed(tmp_path: Path) -> None:
    figures = duplicates.run(Plan(keys=50, copies=8, kills=3, http=2), tmp_path)
    assert (figures.keys, figures.clients, figures.kills) == (50, 400, 3)
    assert figures.answers[202] > 0
    assert figures.answers[422] > 0


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_sixty_four_copies_of_two_thousand_requests_while_instances_are_killed(tmp_path: Path) -> None:
    figures = duplicates.run(Plan(keys=2_000, copies=64, kills=200, http=3, workers=2), tmp_path)
    assert (figures.keys, figures.clients, figures.kills) == (2_000, 128_000, 200)


@pytest.mark.soak
@pytest.mark.kafka
@pytest.mark.timeout(3600)
def test_sixty_four_copies_of_four_hundred_requests_over_apache_kafka(kafka: KafkaNode, tmp_path: Path) -> None:
    figures = duplicates.run(Plan(keys=400, copies=64, kills=40, http=3, workers=2), tmp_path, kafka.bootstrap)
    assert (figures.keys, figures.clients, figures.kills) == (400, 25_600, 40)
