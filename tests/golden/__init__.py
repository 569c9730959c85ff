"""Golden cases: recorded inputs and results that the product has to reproduce (`python -m tests.golden DIR ...`)."""
