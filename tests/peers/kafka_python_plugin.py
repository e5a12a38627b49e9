"""Loaded into kafka-python's own pytest: its fixtures for SASL and TLS find the brokers that run already.

The suite starts such brokers from a Kafka distribution. Here `SASL_PLAINTEXT_URI` and `SSL_URI` say where they are.
"""

from __future__ import annotations

import os
from typing import Any

import pytest


def pytest_collection_modifyitems() -> None:
    import py
    from test.integration.fixtures import KafkaFixture

    def instance(broker_id: int, **asked: Any) -> Any:
        transport = asked.get("transport", "PLAINTEXT")
        host, _, port = os.environ[f"{transport}_URI"].rpartition(":")
        found = KafkaFixture(
            host, int(port), broker_id, transport=transport, sasl_mechanism=asked.get("sasl_mechanism"), external=True
        )
        found.tmp_dir = py.path.local.mkdtemp()  # The fixture removes it.
        template = found.tmp_dir.join("template")
        module = "plain.Plain" if found.sasl_mechanism == "PLAIN" else "scram.Scram"
        template.write(
            "security.protocol={transport}\nsasl.mechanism={sasl_mechanism}\n"
            f"sasl.jaas.config=org.apache.kafka.common.security.{module}LoginModule required "
            f'username="{found.broker_user}" password="{found.broker_password}";\n'
        )
        found.test_resource = lambda name: template.strpath  # The source package has no resources.
        found.ssl_dir = os.environ["SSL_DIR"]
        found.start = lambda: None
        found.open()
        return found

    pytest.MonkeyPatch().setattr(KafkaFixture, "instance", instance)
