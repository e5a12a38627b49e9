"""Faults from outside: what strikes a deployment, how, and how it is healed. `catalogue.KINDS` names them all."""
