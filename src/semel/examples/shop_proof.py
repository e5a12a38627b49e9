"""The shop's proof plan: real purchases as orders, and totals that the tables must show to the cent.

semel prove semel.examples.shop:app
"""

from collections import Counter
from itertools import count

from semel.examples.shop import sku
from semel.prove.plan import ProofPlan, Request
from semel.prove.purchases import load_purchases


def inputs(rng):
    """The purchases in an order that the seed decides; when all were made, customers come again with new orders."""
    purchases = load_purchases()
    for round_ in count():
        rng.shuffle(purchases)
        for line, customer, cds, cents in purchases:
            order = round_ * 100_000 + line
            yield Request("POST", "/orders", {"id": order, "customer_id": customer, "cds": cds, "cents": cents})


def check(context):
    customers: dict[str, tuple[int, int, int]] = {}
    stock: Counter[str] = Counter()
    unsure = set()  # Customers of orders without an answer: theirs may be there or not.
    for order, done, unknown in ((each.input.body, each.is_done, each.status == 0) for each in context.inputs()):
        customer = order["customer_id"]
        if unknown:
            unsure.add(customer)
        if done:
            orders, cds, cents = customers.get(customer, (0, 0, 0))
            customers[customer] = (orders + 1, cds + order["cds"], cents + order["cents"])
            stock.update(sku(order["id"], position) for position in range(order["cds"]))
    found = {row[0]: row[1:] for row in context.query("SELECT customer_id, orders, cds, cents FROM customer_totals")}
    for customer in sorted((customers.keys() | found.keys()) - unsure):
        if customers.get(customer) != found.get(customer):
            yield f"customer {customer}: {found.get(customer)}, but the orders add up to {customers.get(customer)}"
    if not unsure:
        taken = dict(context.query("SELECT sku, taken FROM stock"))
        for title in sorted(stock.keys() | taken.keys()):
            if stock[title] != taken.get(title, 0):
                yield f"title {title}: {taken.get(title, 0)} taken from stock, but {stock[title]} were ordered"


plan = ProofPlan(inputs, check)
