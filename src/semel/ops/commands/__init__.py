"""The verbs of the `semel` command, a file for each group."""
