"""What the command line does: one function per verb, taking the settings and returning an exit code."""
