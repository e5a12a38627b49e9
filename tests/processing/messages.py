"""Protobuf classes as protoc would generate them, made here so that no test needs protoc."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["messages"]

_Field = descriptor_pb2.FieldDescriptorProto


def _message(name: str, *fields: tuple[str, int, str]) -> descriptor_pb2.DescriptorProto:
    """`fields` are (name, type, name of the message type)."""
    made = descriptor_pb2.DescriptorProto(name=name)
    for number, (field, kind, other) in enumerate(fields, 1):
        made.field.add(name=field, number=number, type=kind, type_name=other or None, label=_Field.LABEL_OPTIONAL)
    return made


def messages(*, first: str = "", more: bool = False, other_types: bool = False) -> Any:
    """Classes by name, of a file that imports another one.

    `first` puts one more message before all others, `more` a field behind the others, `other_types` breaks readers.
    """
    pool = descriptor_pool.DescriptorPool()
    money = descriptor_pb2.FileDescriptorProto(name="shop/money.proto", package="shop", syntax="proto3")
    money.message_type.append(_message("Money", ("cents", _Field.TYPE_INT64, "")))
    pool.Add(money)
    file = descriptor_pb2.FileDescriptorProto(name="shop/order.proto", package="shop", syntax="proto3")
    file.dependency.append("shop/money.proto")
    if first:
        file.message_type.append(_message(first, ("text", _Field.TYPE_STRING, "")))
    customer = _message("Customer", ("name", _Field.TYPE_STRING, ""))
    fields = [
        ("id", _Field.TYPE_STRING if other_types else _Field.TYPE_INT64, ""),
        ("price", _Field.TYPE_MESSAGE, ".shop.Money"),
    ]
    order = _message("Order", *fields, *([("note", _Field.TYPE_STRING, "")] if more else []))
    order.nested_type.append(_message("Other", ("x", _Field.TYPE_STRING, "")))
    order.nested_type.append(_message("Line", ("sku", _Field.TYPE_STRING, "")))
    file.message_type.extend([order, customer])
    pool.Add(file)
    names = ["shop.Money", "shop.Order", "shop.Customer", "shop.Order.Line", *([f"shop.{first}"] if first else [])]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names}
