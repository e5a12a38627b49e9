"""Access rules, as Apache Kafka's StandardAuthorizer applies them. Sans-IO: the rules are kept in the metadata log.

A super user may do everything. Else a matching DENY refuses, then a matching ALLOW permits, then the answer is no
(`allow.everyone.if.no.acl.found` makes it yes for a resource that no rule names at all).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

__all__ = [
    "CLUSTER_NAME",
    "OPERATIONS_OF",
    "Acl",
    "AclFilter",
    "Authorizer",
    "Operation",
    "Pattern",
    "Permission",
    "Resource",
]

CLUSTER_NAME = "kafka-cluster"
"""The only resource of type CLUSTER."""
WILDCARD = "*"
ANYBODY = "User:*"
_REMEMBERED_MAX = 10_000
"""Decisions kept for reuse; a working set of clients, topics and groups is far smaller."""


class Resource(IntEnum):
    """What a rule protects (org.apache.kafka.common.resource.ResourceType)."""

    UNKNOWN = 0
    ANY = 1
    TOPIC = 2
    GROUP = 3
    CLUSTER = 4
    TRANSACTIONAL_ID = 5
    DELEGATION_TOKEN = 6
    USER = 7


class Operation(IntEnum):
    """What is done to it (org.apache.kafka.common.acl.AclOperation)."""

    UNKNOWN = 0
    ANY = 1
    ALL = 2
    READ = 3
    WRITE = 4
    CREATE = 5
    DELETE = 6
    ALTER = 7
    DESCRIBE = 8
    CLUSTER_ACTION = 9
    DESCRIBE_CONFIGS = 10
    ALTER_CONFIGS = 11
    IDEMPOTENT_WRITE = 12
    CREATE_TOKENS = 13
    DESCRIBE_TOKENS = 14
    TWO_PHASE_COMMIT = 15


class Pattern(IntEnum):
    """How a rule's name is compared (org.apache.kafka.common.resource.PatternType)."""

    UNKNOWN = 0
    ANY = 1
    MATCH = 2
    LITERAL = 3
    PREFIXED = 4


class Permission(IntEnum):
    """What a rule says (org.apache.kafka.common.acl.AclPermissionType)."""

    UNKNOWN = 0
    ANY = 1
    DENY = 2
    ALLOW = 3


_O = Operation
_IMPLIED_BY: dict[Operation, frozenset[int]] = {
    _O.DESCRIBE: frozenset({_O.READ, _O.WRITE, _O.DELETE, _O.ALTER}),
    _O.DESCRIBE_CONFIGS: frozenset({_O.ALTER_CONFIGS}),
}
"""Being allowed one of these is being allowed the key, too; being denied one of them is not."""
OPERATIONS_OF: dict[Resource, tuple[Operation, ...]] = {
    Resource.TOPIC: (
        _O.READ,
        _O.WRITE,
        _O.CREATE,
        _O.DESCRIBE,
        _O.DELETE,
        _O.ALTER,
        _O.DESCRIBE_CONFIGS,
        _O.ALTER_CONFIGS,
    ),
    Resource.GROUP: (_O.READ, _O.DESCRIBE, _O.DELETE, _O.DESCRIBE_CONFIGS, _O.ALTER_CONFIGS),
    Resource.CLUSTER: (
        _O.CREATE,
        _O.CLUSTER_ACTION,
        _O.DESCRIBE_CONFIGS,
        _O.ALTER_CONFIGS,
        _O.IDEMPOTENT_WRITE,
        _O.ALTER,
        _O.DESCRIBE,
    ),
    Resource.TRANSACTIONAL_ID: (_O.DESCRIBE, _O.WRITE, _O.TWO_PHASE_COMMIT),
}
"""What can be done to each type of resource; the bits of the authorized-operations fields."""


class Acl(NamedTuple):
    """One rule. `name` is a whole name, a prefix, or `*`; `principal` is `User:<name>`; `host` an address or `*`."""

    resource: Resource
    name: str
    pattern: Pattern
    principal: str
    host: str
    operation: Operation
    permission: Permission


class AclFilter(NamedTuple):
    """Which rules are meant; None and ANY stand for all. Pattern MATCH: every rule that applies to `name`."""

    resource: int
    name: str | None
    pattern: int
    principal: str | None
    host: str | None
    operation: int
    permission: int

    def matches(self, acl: Acl) -> bool:
        """Whether this is one of them."""
        return (
            self.resource in (Resource.ANY, acl.resource)
            and self._names(acl)
            and self.principal in (None, acl.principal)
            and self.host in (None, acl.host)
            and self.operation in (Operation.ANY, acl.operation)
            and self.permission in (Permission.ANY, acl.permission)
        )

    def _names(self, acl: Acl) -> bool:
        if self.pattern in (Pattern.LITERAL, Pattern.PREFIXED) and self.pattern != acl.pattern:
            return False
        if self.name is None or self.name == acl.name:
            return True
        if self.pattern != Pattern.MATCH:
            return False
        return self.name.startswith(acl.name) if acl.pattern is Pattern.PREFIXED else acl.name == WILDCARD


@dataclass(frozen=True, slots=True)
class _Index:
    """Rules by what they name, so that a question looks at few of them."""

    literal: dict[tuple[int, str], list[Acl]]
    prefixed: dict[tuple[int, str], list[Acl]]
    lengths: dict[int, list[int]]
    """Lengths of the prefixes of each resource type."""

    @classmethod
    def of(cls, acls: Iterable[Acl]) -> _Index:
        literal: dict[tuple[int, str], list[Acl]] = {}
        prefixed: dict[tuple[int, str], list[Acl]] = {}
        lengths: dict[int, set[int]] = {}
        for acl in acls:
            if acl.pattern is Pattern.PREFIXED:
                prefixed.setdefault((acl.resource, acl.name), []).append(acl)
                lengths.setdefault(acl.resource, set()).add(len(acl.name))
            else:
                literal.setdefault((acl.resource, acl.name), []).append(acl)
        return cls(literal, prefixed, {resource: sorted(known) for resource, known in lengths.items()})

    def about(self, resource: Resource, name: str) -> Iterator[Acl]:
        """Every rule that applies to this resource."""
        yield from self.literal.get((resource, name), ())
        if name != WILDCARD:
            yield from self.literal.get((resource, WILDCARD), ())
        for length in self.lengths.get(resource, ()):
            if length > len(name):
                break
            yield from self.prefixed.get((resource, name[:length]), ())


class Authorizer:
    """The one place that decides. `acls` gives the rules as they stand; call `changed` when they do."""

    def __init__(
        self, acls: Callable[[], Iterable[Acl]], super_users: Sequence[str], *, allow_if_no_acl: bool = False
    ) -> None:
        self._acls = acls
        self._super_users = frozenset(super_users)
        self._allow_if_no_acl = allow_if_no_acl
        self._remembered: dict[tuple[str, str, Operation, Resource, str], bool] = {}
        self._index = _Index.of(acls())

    def __repr__(self) -> str:
        return f"<Authorizer, {len(self._super_users)} super users>"

    def changed(self) -> None:
        """The rules are others now."""
        self._index = _Index.of(self._acls())
        self._remembered.clear()

    def allows(self, principal: str, host: str, operation: Operation, resource: Resource, name: str) -> bool:
        """Whether this principal, coming from this address, may do this to that."""
        question = (principal, host, operation, resource, name)
        known = self._remembered.get(question)
        if known is None:
            if len(self._remembered) >= _REMEMBERED_MAX:
                self._remembered.clear()
            known = self._remembered[question] = self._decide(*question)
        return known

    def _decide(self, principal: str, host: str, operation: Operation, resource: Resource, name: str) -> bool:
        if principal in self._super_users:
            return True
        sufficient = {operation, Operation.ALL} | _IMPLIED_BY.get(operation, frozenset())
        known = allowed = False
        for acl in self._index.about(resource, name):
            known = True
            if acl.principal not in (principal, ANYBODY) or acl.host not in (host, WILDCARD):
                continue
            if acl.permission is Permission.ALLOW:
                allowed = allowed or acl.operation in sufficient
            elif acl.operation in (operation, Operation.ALL):
                return False
        return allowed or (not known and self._allow_if_no_acl)

    def allows_any(self, principal: str, host: str, operation: Operation, resource: Resource) -> bool:
        """Whether there is any resource of this type, existing or not, to which the principal may do this.

        Kafka's `authorizeByResourceType`: a rule that allows counts unless a denying one covers all it names.
        """
        if self.allows(principal, host, operation, resource, "hardcode"):
            return True  # A name that nobody has: super users, and whatever holds for all names.
        allowing, denying = set[tuple[Pattern, str]](), set[tuple[Pattern, str]]()
        for acl in self._acls():
            if (
                acl.resource is resource
                and acl.principal in (principal, ANYBODY)
                and acl.host in (host, WILDCARD)
                and acl.operation in (operation, Operation.ALL)
            ):
                (allowing if acl.permission is Permission.ALLOW else denying).add((acl.pattern, acl.name))
        if (Pattern.LITERAL, WILDCARD) in denying:
            return False
        if (Pattern.LITERAL, WILDCARD) in allowing:
            return True
        return any(
            pattern_and_name not in denying
            and not any((Pattern.PREFIXED, pattern_and_name[1][:end]) in denying for end in _lengths(pattern_and_name))
            for pattern_and_name in allowing
        )


def _lengths(pattern_and_name: tuple[Pattern, str]) -> range:
    return range(1, len(pattern_and_name[1]) + 1)
