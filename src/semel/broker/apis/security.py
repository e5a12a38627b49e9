"""APIs of logins, users and access rules (KIP-43, KIP-554, KIP-140, KIP-290)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from semel.broker.exchange import Answer, Api, Fields, Request
from semel.broker.security.acls import (
    CLUSTER_NAME,
    Acl,
    AclFilter,
    Authorizer,
    Operation,
    Pattern,
    Permission,
    Resource,
)
from semel.broker.security.users import USERS_MAX
from semel.errors import ErrorCode
from semel.wire.scram import ITERATIONS_MAX, ITERATIONS_MIN, MECHANISMS, derive

if TYPE_CHECKING:
    from semel.broker.node import Node

__all__ = ["APIS"]

ACLS_MAX = 10_000
"""Rules of one broker; all of them are in memory and in the metadata log."""
_MECHANISM_NUMBERS = {1: "SCRAM-SHA-256", 2: "SCRAM-SHA-512"}
"""org.apache.kafka.clients.admin.ScramMechanism."""
_NO_AUTHORIZER = "No Authorizer is configured."
_REFUSED = "Cluster authorization failed."


class _Invalid(Exception):
    """Why a rule or a credential cannot be taken."""

    def __init__(self, text: str, code: ErrorCode = ErrorCode.INVALID_REQUEST) -> None:
        super().__init__(text)
        self.code = code


# --- Logins ---


def sasl_handshake(_node: Node, _request: Request) -> Answer:
    """SaslHandshake.

    Behaviour: here it comes too late or to a listener without SASL (34). Logging in is `broker.security.login`'s.
    Version notes: v0 bare tokens follow; v1 SaslAuthenticate requests follow.
    """
    return {"error_code": ErrorCode.ILLEGAL_SASL_STATE, "mechanisms": []}


def sasl_authenticate(_node: Node, _request: Request) -> Answer:
    """SaslAuthenticate.

    Behaviour: here it comes too late or to a listener without SASL (34). Logging in is `broker.security.login`'s.
    Version notes: v1 session lifetime (KIP-368); v2 flexible.
    """
    message = "SaslAuthenticate is only possible after a SaslHandshake that was accepted."
    return {"error_code": ErrorCode.ILLEGAL_SASL_STATE, "error_message": message, "auth_bytes": b""}


# --- Access rules ---


def _cluster_error(node: Node, request: Request, operation: Operation) -> Fields | None:
    """What stands against working with access rules: no authorizer, or no right."""
    if node.authorizer is None:
        return {"error_code": ErrorCode.SECURITY_DISABLED, "error_message": _NO_AUTHORIZER}
    if node.denies(request, operation, Resource.CLUSTER, CLUSTER_NAME):
        return {"error_code": ErrorCode.CLUSTER_AUTHORIZATION_FAILED, "error_message": _REFUSED}
    return None


def _filter(item: Any) -> AclFilter:
    found = AclFilter(
        item.resource_type_filter,
        item.resource_name_filter,
        item.pattern_type_filter,
        item.principal_filter,
        item.host_filter,
        item.operation,
        item.permission_type,
    )
    known = (
        found.resource in range(1, 8)
        and found.pattern in range(1, 5)
        and found.operation in range(1, 16)
        and found.permission in range(1, 4)
    )
    if not known:
        raise _Invalid("The filter has an unknown resource type, pattern type, operation or permission.")
    return found


def describe_acls(node: Node, request: Request) -> Answer:
    """DescribeAcls.

    Behaviour: the rules that match, by resource. Needs DESCRIBE on the cluster; without an authorizer: 54.
    Version notes: v1 pattern types; v2 flexible; v3 user resources.
    """
    refused = _cluster_error(node, request, Operation.DESCRIBE)
    if refused is not None:
        return refused | {"resources": []}
    try:
        wanted = _filter(request.body)
    except _Invalid as error:
        return {"error_code": error.code, "error_message": str(error), "resources": []}
    found = sorted(acl for acl in node.metadata.acls if wanted.matches(acl))
    return {
        "error_code": ErrorCode.NONE,
        "error_message": None,
        "resources": [
            {
                "resource_type": resource,
                "resource_name": name,
                "pattern_type": pattern,
                "acls": [
                    {
                        "principal": acl.principal,
                        "host": acl.host,
                        "operation": acl.operation,
                        "permission_type": acl.permission,
                    }
                    for acl in acls
                ],
            }
            for (resource, name, pattern), acls in groupby(found, key=lambda acl: acl[:3])
        ],
    }


def _new_acl(item: Any) -> Acl:
    try:
        acl = Acl(
            Resource(item.resource_type),
            item.resource_name,
            Pattern(item.resource_pattern_type),
            item.principal,
            item.host,
            Operation(item.operation),
            Permission(item.permission_type),
        )
    except ValueError as error:
        raise _Invalid(f"The access rule cannot be taken: {error}.") from None
    if acl.resource in (Resource.UNKNOWN, Resource.ANY):
        raise _Invalid(f"Invalid resourceType {acl.resource.name}")
    if acl.pattern not in (Pattern.LITERAL, Pattern.PREFIXED):
        raise _Invalid(f"Invalid patternType {acl.pattern.name}")
    if acl.operation in (Operation.UNKNOWN, Operation.ANY):
        raise _Invalid(f"Invalid operation {acl.operation.name}")
    if acl.permission not in (Permission.ALLOW, Permission.DENY):
        raise _Invalid(f"Invalid permissionType {acl.permission.name}")
    if not acl.name:
        raise _Invalid("Resource name should not be empty")
    if acl.resource is Resource.CLUSTER and acl.name != CLUSTER_NAME:
        raise _Invalid(f"The only valid name for the CLUSTER resource is {CLUSTER_NAME}")
    kind, colon, name = acl.principal.partition(":")
    if not (kind and colon and name):
        raise _Invalid(f"Could not parse principal from `{acl.principal}`: it is not of the form User:<name>.")
    return acl


def create_acls(node: Node, request: Request) -> Answer:
    """CreateAcls.

    Behaviour: each rule is taken or refused (42) by itself; one that is there already is no error. Durable when
    answered, and in force for the next request. Needs ALTER on the cluster; without an authorizer: 54.
    Version notes: v1 pattern types; v2 flexible; v3 user resources.
    """
    creations = request.body.creations
    refused = _cluster_error(node, request, Operation.ALTER)
    if refused is not None:
        return {"results": [refused for _ in creations]}
    results: list[Fields] = []
    fresh: dict[Acl, None] = {}
    for item in creations:
        try:
            acl = _new_acl(item)
            if acl not in node.metadata.acls:
                if len(node.metadata.acls) + len(fresh) >= ACLS_MAX:
                    raise _Invalid(f"This broker keeps at most {ACLS_MAX} access rules.")
                fresh[acl] = None
        except _Invalid as error:
            results.append({"error_code": error.code, "error_message": str(error)})
        else:
            results.append({"error_code": ErrorCode.NONE, "error_message": None})
    if fresh:
        node.metadata.add_acls(list(fresh))
        _told(node).changed()
    return {"results": results}


def delete_acls(node: Node, request: Request) -> Answer:
    """DeleteAcls.

    Behaviour: each filter deletes the rules that match it, and names them. Needs ALTER on the cluster; without an
    authorizer: 54.
    Version notes: v1 pattern types; v2 flexible; v3 user resources.
    """
    filters = request.body.filters
    refused = _cluster_error(node, request, Operation.ALTER)
    if refused is not None:
        return {"filter_results": [refused | {"matching_acls": []} for _ in filters]}
    results: list[Fields] = []
    gone: dict[Acl, None] = {}
    for item in filters:
        try:
            wanted = _filter(item)
        except _Invalid as error:
            results.append({"error_code": error.code, "error_message": str(error), "matching_acls": []})
            continue
        found = sorted(acl for acl in node.metadata.acls if acl not in gone and wanted.matches(acl))
        gone.update(dict.fromkeys(found))
        answer = [_deleted(acl) for acl in found]
        results.append({"error_code": ErrorCode.NONE, "error_message": None, "matching_acls": answer})
    if gone:
        node.metadata.delete_acls(list(gone))
        _told(node).changed()
    return {"filter_results": results}


def _deleted(acl: Acl) -> Fields:
    return {
        "error_code": ErrorCode.NONE,
        "error_message": None,
        "resource_type": acl.resource,
        "resource_name": acl.name,
        "pattern_type": acl.pattern,
        "principal": acl.principal,
        "host": acl.host,
        "operation": acl.operation,
        "permission_type": acl.permission,
    }


def _told(node: Node) -> Authorizer:
    assert node.authorizer is not None, "rules are changed only where there is an authorizer"
    return node.authorizer


# --- Users ---


def describe_user_scram_credentials(node: Node, request: Request) -> Answer:
    """DescribeUserScramCredentials (KIP-554).

    Behaviour: mechanisms and iterations of each user, never more. No users named means all; an unknown one is 91, one
    that is named twice 92. Needs DESCRIBE on the cluster.
    """
    if node.denies(request, Operation.DESCRIBE, Resource.CLUSTER, CLUSTER_NAME):
        code = ErrorCode.CLUSTER_AUTHORIZATION_FAILED
        return {"error_code": code, "error_message": _REFUSED, "results": []}
    asked = [item.name for item in request.body.users or ()]
    everybody = sorted({user for user, _ in node.metadata.credentials})
    results = [_described(node, user, asked) for user in dict.fromkeys(asked or everybody)]
    return {"error_code": ErrorCode.NONE, "error_message": None, "results": results}


def _described(node: Node, user: str, asked: Sequence[str]) -> Fields:
    answer: Fields = {"user": user, "error_code": ErrorCode.NONE, "error_message": None, "credential_infos": []}
    if asked.count(user) > 1:
        message = f"Cannot describe SCRAM credentials for the same user twice in a single request: {user}"
        return answer | {"error_code": ErrorCode.DUPLICATE_RESOURCE, "error_message": message}
    known = node.metadata.credentials
    infos = [
        {"mechanism": number, "iterations": known[user, mechanism].iterations}
        for number, mechanism in _MECHANISM_NUMBERS.items()
        if (user, mechanism) in known
    ]
    if not infos:
        message = f"Attempt to describe a user credential that does not exist: {user}"
        return answer | {"error_code": ErrorCode.RESOURCE_NOT_FOUND, "error_message": message}
    return answer | {"credential_infos": infos}


def alter_user_scram_credentials(node: Node, request: Request) -> Answer:
    """AlterUserScramCredentials (KIP-554).

    Behaviour: each user's change is taken or refused by itself: 93 for what cannot be a credential, 91 for deleting
    what is not there, 92 for a user who stands twice, 33 for an unknown mechanism. The password never comes here, only
    its salted hash. Connections that are logged in stay. Needs ALTER on the cluster.
    """
    body = request.body
    users = [item.name for item in (*body.deletions, *body.upsertions)]
    keys = [(item.name, item.mechanism) for item in (*body.deletions, *body.upsertions)]
    if node.denies(request, Operation.ALTER, Resource.CLUSTER, CLUSTER_NAME):
        failed: Fields = {"error_code": ErrorCode.CLUSTER_AUTHORIZATION_FAILED, "error_message": _REFUSED}
        return {"results": [{"user": user} | failed for user in dict.fromkeys(users)]}
    errors: dict[str, _Invalid] = {}
    for user, mechanism in keys:
        if keys.count((user, mechanism)) > 1:
            text = "A user credential cannot be altered twice in the same request"
            errors[user] = _Invalid(text, ErrorCode.DUPLICATE_RESOURCE)
    for check, items in ((_check_deletion, body.deletions), (_check_upsertion, body.upsertions)):
        for item in items:
            try:
                check(node, item)
            except _Invalid as error:
                errors.setdefault(item.name, error)
    for item in body.deletions:
        if item.name not in errors:
            node.metadata.delete_credential(item.name, _MECHANISM_NUMBERS[item.mechanism])
    for item in body.upsertions:
        if item.name not in errors:
            mechanism = _MECHANISM_NUMBERS[item.mechanism]
            credential = derive(mechanism, bytes(item.salted_password), bytes(item.salt), item.iterations)
            node.metadata.put_credential(item.name, mechanism, credential)
    return {
        "results": [
            {
                "user": user,
                "error_code": errors[user].code if user in errors else ErrorCode.NONE,
                "error_message": str(errors[user]) if user in errors else None,
            }
            for user in dict.fromkeys(users)
        ]
    }


def _check_user(item: Any) -> str:
    """The mechanism. Raises `_Invalid`."""
    if not item.name:
        raise _Invalid("Username must not be empty", ErrorCode.UNACCEPTABLE_CREDENTIAL)
    mechanism = _MECHANISM_NUMBERS.get(item.mechanism)
    if mechanism is None:
        raise _Invalid("Unknown SCRAM mechanism", ErrorCode.UNSUPPORTED_SASL_MECHANISM)
    return mechanism


def _check_deletion(node: Node, item: Any) -> None:
    if (item.name, _check_user(item)) not in node.metadata.credentials:
        raise _Invalid("Attempt to delete a user credential that does not exist", ErrorCode.RESOURCE_NOT_FOUND)


def _check_upsertion(node: Node, item: Any) -> None:
    mechanism = _check_user(item)
    unacceptable = ErrorCode.UNACCEPTABLE_CREDENTIAL
    if item.iterations < ITERATIONS_MIN:
        raise _Invalid("Too few iterations", unacceptable)
    if item.iterations > ITERATIONS_MAX:
        raise _Invalid("Too many iterations", unacceptable)
    if not item.salt or not item.salted_password:
        raise _Invalid("The salt and the salted password must not be empty", unacceptable)
    if len(item.name) > 255 or len(item.salt) > 255 or len(item.salted_password) > 255:
        raise _Invalid("The user name, the salt or the salted password is longer than 255", unacceptable)
    known = node.metadata.credentials
    if (item.name, mechanism) not in known and len(known) >= USERS_MAX * len(MECHANISMS):
        raise _Invalid(f"This broker keeps at most {USERS_MAX} users", unacceptable)


APIS = (
    Api(17, 0, 1, sasl_handshake),
    Api(29, 1, 3, describe_acls),
    Api(30, 1, 3, create_acls),
    Api(31, 1, 3, delete_acls),
    Api(36, 0, 2, sasl_authenticate),
    Api(50, 0, 0, describe_user_scram_credentials),
    Api(51, 0, 0, alter_user_scram_credentials),
)
