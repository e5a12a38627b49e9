"""Processing: handlers, units of work, keyed state, and the processes that run them."""

EXIT_CONFIGURATION = 2
"""Exit code of a process that cannot run as it is set up (a usage error): starting it again would not help."""

EXIT_OVERDUE = 76
"""Exit code of a process whose handler did not come back within its deadline and could not be interrupted."""

EXIT_FENCED = 75
"""Exit code of a process whose transactional id another process took over."""
