"""Debian's kcat (librdkafka 2.0.2) at the work people use it for."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer

from semel.broker.config import BrokerConfig
from tests.conftest import unavailable
from tests.peers.acquire import Unavailable, debian_root
from tests.peers.outcomes import Verdict, settle
from tests.peers.serve import ConfiguredBroker

pytestmark = [pytest.mark.peers, pytest.mark.timeout(300)]


class Kcat:
    """The program, unpacked from its Debian package, against one broker."""

    def __init__(self, root: Path, bootstrap: str) -> None:
        self._root = root
        self.bootstrap = bootstrap

    def __call__(self, *arguments: str, stdin: str = "", code: int = 0) -> str:
        libraries = self._root / "usr/lib/x86_64-linux-gnu"
        done = subprocess.run(
            [str(self._root / "usr/bin/kcat"), "-b", self.bootstrap, *arguments],
            input=stdin,
            env=os.environ | {"LD_LIBRARY_PATH": str(libraries)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, f"exit code {done.returncode}: {done.stdout[-300:]} {done.stderr[-600:]}"
        return done.stdout

    def topic(self) -> str:
        return f"kcat-{uuid.uuid4().hex[:8]}"


def metadata(kcat: Kcat) -> None:
    topic = kcat.topic()
    kcat("-P", "-t", topic, stdin="x\n")
    found = json.loads(kcat("-L", "-J"))
    assert [broker["id"] for broker in found["brokers"]] == [1]
    assert len(next(item for item in found["topics"] if item["topic"] == topic)["partitions"]) == 4


def produce_and_consume_with_keys_and_headers(kcat: Kcat) -> None:
    topic = kcat.topic()
    kcat("-P", "-t", topic, "-p", "2", "-K:", "-H", "a=1", stdin="k1:v1\nk2:v2\n")
    shown = kcat("-C", "-t", topic, "-e", "-q", "-o", "beginning", "-f", "%p %o %k %s %h\\n")
    assert shown.splitlines() == ["2 0 k1 v1 a=1", "2 1 k2 v2 a=1"]


def codecs(kcat: Kcat) -> None:
    topic = kcat.topic()
    lines = [f"line {number}" for number in range(500)]
    for codec in ("gzip", "snappy", "lz4", "zstd"):
        kcat("-P", "-t", topic, "-p", "0", "-z", codec, stdin="\n".join(lines) + "\n")
    assert kcat("-C", "-t", topic, "-e", "-q").splitlines() == lines * 4


def offsets_from_the_end_and_by_time(kcat: Kcat) -> None:
    topic = kcat.topic()
    kcat("-P", "-t", topic, "-p", "0", stdin="".join(f"{number}\n" for number in range(20)))
    assert kcat("-C", "-t", topic, "-p", "0", "-o", "-3", "-e", "-q").split() == ["17", "18", "19"]
    assert kcat("-Q", "-t", f"{topic}:0:-1").strip().endswith("offset 20")
    assert kcat("-Q", "-t", f"{topic}:0:1").strip().endswith("offset 0")
    assert len(kcat("-C", "-t", topic, "-o", "s@1000", "-o", "e@99999999999999", "-e", "-q").split()) == 20


def consumer_group(kcat: Kcat) -> None:
    topic, group = kcat.topic(), kcat.topic()
    kcat("-P", "-t", topic, stdin="".join(f"{number}\n" for number in range(100)))
    first = kcat("-G", group, "-q", "-e", "-X", "auto.offset.reset=earliest", topic)
    assert sorted(map(int, first.split())) == list(range(100))
    kcat("-P", "-t", topic, stdin="new\n")
    assert kcat("-G", group, "-q", "-e", "-X", "auto.offset.reset=earliest", topic).split() == ["new"]


def committed_records_alone(kcat: Kcat) -> None:
    topic = kcat.topic()
    producer = Producer({"bootstrap.servers": kcat.bootstrap, "transactional.id": topic})
    producer.init_transactions(30)
    for value, commit in ((b"kept", True), (b"dropped", False), (b"kept too", True)):
        producer.begin_transaction()
        producer.produce(topic, value, partition=0)
        producer.flush(30)
        producer.commit_transaction(30) if commit else producer.abort_transaction(30)
    read = ("-C", "-t", topic, "-p", "0", "-e", "-q", "-X")
    assert kcat(*read, "isolation.level=read_committed").splitlines() == ["kept", "kept too"]
    assert kcat(*read, "isolation.level=read_uncommitted").splitlines() == ["kept", "dropped", "kept too"]


def tombstones(kcat: Kcat) -> None:
    topic = kcat.topic()
    kcat("-P", "-t", topic, "-p", "0", "-K:", "-Z", stdin="key:\n")
    found = json.loads(kcat("-C", "-t", topic, "-e", "-q", "-J"))
    assert (found["key"], found["payload"]) == ("key", None)


def idempotent_producer(kcat: Kcat) -> None:
    topic = kcat.topic()
    lines = [str(number) for number in range(3000)]
    kcat("-P", "-t", topic, "-p", "0", "-X", "enable.idempotence=true", stdin="\n".join(lines) + "\n")
    assert kcat("-C", "-t", topic, "-e", "-q").splitlines() == lines


CHECKS: tuple[Callable[[Kcat], None], ...] = (
    metadata,
    produce_and_consume_with_keys_and_headers,
    codecs,
    offsets_from_the_end_and_by_time,
    consumer_group,
    committed_records_alone,
    tombstones,
    idempotent_producer,
)


@pytest.fixture
def kcat(tmp_path: Path) -> Iterator[Kcat]:
    try:
        root = debian_root("kcat", "librdkafka1", "libyajl2")
    except Unavailable as why:
        unavailable("kcat", str(why))
        raise
    broker = ConfiguredBroker(tmp_path / "data", BrokerConfig())
    broker.start()
    yield Kcat(root, broker.bootstrap)
    broker.stop()


def test_kcat(kcat: Kcat) -> None:
    verdicts = {}
    for check in CHECKS:
        try:
            check(kcat)
            verdicts[check.__name__] = Verdict("passed")
        except (AssertionError, ValueError, StopIteration, subprocess.TimeoutExpired) as problem:
            verdicts[check.__name__] = Verdict("failed", f"{type(problem).__name__}: {problem}"[:600])
    settle("kcat", "Debian 12's kcat 1.7.1", verdicts)
