from pathlib import Path

from semel.coordinator import membership, transaction_state
from semel.coordinator.transitions import mermaid


def test_the_table_draws_every_arrow_of_a_transaction():
    assert mermaid(transaction_state.TRANSITIONS, transaction_state.TransactionState.EMPTY) == (
        "stateDiagram-v2\n"
        "    [*] --> Empty\n"
        "    Empty --> Empty\n"
        "    Empty --> Ongoing\n"
        "    Empty --> PrepareAbort\n"
        "    Empty --> Dead\n"
        "    Ongoing --> Ongoing\n"
        "    Ongoing --> PrepareCommit\n"
        "    Ongoing --> PrepareAbort\n"
        "    PrepareCommit --> CompleteCommit\n"
        "    PrepareAbort --> CompleteAbort\n"
        "    CompleteCommit --> Empty\n"
        "    CompleteCommit --> Ongoing\n"
        "    CompleteCommit --> PrepareAbort\n"
        "    CompleteCommit --> Dead\n"
        "    CompleteAbort --> Empty\n"
        "    CompleteAbort --> Ongoing\n"
        "    CompleteAbort --> PrepareAbort\n"
        "    CompleteAbort --> Dead\n"
    )


def test_a_decided_transaction_has_one_way_only():
    table = transaction_state.TRANSITIONS
    for state in transaction_state.PREPARED:
        (after,) = table[state]
        assert after == state.replace("Prepare", "Complete")


def test_every_state_is_in_its_table():
    assert set(transaction_state.TRANSITIONS) == set(transaction_state.TransactionState)
    assert set(membership.TRANSITIONS) == set(membership.GroupState)


def test_the_picture_in_the_documents_is_the_tables():
    page = Path(__file__).parents[2] / "docs" / "broker.md"
    drawn = mermaid(transaction_state.TRANSITIONS, transaction_state.TransactionState.EMPTY)
    assert f"```mermaid\n{drawn}```" in page.read_text()
