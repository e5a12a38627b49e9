"""Settings of Kafka's clients: from a file and from the environment, and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from semel.errors import ConfigurationError
from semel.settings import Settings

SECRET = "canary-secret"


def test_environment_has_librdkafkas_names() -> None:
    settings = Settings.from_environment(
        {
            "SEMEL_KAFKA": "kafka:9093",
            "SEMEL_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "SEMEL_KAFKA_SASL_PASSWORD": SECRET,
            "SEMEL_KAFKA_SSL_CA_LOCATION": "/etc/ca.pem",
            # What Kubernetes says about a service of the name semel-kafka.
            "SEMEL_KAFKA_PORT": "tcp://10.0.0.1:9092",
            "SEMEL_KAFKA_PORT_9092_TCP_ADDR": "10.0.0.1",
            "SEMEL_KAFKA_SERVICE_HOST": "10.0.0.1",
            # And of semel-kafka-bootstrap, as Strimzi names it.
            "SEMEL_KAFKA_BOOTSTRAP_SERVICE_PORT_TCP_CLIENTS": "9092",
            "SEMEL_KAFKA_BOOTSTRAP_PORT_9092_TCP": "tcp://10.0.0.1:9092",
            "SEMEL_KAFKA_BOOTSTRAP_PORT_9092_TCP_PROTO": "tcp",
            "SEMEL_KAFKA_BOOTSTRAP_SERVICE_HOST": "10.0.0.1",
        }
    )
    assert settings.kafka == "kafka:9093"
    assert settings.kafka_client == {
        "security.protocol": "SASL_SSL",
        "sasl.password": SECRET,
        "ssl.ca.location": "/etc/ca.pem",
    }
    assert SECRET not in repr(settings)


def test_file_is_read_and_the_environment_wins(tmp_path: Path) -> None:
    file = tmp_path / "client.properties"
    file.write_text(
        f"# a comment\nbootstrap.servers = kafka:9093\nsasl.username=app\nsasl.password={SECRET}=x\n"
        "security.protocol=\\\nSASL_SSL\n"
    )
    environment = {"SEMEL_KAFKA_CONFIG": str(file), "SEMEL_KAFKA_SASL_USERNAME": "other"}
    settings = Settings.from_environment(environment)
    assert settings.kafka == "kafka:9093"
    assert settings.kafka_client == {
        "sasl.username": "other",
        "sasl.password": f"{SECRET}=x",
        "security.protocol": "SASL_SSL",
    }
    assert Settings.from_environment(environment | {"SEMEL_KAFKA": "here:1"}).kafka == "here:1"


@pytest.mark.parametrize("content", [f"{SECRET}\n", f"=  {SECRET}\n"])
def test_wrong_line_is_named_and_not_shown(tmp_path: Path, content: str) -> None:
    file = tmp_path / "client.properties"
    file.write_text(content)
    with pytest.raises(ConfigurationError, match="line 1") as raised:
        Settings.from_environment({"SEMEL_KAFKA_CONFIG": str(file)})
    assert SECRET not in str(raised.value)


def test_file_that_is_not_there() -> None:
    with pytest.raises(ConfigurationError, match=r"none\.properties"):
        Settings.from_environment({"SEMEL_KAFKA_CONFIG": "/none.properties"})


def test_a_history_in_production_needs_a_yes() -> None:
    environment = {"SEMEL_HISTORY": "somewhere", "SEMEL_PROFILE": "production"}
    with pytest.raises(ConfigurationError, match="SEMEL_HISTORY_IN_PRODUCTION=yes"):
        Settings.from_environment(environment)
    assert Settings.from_environment({"SEMEL_HISTORY": "somewhere"}).history == "somewhere"
    allowed = Settings.from_environment({**environment, "SEMEL_HISTORY_IN_PRODUCTION": "yes"})
    assert allowed.history == "somewhere"
