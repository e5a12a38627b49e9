"""The yardstick: confluent-kafka by hand, one transaction every 100 ms, with offsets and the group's metadata."""

from __future__ import annotations

import time
from typing import Any

import order as bench
from confluent_kafka import Consumer, Message, Producer


def producer() -> Producer:
    settings: dict[str, Any] = {"bootstrap.servers": bench.BOOTSTRAP, "enable.idempotence": True, "linger.ms": 5}
    if bench.EXACTLY_ONCE:
        settings["transactional.id"] = f"{bench.GROUP}-0"
    made = Producer(settings)
    if bench.EXACTLY_ONCE:
        made.init_transactions(30)
    return made


def consumer() -> Consumer:
    made = Consumer(
        {
            "bootstrap.servers": bench.BOOTSTRAP,
            "group.id": bench.GROUP,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "fetch.queue.backoff.ms": 5,  # The default of a second starves a loop as fast as this one.
        }
    )
    made.subscribe([bench.SOURCE])
    return made


def send(to: Producer, messages: list[Message]) -> None:
    decode, work, encode, produce, target = bench.decode, bench.work, bench.encode, to.produce, bench.TARGET
    for message in messages:
        if message.error():
            raise SystemExit(str(message.error()))
        value = encode(work(decode(message.value())))
        while True:
            try:
                produce(target, value, message.key())
                break
            except BufferError:
                to.poll(0.05)
    to.poll(0)


def commit(reader: Consumer, writer: Producer) -> None:
    offsets = [at for at in reader.position(reader.assignment()) if at.offset >= 0]
    if bench.EXACTLY_ONCE:
        writer.send_offsets_to_transaction(offsets, reader.consumer_group_metadata(), 30)
        writer.commit_transaction(30)
    else:
        writer.flush(30)
        reader.commit(offsets=offsets, asynchronous=False)


def main() -> None:
    stopping = bench.stopping()
    writer, reader = producer(), consumer()
    interval = bench.INTERVAL_MS / 1000
    is_open, deadline = False, 0.0
    while not stopping.is_set():
        left = deadline - time.monotonic() if is_open else 0.05
        messages = reader.consume(1000, max(0.0, left))
        if messages:
            if not is_open:
                is_open, deadline = True, time.monotonic() + interval
                if bench.EXACTLY_ONCE:
                    writer.begin_transaction()
            send(writer, messages)
        if is_open and time.monotonic() >= deadline:
            commit(reader, writer)
            is_open = False
    if is_open:
        commit(reader, writer)
    reader.close()


if __name__ == "__main__":
    main()
