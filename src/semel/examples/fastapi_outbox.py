"""A FastAPI and SQLAlchemy app that publishes its orders: what Semel adds to it is marked with `# +`.

    semel migrate fastapi_outbox:semel
    uvicorn fastapi_outbox:api &  semel relay fastapi_outbox:semel --kafka HOST:PORT

An order is in Kafka if and only if it is in the database, and the orders of one customer stay in their order.
"""

import os
from collections.abc import Iterator
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from semel import App  # +
from semel.outbox import enqueue_in  # +

URL = os.environ.get("SHOP_DATABASE", "sqlite:///orders.db")


class Base(DeclarativeBase):
    pass


class Customer(Base):
    __tablename__ = "customer"
    id: Mapped[str] = mapped_column(primary_key=True)
    credit: Mapped[int]


class Order(Base):
    __tablename__ = "customer_order"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[str]
    cents: Mapped[int]


class NewOrder(BaseModel):
    customer_id: str
    cents: int


class Placed(NewOrder):  # +
    id: int  # +


semel = App("orders")  # +
placed = semel.topic("orders.placed", key=str, value=dict[str, int | str])  # +
semel.database(URL, outbox=True)  # +

engine = create_engine(URL.replace("postgresql://", "postgresql+psycopg://"))
api = FastAPI()


def database() -> Iterator[Session]:
    with Session(engine) as session:
        yield session


@api.post("/orders", status_code=201)
def place(new: NewOrder, session: Annotated[Session, Depends(database)]) -> dict[str, int]:
    # The customer's row is locked first: it is the key of the record, and gives the orders their order.
    customer = session.scalar(select(Customer).where(Customer.id == new.customer_id).with_for_update())
    if customer is None or customer.credit < new.cents:
        raise HTTPException(409, "this customer has not so much credit")
    customer.credit -= new.cents
    order = Order(customer_id=new.customer_id, cents=new.cents)
    session.add(order)
    session.flush()
    event = Placed(id=order.id, customer_id=new.customer_id, cents=new.cents)  # +
    enqueue_in(session, placed.record(new.customer_id, event.model_dump()))  # +
    session.commit()
    return {"order": order.id}
