"""The bank's proof plan: random transfers, and a double-entry check.

semel prove semel.examples.payments:app
"""

from itertools import count

from semel.examples.payments import ACCOUNTS, OPENING_CENTS
from semel.prove.plan import ProofPlan, Request


def inputs(rng):
    for number in count():
        source, target = rng.sample(range(1, ACCOUNTS + 1), 2)
        transfer = {"id": f"t-{number}", "source": f"a{source}", "target": f"a{target}", "cents": rng.randrange(1, 900)}
        yield Request("POST", "/transfers", transfer)


def check(context):
    accounts = {row[0]: row[1:] for row in context.query("SELECT id, balance, entries FROM account")}
    booked = {row[0]: row[1:] for row in context.query("SELECT account_id, cents, entries, number FROM booked")}
    if sum(balance for balance, _ in accounts.values()) != ACCOUNTS * OPENING_CENTS:
        yield "money came into being or is gone: the balances do not add up to what there was"
    if sum(cents for cents, _, _ in booked.values()):
        yield "the ledger does not balance: its entries do not add up to 0"
    for account, (balance, entries) in sorted(accounts.items()):
        cents, told, number = booked.get(account, (0, 0, 0))
        if (OPENING_CENTS + cents, told, number) != (balance, entries, entries):
            yield (
                f"account {account} has {balance} cents after {entries} entries, but its {told} entries in the ledger, "
                f"the last of them number {number}, say {OPENING_CENTS + cents}"
            )
    done = [each.input.body for each in context.inputs() if each.is_done]
    unknown = sum(1 for each in context.inputs() if each.status == 0)
    entries = sum(entries for _, entries in accounts.values())
    if not 2 * len(done) <= entries <= 2 * (len(done) + unknown):
        yield f"{len(done)} transfers were accepted and {unknown} may have been, but there are {entries} entries"


plan = ProofPlan(inputs, check)
