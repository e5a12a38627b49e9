"""What the broker knows beside the logs: cluster id, topics with their ids and settings, reserved producer ids, users
and access rules.

Kept in one file, `metadata.log`: one line a change, `<crc32 of the JSON, 8 hex digits> <JSON>`. A change is on disk
(fsync) before its method returns. Changes are rare, so the file is rewritten as it stands at each start, which also
drops deleted topics and a torn last line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from semel.broker.security.acls import Acl, Operation, Pattern, Permission, Resource
from semel.disk import disk
from semel.errors import ConfigurationError, ErrorCode
from semel.failpoints import failpoint
from semel.log.errors import LogError, storage_error
from semel.wire.scram import ScramCredential

__all__ = ["PRODUCER_ID_BLOCK", "MetadataStore", "TopicInfo"]

PRODUCER_ID_BLOCK = 1000
"""Producer ids are reserved in blocks before use, as Kafka does: a restart skips the rest and never repeats one."""


@dataclass(frozen=True, slots=True)
class TopicInfo:
    """One topic. `configs` holds only what was set, not the defaults."""

    name: str
    topic_id: UUID
    partitions: int
    configs: Mapping[str, str] = field(default_factory=dict)

    @property
    def internal(self) -> bool:
        """Whether only the broker may write here."""
        return self.name in ("__transaction_state", "__consumer_offsets")


class MetadataStore:
    """The store; one process at a time (the broker locks its directory)."""

    def __init__(self, path: Path, new_cluster_id: str) -> None:
        """Read the store at `path`, or begin it. Raises `ConfigurationError` when it is damaged before its end."""
        self._path = path
        self.cluster_id = new_cluster_id
        self.topics: dict[str, TopicInfo] = {}
        self.credentials: dict[tuple[str, str], ScramCredential] = {}
        """Verifiers by (user, mechanism)."""
        self.acls: dict[Acl, None] = {}
        """A set that keeps its order."""
        self.configs: dict[tuple[int, str], Mapping[str, str]] = {}
        """What was set for brokers and groups, by resource type and name."""
        self._next_producer_id = 0
        self._reserved_until = 0
        self._failure = ""
        try:
            for change in _read(path):
                self._apply(change)
            self._next_producer_id = self._reserved_until
            self._file = self._rewrite()
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
            raise ConfigurationError(
                f"{path} is damaged: a line has the right checksum, but says what no version of Semel writes "
                f"({problem!r}). Restore the file from a backup, or start with an empty data directory."
            ) from problem

    def __repr__(self) -> str:
        return f"<MetadataStore {self._path}, {len(self.topics)} topics>"

    def close(self) -> None:
        """Close the file; everything is on disk already."""
        disk.close(self._file)

    def put_topic(self, info: TopicInfo) -> None:
        """Create a topic or replace its settings and number of partitions."""
        self._write(_topic_change(info))

    def delete_topic(self, name: str) -> None:
        """Forget a topic. Raises `KeyError` when there is none of this name."""
        if name not in self.topics:
            raise KeyError(name)
        self._write({"delete": name})

    def set_partitions(self, name: str, partitions: int) -> TopicInfo:
        """Give a topic more partitions."""
        info = replace(self.topics[name], partitions=partitions)
        self.put_topic(info)
        return info

    def put_credential(self, user: str, mechanism: str, credential: ScramCredential) -> None:
        """Give a user a password, or another one."""
        self._write(_credential_change(user, mechanism, credential))

    def delete_credential(self, user: str, mechanism: str) -> None:
        """Forget a user's password. Raises `KeyError` when there is none."""
        if (user, mechanism) not in self.credentials:
            raise KeyError(user)
        self._write({"no_credential": [user, mechanism]})

    def add_acls(self, acls: Sequence[Acl]) -> None:
        """Add rules, all or none; those that are there already stay."""
        self._write({"acls": acls})

    def delete_acls(self, acls: Sequence[Acl]) -> None:
        """Delete rules, all or none."""
        self._write({"no_acls": acls})

    def put_configs(self, kind: int, name: str, configs: Mapping[str, str]) -> None:
        """Replace what is set for a broker or group; nothing set is nothing kept."""
        self._write(_configs_change(kind, name, configs))

    def new_producer_id(self) -> int:
        """A producer id that was never given out before and never will be again."""
        if self._next_producer_id == self._reserved_until:
            self._write({"producer_ids": self._reserved_until + PRODUCER_ID_BLOCK})
        self._next_producer_id += 1
        return self._next_producer_id - 1

    def _apply(self, change: Mapping[str, Any]) -> None:
        """Let a change count, as a whole or, with an exception, not at all: each case ends in its one assignment."""
        if "topic" in change:
            info = TopicInfo(change["topic"], UUID(change["id"]), change["partitions"], change["configs"])
            self.topics[info.name] = info
        elif "delete" in change:
            del self.topics[change["delete"]]
        elif "configs_of" in change:
            if change["configs"]:
                self.configs[change["configs_of"], change["name"]] = change["configs"]
            else:
                self.configs.pop((change["configs_of"], change["name"]), None)
        elif "producer_ids" in change:
            self._reserved_until = change["producer_ids"]
        elif "acls" in change:
            self.acls = self.acls | dict.fromkeys(map(_acl, change["acls"]))
        elif "no_acls" in change:
            gone = set(map(_acl, change["no_acls"]))
            self.acls = {acl: None for acl in self.acls if acl not in gone}
        elif "credential" in change:
            user, mechanism = change["credential"]
            self.credentials[user, mechanism] = _credential(change)
        elif "no_credential" in change:
            user, mechanism = change["no_credential"]
            del self.credentials[user, mechanism]
        elif "cluster_id" in change:
            self.cluster_id = change["cluster_id"]
        else:
            raise ConfigurationError(
                f"{self._path} has a change that this version of Semel does not know: {sorted(change)}."
            )

    def _write(self, change: Mapping[str, Any]) -> None:
        """Make a change durable, then let it count. Raises `LogError` KAFKA_STORAGE_ERROR: it was not made.

        After a failed sync no change is taken any more: the kernel forgets what it could not write, so that the next
        sync may succeed and mean nothing.
        """
        if self._failure:
            raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, self._failure)
        data = _line(change)
        try:
            size = disk.size(self._file)
            failpoint("broker.before_metadata", self._file, data, size)
            written = disk.pwrite(self._file, data, size)
            if written != len(data):
                disk.truncate(self._file, size)  # A torn line would stand before the next change.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as problem:
            raise storage_error(f"{self._path} cannot be written", problem) from problem
        try:
            disk.sync(self._file)
        except OSError as problem:
            self._failure = f"{self._path} could not be synced: {problem}. Restart the broker"
            with contextlib.suppress(OSError):
                disk.truncate(self._file, size)
            raise LogError(ErrorCode.KAFKA_STORAGE_ERROR, self._failure) from problem
        try:
            failpoint("broker.after_metadata")
            self._apply(change)
        except BaseException:
            self._take_back(size)
            raise

    def _take_back(self, size: int) -> None:
        """Undo a durable change that was interrupted before it counted, as by a want of memory.

        A file that says more than we know would get a next change that contradicts it, and no broker could start on it.
        """
        try:
            disk.truncate(self._file, size)
            disk.sync(self._file)
        except OSError as problem:
            self._failure = f"a change in {self._path} could not be taken back: {problem}. Restart the broker"

    def _rewrite(self) -> int:
        changes: list[Mapping[str, Any]] = [{"cluster_id": self.cluster_id}, {"producer_ids": self._reserved_until}]
        changes += [_topic_change(info) for info in self.topics.values()]
        changes += [_credential_change(*key, value) for key, value in self.credentials.items()]
        if self.acls:
            changes.append({"acls": list(self.acls)})
        changes += [_configs_change(kind, name, configs) for (kind, name), configs in self.configs.items()]
        temporary = self._path.with_suffix(".new")
        file = disk.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        data = b"".join(map(_line, changes))
        if disk.pwrite(file, data, 0) != len(data):
            # A file that is cut short would be a file without the topics behind the cut, and their records would go.
            disk.close(file)
            disk.unlink(temporary)
            raise ConfigurationError(f"{temporary} cannot be written: the disk is full. Free some space on it.")
        disk.sync(file)
        failpoint("broker.before_metadata_rename")
        disk.rename(temporary, self._path)
        disk.sync_directory(self._path.parent)
        return file


def _topic_change(info: TopicInfo) -> dict[str, Any]:
    return {
        "topic": info.name,
        "id": str(info.topic_id),
        "partitions": info.partitions,
        "configs": dict(info.configs),
    }


def _acl(values: Sequence[Any]) -> Acl:
    resource, name, pattern, principal, host, operation, permission = values
    return Acl(
        Resource(resource), name, Pattern(pattern), principal, host, Operation(operation), Permission(permission)
    )


def _credential(change: Mapping[str, Any]) -> ScramCredential:
    salt, stored_key, server_key = (bytes.fromhex(change[name]) for name in ("salt", "stored_key", "server_key"))
    return ScramCredential(salt, change["iterations"], stored_key, server_key)


def _credential_change(user: str, mechanism: str, credential: ScramCredential) -> dict[str, Any]:
    return {
        "credential": [user, mechanism],
        "salt": credential.salt.hex(),
        "iterations": credential.iterations,
        "stored_key": credential.stored_key.hex(),
        "server_key": credential.server_key.hex(),
    }


def _configs_change(kind: int, name: str, configs: Mapping[str, str]) -> dict[str, Any]:
    return {"configs_of": kind, "name": name, "configs": dict(configs)}


def _line(change: Mapping[str, Any]) -> bytes:
    body = json.dumps(change, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _read(path: Path) -> Iterator[Mapping[str, Any]]:
    if not disk.exists(path):
        topics = path.with_name("topics")
        if disk.exists(topics) and disk.list(topics):
            raise ConfigurationError(
                f"{path} is missing, but {topics} holds records. "
                "Restore the file from a backup, or start with an empty data directory."
            )
        return
    lines = disk.read(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        checksum, _, body = line.partition(b" ")
        if checksum == b"%08x" % zlib.crc32(body) and body:
            yield json.loads(body)
        elif any(lines[number:]):
            raise ConfigurationError(
                f"{path} is damaged in line {number}: its checksum does not match. "
                "Restore the file from a backup, or start with an empty data directory."
            )
        # A bad last line was being written when the process died: nobody was told that the change is there.
