"""One module per method: `UNITS` (unit name -> function of a case) and `claims(case)` (are these its array names?)."""
