"""What is particular to the dual write with a document store: unique inserts, intents, fences, lost answers."""

from __future__ import annotations

from typing import Any

import pytest

from semel import App
from semel.dualwrite.documents.connection import DocumentDatabase, DocumentRefused
from semel.dualwrite.documents.log import LOG
from semel.dualwrite.documents.session import DocumentSession, NewDocument
from semel.dualwrite.documents.store import DocumentStore
from semel.dualwrite.store import Claim
from semel.dualwrite.target import Guard
from semel.errors import ConfigurationError, Conflict, Fatal, Fenced, OutcomeUnknown
from semel.processing.ports import free_ports
from tests.dualwrite.memory import MemoryDocuments

ORDERS = "orders"


class Place:
    """A store with a slot, and one of its owners."""

    def __init__(self) -> None:
        self.documents = MemoryDocuments()
        self.store = DocumentStore(self.documents, "bank", "documents")
        self.store.open("bank", "cluster-a", create_tables=True)
        self.slot = self.store.add("ann").slot
        self.epoch = self.store.claim(self.slot, "ann").owner_epoch
        self.session = DocumentSession(self.documents, settle_seconds=5)

    def insert(self, name: str, decision: str, *, owner: str = "ann", epoch: int | None = None, **fields: Any) -> None:
        self.session.begin()
        guard = Guard(self.slot, self.epoch if epoch is None else epoch, owner, decision)
        self.session.commit(NewDocument(ORDERS, {"_id": name, **fields}), guard)

    def there(self) -> set[str]:
        return {item["_id"] for item in self.documents.all(ORDERS) if "fence" not in item["semel"]}

    def takes_over(self) -> Claim:
        return self.store.claim(self.slot, "bob")


@pytest.fixture
def place() -> Place:
    return Place()


def test_the_document_is_the_decision(place: Place) -> None:
    place.insert("o1", "7:1", cents=5)
    assert place.documents.find(ORDERS, "o1") == {
        "_id": "o1",
        "cents": 5,
        "semel": {"slot": place.slot, "transaction": "7:1"},
    }
    place.insert("o2", "7:2")
    assert place.takes_over().prepared == "7:2"
    assert place.there() == {"o1", "o2"}


def test_who_takes_over_between_intent_and_document_fences_the_document(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zombie has said what it will insert, and inserts it after somebody else has aborted its records."""
    insert = place.documents.insert

    def late(collection: str, document: dict[str, Any]) -> bool:
        if collection == ORDERS and "transaction" in document["semel"]:
            monkeypatch.undo()
            assert place.takes_over().prepared == ""
        return insert(collection, document)

    monkeypatch.setattr(place.documents, "insert", late)
    with pytest.raises(Fenced, match="belongs to another process now"):
        place.insert("o1", "7:1")
    assert place.there() == set()
    with pytest.raises(Conflict, match=r"is the fence of a transaction whose process died.*another _id"):
        place.insert("o1", "7:2", owner="bob", epoch=place.store.claim(place.slot, "bob").owner_epoch)


def test_a_former_owner_finds_its_place_in_the_log_taken(place: Place) -> None:
    place.insert("o1", "7:1")
    place.takes_over()
    with pytest.raises(Fenced):
        place.insert("o2", "7:2")
    assert place.there() == {"o1"}


def test_a_document_that_is_there_is_no_decision(place: Place) -> None:
    place.documents.collections[ORDERS] = {"o1": {"_id": "o1", "semel": {"transaction": "of another one"}}}
    with pytest.raises(Conflict, match=r"is in orders already\. Nothing happened"):
        place.insert("o1", "7:1")
    assert place.takes_over().prepared == ""


@pytest.mark.parametrize("arrived", [True, False])
@pytest.mark.parametrize("collection", [LOG, ORDERS])
def test_an_insert_without_an_answer_is_repeated(place: Place, collection: str, arrived: bool) -> None:
    place.documents.lose = [(collection, arrived), (collection, arrived)]
    place.insert("o1", "7:1")
    assert place.documents.lose == []
    assert place.there() == {"o1"}
    place.insert("o2", "7:2")
    assert place.takes_over().prepared == "7:2"


def test_a_unique_index_without_place_is_fenced_before_anybody_believes_it(place: Place) -> None:
    """The first copy was lost on its way, and may arrive when the place is free again."""
    place.documents.unique[ORDERS] = "number"
    place.insert("o1", "7:1", number=1)
    place.documents.lose = [(ORDERS, False)]
    with pytest.raises(Conflict, match="is the fence"):
        place.insert("o2", "7:2", number=1)
    del place.documents.collections[ORDERS]["o1"]
    late = {"_id": "o2", "number": 1, "semel": {"slot": place.slot, "transaction": "7:2"}}
    assert not place.documents.insert(ORDERS, late)


def test_nobody_knows_within_the_limit_and_says_how_to_look(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.session = DocumentSession(place.documents, settle_seconds=0.1)
    insert = place.documents.insert

    def away(collection: str, document: dict[str, Any]) -> bool:
        place.documents.away = collection == ORDERS
        return insert(collection, document)

    monkeypatch.setattr(place.documents, "insert", away)
    with pytest.raises(OutcomeUnknown, match=r"document 'o1' of orders has semel.transaction '7:1' if it was done"):
        place.insert("o1", "7:1")
    place.documents.away = False
    monkeypatch.undo()
    assert place.takes_over().prepared == ""  # From here on it never will be.


def test_old_intents_go_and_claims_stay(place: Place) -> None:
    for number in range(250):
        place.insert(f"o{number}", f"7:{number}")
    kinds = [item["kind"] for item in place.documents.all(LOG)]
    assert kinds.count("claim") == 2
    assert kinds.count("intent") < 110
    assert place.takes_over().prepared == "7:249"


def test_a_transaction_without_records_tells_of_itself(place: Place) -> None:
    place.documents.lose = [(ORDERS, True)]
    for name in ("o1", "o2"):
        place.session.begin()
        place.session.commit(NewDocument(ORDERS, {"_id": name}), None)
    assert place.there() == {"o1", "o2"}
    place.session.begin()
    with pytest.raises(Conflict, match="already"):
        place.session.commit(NewDocument(ORDERS, {"_id": "o1"}), None)


def test_records_without_a_document_are_refused(place: Place) -> None:
    place.session.begin()
    with pytest.raises(Fatal, match=r"the document is what decides"):
        place.session.commit(None, Guard(place.slot, place.epoch, "ann", "7:1"))
    assert place.takes_over().prepared == ""


def test_what_is_declared_wrongly_is_refused() -> None:
    app = App("bank")
    with pytest.raises(ConfigurationError, match="is no documents that Semel knows"):
        app.documents("postgresql://host/x")
    with pytest.raises(ConfigurationError, match=r"is no SQL database. Declare it with app.documents"):
        app.database("mongodb://host/x")
    with pytest.raises(ConfigurationError, match="names no database"):
        DocumentDatabase("mongodb://127.0.0.1:1")
    app.documents("mongodb://host/x")
    with pytest.raises(ConfigurationError, match="declared twice"):
        app.documents("mongodb://host/x")


def test_one_document_a_transaction_and_nothing_else() -> None:
    app = App("bank")
    orders = app.documents(f"mongodb://127.0.0.1:{free_ports(1)[0]}/x")
    block = app.transaction(orders)
    tx = block._colours[0](app.writer("documents"), None)  # type: ignore[arg-type]
    for document, why in (
        ({"semel": 1}, "Semel's own"),
        ({"a": object()}, "cannot be written as BSON"),
        ({"a": b"x" * 16_000_001}, "16000000 is the most"),
    ):
        with pytest.raises(DocumentRefused, match=why):
            tx.insert("orders", document)
    with pytest.raises(DocumentRefused, match="no collection of yours"):
        tx.insert("semel_txn", {})
    assert len(tx.insert("orders", {"cents": 5})) == 32
    with pytest.raises(DocumentRefused, match="inserts one document"):
        tx.insert("orders", {"cents": 5})
    app.close()
