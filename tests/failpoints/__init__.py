"""Every failpoint, every action, first, second and last hit, against a chain of real processes."""
