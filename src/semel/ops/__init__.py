"""Operating Semel: the command line, the processes it starts, and the guarantee report. Nothing imports this room."""
