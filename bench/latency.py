"""Our engine at a steady rate: milliseconds from produce() to the committed output in a reader's hands.

`python bench/latency.py BOOTSTRAP TOPIC PARTITIONS RATE SECONDS` is the process that feeds: each record says when it
was made, by the machine's monotonic clock. librdkafka writes and reads; its `linger.ms` is 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import msgspec
from confluent_kafka import Consumer, Producer, TopicPartition

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.loops.order import Seen  # noqa: E402
from bench.servers import create_topic, drop_topic  # noqa: E402

__all__ = ["measure"]

PARTITIONS = 4
WARM_SECONDS = 3.0
"""At the beginning: not counted."""
_KEYS = 1_000
decode = msgspec.json.Decoder(Seen).decode
_PAD = "x" * 150
_PATIENCE = 20.0
_BURST_SECONDS = 0.001


def measure(
    bootstrap: str, rate: int, seconds: float, *, interval_ms: int = 100, objective: str = ""
) -> dict[str, float]:
    """Percentiles in milliseconds of `rate` records a second over so many seconds, and the transactions a second."""
    name = uuid.uuid4().hex[:8]
    source, target = (create_topic(bootstrap, f"{what}-{name}", PARTITIONS) for what in ("orders", "seen"))
    environment = os.environ | {
        "BOOTSTRAP": bootstrap,
        "SOURCE": source,
        "TARGET": target,
        "GROUP": f"b{name}.copy",
        "INTERVAL_MS": str(interval_ms),
        "LATENCY": objective,
    }
    loop = [sys.executable, str(Path(__file__).with_name("loops") / "semel_loop.py")]
    subprocess.run([*loop, "prepare", str(PARTITIONS)], env=environment, check=True)
    feed = [sys.executable, __file__, bootstrap, source, str(PARTITIONS), str(rate), str(WARM_SECONDS + seconds)]
    with tempfile.TemporaryFile("w+") as output:
        worker = subprocess.Popen([*loop, "0", str(PARTITIONS)], env=environment, stdout=output)
        try:
            _first(bootstrap, source, target)
            feeder = subprocess.Popen(feed)
            delays = _read(bootstrap, target, int(rate * (WARM_SECONDS + seconds)))
            assert feeder.wait(30) == 0
        finally:
            worker.terminate()
            worker.wait(30)
        output.seek(0)
        commits = sum(int(line) for line in output if line.strip().isdigit())
    for topic in (source, target):
        drop_topic(bootstrap, topic)
    counted = sorted(delays[int(rate * WARM_SECONDS) :])
    at = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    figures = {f"{name}_ms": counted[int(share * len(counted))] for name, share in at.items()}
    return figures | {"max_ms": counted[-1], "commits": commits / (WARM_SECONDS + seconds)}


def _first(bootstrap: str, source: str, target: str) -> None:
    """Have one record go through, so that everybody is there."""
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0})
    producer.produce(source, _order(0), b"k", 0)
    producer.flush(10)
    _read(bootstrap, target, 1)


def _read(bootstrap: str, topic: str, count: int) -> list[float]:
    """Milliseconds that each of the next so many records took, in the order in which they came."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": uuid.uuid4().hex,
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "fetch.queue.backoff.ms": 1,
        }
    )
    # What went through first (it says 0) stands at the beginning of one partition, and is met once more.
    consumer.assign([TopicPartition(topic, number, 0) for number in range(PARTITIONS)])
    delays: list[float] = []
    last = time.monotonic()
    while len(delays) < count:
        message = consumer.poll(0.5)
        now = time.monotonic()
        if message is None or message.error():
            assert now - last < _PATIENCE, f"{len(delays)} of {count} records came through"
            continue
        last = now
        made = decode(message.value()).id
        if made or count == 1:
            delays.append(time.monotonic_ns() / 1e6 - made / 1e6)
    consumer.close()
    return delays


def _order(made: int) -> bytes:
    return b'{"id":%20d,"amount":1,"pad":"%s"}' % (made, _PAD.encode())


def main() -> None:
    bootstrap, topic, partitions, rate, seconds = sys.argv[1:]
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0, "acks": "all"})
    began, number = time.monotonic(), 0
    while (now := time.monotonic()) - began < float(seconds):
        while number < (now - began) * int(rate):
            producer.produce(topic, _order(time.monotonic_ns()), b"k%d" % (number % _KEYS), number % int(partitions))
            number += 1
        producer.poll(0)
        time.sleep(_BURST_SECONDS)
    while number < int(int(rate) * float(seconds)):
        producer.produce(topic, _order(time.monotonic_ns()), b"k", number % int(partitions))
        number += 1
    assert producer.flush(30) == 0


if __name__ == "__main__":
    main()
